"""BranchyNet: deep networks that answer early when they are sure."""

import importlib
from typing import Any

# Imported when first used, so that `load` and its engine start at once and need no PyTorch. __init__.pyi has the types.
_MODULES = {
    "nn.network": ("BranchyNet",),
    "nn.attaching": ("attach", "detach"),
    "nn.averaged": ("averaged",),
    "training.loop": ("fit",),
    "training.history": ("History",),
    "losses": ("joint_loss",),
    "profiling.recording": ("record",),
    "profiling.cost": ("measure",),
    "profiling.benchmark": ("bench",),
    "policy.exit_record": ("ExitRecord",),
    "policy.values": ("Choice", "ExitCost", "Outcome", "Policy", "Prediction", "Promise"),
    "policy.choosing": ("choose",),
    "policy.evaluation": ("evaluate", "frontier"),
    "policy.score_fitting": ("fit_score", "fit_temperature"),
    "policy.averaging": ("averaged_record", "fit_averaging"),
    "deploy.exporting": ("export",),
    "deploy.loading": ("load", "verify"),
    "deploy.engine": ("Engine",),
    "deploy.torch_engine": ("TorchEngine",),
    "monitor.drift": ("Monitor",),
    "monitor.budget": ("BudgetController",),
    "design.advising": ("advise",),
    "design.advice": ("Advice",),
    "errors": ("BranchyNetError",),
    "environment": ("__version__",),
}
_NAMESPACES = ("data", "losses", "nn", "report", "zoo")
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted([*_HOMES, *_NAMESPACES])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _NAMESPACES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'branchynet' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
