"""What every engine asks of a call: its inputs and thresholds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..types import Policy


@dataclass(frozen=True)
class Input:
    """One input of the network: its name, numpy dtype, and shape without the batch (None where a length is free)."""

    name: str
    dtype: Any
    shape: tuple[int | None, ...]

    def accepts(self, array: Any) -> bool:
        """Whether `array` has this dtype and this shape behind its batch dimension."""
        return isinstance(array, np.ndarray) and array.dtype == self.dtype and self.fits(array.shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether `shape`, batch first, is this input's."""
        return len(shape) == len(self.shape) + 1 and (
            shape[1:] == self.shape
            or all(want is None or have == want for have, want in zip(shape[1:], self.shape, strict=True))
        )

    def describe(self, given: Any) -> str:
        """What was given instead, such as ``float64 (3, 28)``."""
        return f"{given.dtype} {given.shape}" if isinstance(given, np.ndarray) else type(given).__name__

    @property
    def dtype_name(self) -> str:
        """Such as ``float32``."""
        return np.dtype(self.dtype).name

    def __str__(self) -> str:
        """Such as ``x: float32 (B, 1, 28, 28)``."""
        dims = ", ".join(["B", *("?" if d is None else str(d) for d in self.shape)])
        return f"{self.name}: {self.dtype_name} ({dims})"


def check_inputs(inputs: Sequence[Any], wanted: Sequence[Input]) -> int:
    """How many samples the inputs of a call hold.

    Raises:
        InputError: wrong number, shape or dtype of inputs, or their batch sizes disagree.
    """
    if len(inputs) != len(wanted):
        raise InputError(f"{len(inputs)} inputs given; the network reads {len(wanted)}: {_listed(wanted)}")
    for given, want in zip(inputs, wanted, strict=True):
        if not want.accepts(given):
            raise InputError(f"input {want.name!r} is {want.describe(given)}; the network reads {_listed(wanted)}")
    rows = len(inputs[0])
    if any(len(given) != rows for given in inputs):
        raise InputError(f"the inputs have batch sizes {[len(given) for given in inputs]}; they must agree")
    return rows


def difference(got: NDArray[Any], want: NDArray[Any]) -> float:
    """The largest difference of two answers; infinite where they are not finite in the same way."""
    same = np.equal(got, want) | (np.isnan(got) & np.isnan(want))
    apart = np.abs(got[~same] - want[~same])
    return float(np.where(np.isnan(apart), np.inf, apart).max(initial=0.0))


def magnitude(want: NDArray[Any]) -> float:
    """The largest finite figure of an answer, without its sign, and at least 1: what a tolerance is relative to."""
    return float(np.abs(want[np.isfinite(want)]).max(initial=1.0))


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
    try:
        thresholds = [None if t is None else float(t) for t in thresholds]
    except (TypeError, ValueError):
        raise InputError(f"thresholds must be a list of numbers, or None for never; got {thresholds!r}") from None
    if len(thresholds) != policy.exits - 1:
        raise InputError(f"{len(thresholds)} thresholds given for {policy.exits} exits; give {policy.exits - 1}")
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
