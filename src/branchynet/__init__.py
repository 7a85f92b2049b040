"""BranchyNet: deep networks that answer early when they are sure."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import zoo as zoo
    from .attaching import attach as attach
    from .attaching import detach as detach
    from .averaging import averaged as averaged
    from .bench import bench as bench
    from .budget import BudgetController as BudgetController
    from .choosing import choose as choose
    from .cost import measure as measure
    from .decide import evaluate as evaluate
    from .decide import frontier as frontier
    from .design import Advice as Advice
    from .design import advise as advise
    from .drift import Monitor as Monitor
    from .engine.onnx import load as load
    from .engine.onnx import verify as verify
    from .errors import BranchyNetError as BranchyNetError
    from .exit_record import ExitRecord as ExitRecord
    from .export import export as export
    from .fitting import fit_score as fit_score
    from .fitting import fit_temperature as fit_temperature
    from .meta import LearnedScore as LearnedScore
    from .meta import TemperedScore as TemperedScore
    from .net import BranchyNet as BranchyNet
    from .record import record as record
    from .training.train import fit as fit
    from .training.train import joint_loss as joint_loss
    from .types import Choice as Choice
    from .types import ExitCost as ExitCost
    from .types import Outcome as Outcome
    from .types import Policy as Policy
    from .types import Prediction as Prediction
    from .types import Promise as Promise
    from .version import __version__ as __version__

# Imported when first used, so that `load` and its engine work where only ONNX Runtime is wanted, and start at once.
_ROOMS = {
    "Advice": "design",
    "BranchyNet": "net",
    "BranchyNetError": "errors",
    "BudgetController": "budget",
    "Choice": "types",
    "ExitCost": "types",
    "ExitRecord": "exit_record",
    "LearnedScore": "meta",
    "Monitor": "drift",
    "Outcome": "types",
    "Policy": "types",
    "Prediction": "types",
    "Promise": "types",
    "TemperedScore": "meta",
    "__version__": "version",
    "advise": "design",
    "attach": "attaching",
    "averaged": "averaging",
    "bench": "bench",
    "choose": "choosing",
    "detach": "attaching",
    "evaluate": "decide",
    "export": "export",
    "fit": "training.train",
    "fit_score": "fitting",
    "fit_temperature": "fitting",
    "frontier": "decide",
    "joint_loss": "training.train",
    "load": "engine.onnx",
    "measure": "cost",
    "record": "record",
    "verify": "engine.onnx",
    "zoo": "zoo",
}

__all__ = sorted(_ROOMS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'branchynet' has no attribute {name!r}")
    room = importlib.import_module(f".{_ROOMS[name]}", __name__)
    value = room if name == _ROOMS[name] and name == "zoo" else getattr(room, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        """Keep a public function where importing the room of its name would put that room: export, bench, record."""
        if isinstance(value, ModuleType) and name in _ROOMS and name != "zoo":
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
