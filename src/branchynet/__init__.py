"""BranchyNet: deep networks that answer early when they are sure."""

from . import zoo
from .bench import bench
from .cost import measure
from .decide import choose, evaluate
from .engine.onnx import load
from .errors import BranchyNetError
from .export import export
from .net import BranchyNet, attach
from .record import record
from .train import fit, joint_loss
from .types import Choice, ExitCost, ExitRecord, Outcome, Policy, Prediction
from .version import __version__

__all__ = [
    "BranchyNet",
    "BranchyNetError",
    "Choice",
    "ExitCost",
    "ExitRecord",
    "Outcome",
    "Policy",
    "Prediction",
    "__version__",
    "attach",
    "bench",
    "choose",
    "evaluate",
    "export",
    "fit",
    "joint_loss",
    "load",
    "measure",
    "record",
    "zoo",
]
