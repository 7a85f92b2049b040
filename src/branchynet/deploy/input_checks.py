"""Check the inputs and thresholds of a call to an engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..argument_checks import dtype_name, has_sizes, in_order
from ..errors import InputError, RunError, first_line
from ..graph.lengths import Length

_MASKED = np.ma.MaskedArray  # a runtime would read the values under the mask


@dataclass(frozen=True)
class Input:
    """One input of the network: name, numpy dtype, and shape without the batch (None for a free length)."""

    name: str
    dtype: Any
    shape: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if self.dtype is not None and not isinstance(self.dtype, str):  # comparing two dtypes is fast
            object.__setattr__(self, "dtype", np.dtype(self.dtype))

    def accepts(self, array: Any) -> bool:
        """Whether `array` has this dtype and, after the batch dimension, this shape."""
        if not isinstance(array, np.ndarray) or array.dtype != self.dtype or isinstance(array, _MASKED):
            return False
        shape = array.shape
        return (shape != () and shape[1:] == self.shape) or self.fits(shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether `shape`, batch first, matches this input."""
        return shape != () and has_sizes(shape[1:], self.shape)

    def taken(self, given: Any) -> Any:
        """Convert a torch tensor to an array, which shares its memory on the CPU; return anything else unchanged."""
        if not hasattr(given, "detach"):  # torch may not be installed
            return given
        try:
            return given.detach().cpu().numpy()
        except (TypeError, RuntimeError):  # numpy has no bfloat16, sparse or quantized tensors
            return given

    def describe(self, given: Any) -> str:
        """Describe a given value, such as ``float64 (3, 28)``."""
        known = hasattr(given, "dtype") and hasattr(given, "shape")
        masked = "a masked array, " if isinstance(given, _MASKED) else ""
        return f"{masked}{dtype_name(given.dtype)} {tuple(given.shape)}" if known else type(given).__name__

    def remedy(self, given: Any) -> str:
        """Say how to convert a given value to this input; empty if unknown."""
        if not hasattr(given, "dtype"):
            return f"give numpy.asarray(..., numpy.{self.dtype_name})"
        if isinstance(given, _MASKED):
            return "replace the masked values: array.filled(value)"
        shape = tuple(given.shape)
        if not self.fits(shape):
            return "add the batch dimension: array[None]" if self.fits((1, *shape)) else ""
        convert = "to(torch." if hasattr(given, "detach") else "astype(numpy."
        return f"convert it: .{convert}{self.dtype_name})"

    @property
    def dtype_name(self) -> str:
        """Such as ``float32``."""
        return str(self.dtype)

    def __str__(self) -> str:
        """Such as ``x: float32 (B, 1, 28, 28)``."""
        dims = ", ".join(["B", *("?" if d is None else str(d) for d in self.shape)])
        return f"{self.name}: {self.dtype_name} ({dims})"


def checked_inputs(
    inputs: Sequence[Any], named: Mapping[str, Any], wanted: Sequence[Input]
) -> tuple[dict[str, Any], int]:
    """Return the inputs of a call by name, in the order of `wanted`, and the number of samples.

    Args:
        inputs: the positional inputs, or one mapping from names to inputs.
        named: the keyword inputs.
        wanted: the network's inputs.

    Raises:
        InputError: inputs of the wrong number, names, shape or dtype, or of several batch sizes.
    """
    if not named and len(inputs) == len(wanted):
        taken: dict[str, Any] = {}
        rows = 0
        for given, want in zip(inputs, wanted, strict=True):  # runs in every call, so keep it short
            if not want.accepts(given) or (taken and len(given) != rows):
                break
            rows = len(given)
            taken[want.name] = given
        else:
            return taken, rows
    return checked_inputs(_mended(inputs, named, wanted), {}, wanted)


def check_sizes(arrays: Mapping[str, Any], lengths: Sequence[Length], taker: str = "this file") -> None:
    """Raise `InputError` unless the free lengths of the inputs have sizes that `taker` takes."""
    for length in lengths:
        sizes = [arrays[name].shape[axis] for name, axis in length.at if name in arrays]
        if len(set(sizes)) > 1:
            places = ", ".join(f"dimension {axis} of {name!r}" for name, axis in length.at)
            raise InputError(f"{places} must be equal, the {length.name}; got {sizes}")
        if sizes and not length.fits(sizes[0]):
            raise InputError(f"the {length.name} of {length.at[0][0]!r} is {sizes[0]}; {taker} takes {length}")


def run_error(runtime: str, feeds: Mapping[str, Any], metadata: Mapping[str, Any], error: Exception) -> RunError:
    """Return the error for inputs with which a runtime fails, although their shapes and dtypes are right."""
    arrays = {name: array for name, array in feeds.items() if not name.startswith("threshold_")}
    given = "; ".join(f"{name} {dtype_name(array.dtype)} {tuple(array.shape)}" for name, array in arrays.items())
    lengths = ", ".join(f"{one['name']} {one['example']}" for one in metadata.get("lengths", ()))
    return RunError(
        f"{runtime} fails with {given} ({first_line(error)}): look for values outside of their range, such as an index "
        "beyond an embedding table, "
        + (f"for lengths far from those of the example ({lengths}), " if lengths else "")
        + "or give fewer samples per call"
    )


def _mended(inputs: Sequence[Any], named: Mapping[str, Any], wanted: Sequence[Input]) -> Sequence[Any]:
    """Convert the inputs to arrays in order. Raise `InputError` if they do not match."""
    if len(inputs) == 1 and isinstance(inputs[0], Mapping):
        inputs, named = (), {**inputs[0], **named}
    if named:
        try:
            inputs = (*inputs, *in_order(named, [i.name for i in wanted[len(inputs) :]]))
        except InputError:
            raise InputError(
                f"{len(inputs)} inputs are given by position and {sorted(map(str, named))} by name; the network reads "
                f"{_listed(wanted)}"
            ) from None
    if len(inputs) != len(wanted):
        raise InputError(f"{len(inputs)} inputs given; the network reads {len(wanted)}: {_listed(wanted)}")
    arrays = [want.taken(given) for given, want in zip(inputs, wanted, strict=True)]
    for given, array, want in zip(inputs, arrays, wanted, strict=True):
        if not want.accepts(array):
            remedy = want.remedy(given)
            raise InputError(
                f"input {want.name!r} is {want.describe(given)}; the network reads {_listed(wanted)}"
                + (f": {remedy}" if remedy else "")
            )
    if len({len(array) for array in arrays}) > 1:
        names, sizes = ", ".join(repr(i.name) for i in wanted), [len(array) for array in arrays]
        raise InputError(f"the inputs {names} have batch sizes {sizes}; they must agree")
    return arrays


def _listed(inputs: Sequence[Input]) -> str:
    return "; ".join(str(i) for i in inputs)
