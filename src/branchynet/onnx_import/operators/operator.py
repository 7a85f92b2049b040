"""How one ONNX operator is computed in torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

DAMAGED = "the file is damaged: write it again"


@dataclass(frozen=True)
class Operator:
    """One ONNX operator.

    Attributes:
        run: computes it. It takes the inputs in the order of the ONNX specification, None for one that is left out, and
            the attributes as keywords under their ONNX names. Parameters named ``opset``, ``training`` and ``outputs``
            receive the version of the operator set, whether the network is training, and the number of outputs.
        on_numbers: computes it on `Numbers` alone, or returns NotImplemented.
        numbers: positions of inputs that it needs as numbers; `run` receives a flat list.
        either: positions of inputs that it takes as tensors and as `Numbers`.
        weights: positions of inputs that are weights, of any size.
        fixed: positions of inputs that are never trained.
        constant: whether it can be imported only if its inputs are constants.
    """

    run: Callable[..., Any]
    on_numbers: Callable[..., Any] | None = None
    numbers: tuple[int, ...] = ()
    either: tuple[int, ...] = ()
    weights: tuple[int, ...] = ()
    fixed: tuple[int, ...] = ()
    constant: bool = False
