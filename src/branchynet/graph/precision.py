"""The number formats that a flat graph can be converted to before the cut."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor

from ..errors import InputError
from .half import HALF, in_half
from .onnx_flat import FlatGraph
from .quantize import Batch, quantized

Precision = Literal["float32", "fp16", "bf16", "int8", "int8-full-range"]


def check_precision(precision: str, calibration: Any) -> None:
    """Check the arguments `precision` and `calibration`. Raises `InputError`."""
    if precision not in get_args(Precision):
        raise InputError(f"precision must be one of {', '.join(map(repr, get_args(Precision)))}; got {precision!r}")
    if needs_calibration(precision) and calibration is None:
        raise InputError(
            f"precision={precision!r} needs calibration=, a list of batches with a few hundred training "
            "samples, such as list(itertools.islice(train_loader, 8))"
        )
    if calibration is not None and precision == "float32":
        raise InputError("calibration= needs precision='int8', 'int8-full-range', 'fp16' or 'bf16'; give both, or none")
    if isinstance(calibration, (Tensor, str, Mapping)) or not isinstance(calibration, Iterable | None):
        raise InputError(
            f"calibration must be a loader or a list of batches; got a {type(calibration).__name__}: for one batch, "
            "give [batch]"
        )


def needs_calibration(precision: str) -> bool:
    """Whether the conversion reads samples."""
    return precision.startswith("int8")


def converted(flat: FlatGraph, precision: str, batches: Sequence[Batch]) -> FlatGraph:
    """Return the graph in another number format. Only int8 reads the batches; errors are those of `export`."""
    if precision in HALF:
        return in_half(flat, precision)
    if needs_calibration(precision):
        return quantized(flat, batches, precision)
    return flat
