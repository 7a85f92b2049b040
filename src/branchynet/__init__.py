"""BranchyNet: deep networks that answer early when they are sure."""

import importlib
from typing import Any

from .extras import first_used, needed_by

# Names are imported on first use, so that `load` starts fast and needs no PyTorch. __init__.pyi holds the types.
_MODULES = {
    "nn.network": ("BranchyNet",),
    "nn.attaching": ("attach", "detach"),
    "onnx_import.loading": ("from_onnx",),
    "nn.averaging": ("averaged",),
    "nn.cascading": ("cascade",),
    "training.loop": ("fit",),
    "training.options": ("FitOptions",),
    "design.options": ("SearchOptions",),
    "training.history": ("History",),
    "losses": ("joint_loss",),
    "profiling.recording": ("record",),
    "profiling.cost": ("measure",),
    "profiling.target": ("Target",),
    "profiling.benchmark": ("bench",),
    "policy.exit_record": ("ExitRecord",),
    "policy.exit_cost": ("ExitCost",),
    "policy.values": ("Choice", "Outcome", "Policy", "Promise"),
    "policy.prediction": ("Prediction",),
    "policy.choosing": ("choose",),
    "policy.evaluation": ("evaluate", "frontier"),
    "policy.score_fitting": ("fit_score", "fit_temperature"),
    "policy.averaging": ("averaged_record", "fit_averaging"),
    "deploy.exporting": ("export",),
    "deploy.loading": ("load", "verify"),
    "deploy.engine": ("Engine",),
    "deploy.staged_engine": ("StagedEngine",),
    "deploy.torch_engine": ("TorchEngine",),
    "monitor.drift": ("Monitor",),
    "monitor.budget": ("BudgetController",),
    "design.advising": ("advise",),
    "design.advice": ("Advice",),
    "errors": ("BranchyNetError",),
    "environment": ("__version__",),
}
_NAMESPACES = ("data", "losses", "nn", "report", "zoo")
_first_used = first_used(__name__, _MODULES)

# A star import leaves the caller's `nn`, which is torch's, alone.
__all__ = sorted([*(n for n in _NAMESPACES if n != "nn"), *(name for names in _MODULES.values() for name in names)])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _NAMESPACES:
        with needed_by(f"branchynet.{name}"):
            return importlib.import_module(f".{name}", __name__)
    return _first_used(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
