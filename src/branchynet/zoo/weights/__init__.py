"""The weights shipped with the package; ``benchmarks/results/*_training.json`` holds how they were trained."""

from pathlib import Path
from typing import TypeVar

from torch import nn

from ...errors import InputError
from ...nn.weights import load_weights

Net = TypeVar("Net", bound=nn.Module)


def load_shipped(net: Net, name: str, num_classes: int) -> Net:
    """Load shipped weights into `net` and set it to evaluation mode.

    Raises `InputError` if no such weights ship, or `num_classes` is not 10.
    """
    if num_classes != 10:
        raise InputError(f"the weights {name!r} have 10 classes, not {num_classes}; use pretrained=False")
    path = Path(__file__).parent / f"{name}.safetensors"
    if not path.exists():
        shipped = ", ".join(sorted(repr(p.stem) for p in path.parent.glob("*.safetensors")))
        raise InputError(f"no weights {name!r} ship with this version, only {shipped}; use pretrained=False and train")
    load_weights(net, path)
    return net.eval()
