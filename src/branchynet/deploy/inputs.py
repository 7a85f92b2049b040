"""What every engine asks of a call: its inputs and thresholds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arguments import in_order, threshold_list
from ..errors import InputError
from ..policy.values import Policy


@dataclass(frozen=True)
class Input:
    """One input of the network: its name, numpy dtype, and shape without the batch (None where a length is free)."""

    name: str
    dtype: Any
    shape: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if self.dtype is not None and not isinstance(self.dtype, str):  # comparing dtypes is fast, with types it is not
            object.__setattr__(self, "dtype", np.dtype(self.dtype))

    def accepts(self, array: Any) -> bool:
        """Whether `array` has this dtype and this shape behind its batch dimension."""
        if not isinstance(array, np.ndarray) or array.dtype != self.dtype:
            return False
        shape = array.shape
        return (shape != () and shape[1:] == self.shape) or self.fits(shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether `shape`, batch first, is this input's."""
        return len(shape) == len(self.shape) + 1 and all(
            want is None or have == want for have, want in zip(shape[1:], self.shape, strict=True)
        )

    def taken(self, given: Any) -> Any:
        """A torch tensor as an array, which shares its memory where that lies on the CPU; anything else as it is."""
        if not hasattr(given, "detach"):  # torch need not be installed where an exported file runs
            return given
        try:
            return given.detach().cpu().numpy()
        except (TypeError, RuntimeError):  # numpy has no bfloat16, and no sparse or quantised tensors
            return given

    def describe(self, given: Any) -> str:
        """What was given instead, such as ``float64 (3, 28)``."""
        if hasattr(given, "detach"):
            return f"{str(given.dtype).removeprefix('torch.')} {tuple(given.shape)}"
        return f"{given.dtype} {given.shape}" if isinstance(given, np.ndarray) else type(given).__name__

    def remedy(self, given: Any) -> str:
        """How to make what was given into this input, where that can be told."""
        if not hasattr(given, "dtype"):
            return f"give numpy.asarray(..., numpy.{self.dtype_name})"
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
    """The inputs of a call by their names, in the order of `wanted`, and how many samples they hold.

    Args:
        inputs: as given by position; or one mapping from names to inputs.
        named: those given by keyword, for what is not given by position.
        wanted: what the network reads.

    Raises:
        InputError: wrong number, names, shape or dtype of inputs, or their batch sizes disagree.
    """
    if not named and len(inputs) == len(wanted):
        taken: dict[str, Any] = {}
        rows = 0
        for given, want in zip(inputs, wanted, strict=True):  # in every call, so it is kept short
            if not want.accepts(given) or (taken and len(given) != rows):
                break
            rows = len(given)
            taken[want.name] = given
        else:
            return taken, rows
    return checked_inputs(_mended(inputs, named, wanted), {}, wanted)


def _mended(inputs: Sequence[Any], named: Mapping[str, Any], wanted: Sequence[Input]) -> Sequence[Any]:
    """Inputs that are right but for their order or for being torch tensors, as arrays in order. Raises `InputError`."""
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
        raise InputError(f"the inputs have batch sizes {[len(array) for array in arrays]}; they must agree")
    return arrays


def _listed(inputs: Sequence[Input]) -> str:
    return "; ".join(str(i) for i in inputs)


def check_thresholds(
    thresholds: Sequence[float | None], policy: Policy, *, where: str, remedy: str
) -> tuple[float | None, ...]:
    """The thresholds of a call, one an exit but the last: None where an exit is left out, never as minus infinity.

    Args:
        thresholds: as the caller gave them.
        policy: which exits are in use.
        where: what an exit may be left out of, such as ``"this file"``.
        remedy: how to get it in, such as ``"export again"``.

    Raises:
        InputError: they are no numbers, not one an exit but the last, or one is for an exit that was left out.
    """
    thresholds = threshold_list(thresholds)
    if len(thresholds) != policy.num_exits - 1:
        raise InputError(
            f"{len(thresholds)} thresholds given for {policy.num_exits} exits; give {policy.num_exits - 1}"
        )
    if any(t is not None and math.isnan(t) for t in thresholds):
        raise InputError(f"thresholds must be numbers, or None for never; got {thresholds}")
    for n, (given, own) in enumerate(zip(thresholds, policy.thresholds, strict=True), 1):
        if own is None and given is not None:
            raise InputError(
                f"exit {n} was left out of {where} (its threshold was never); give None for it, or {remedy}"
            )
    return tuple(
        None if own is None else (-math.inf if given is None else given)
        for given, own in zip(thresholds, policy.thresholds, strict=True)
    )
