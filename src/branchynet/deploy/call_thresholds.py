"""Check the thresholds of a call to an engine.

Shape letters: B samples in a batch, N exits.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..argument_checks import ordered, threshold_list
from ..errors import InputError
from ..policy.values import Choice, Floats, Policy

Thresholds = Sequence[float | NDArray[Any] | None] | Sequence[Policy]
_FLOAT32 = np.dtype(np.float32)


def call_thresholds(
    thresholds: Any, policy: Policy, samples: int, *, where: str, remedy: str
) -> tuple[float | Floats | None, ...]:
    """Return the thresholds of a call, one per early exit: a number, or `(B,)` numbers.

    Args:
        thresholds: for each exit except the last, a number, `(B,)` numbers as an array or tensor, or None; or B
            policies.
        policy: names the exits in use.
        samples: B.
        where: for the message, such as ``"this file"``.
        remedy: for the message: how to include a left-out exit, such as ``"export again"``.

    Raises:
        InputError: as `per_sample_apart` and `check_thresholds`.
    """
    numbers, each = per_sample_apart(thresholds, policy, samples)
    checked = check_thresholds(numbers, policy, where=where, remedy=remedy)
    return tuple(each.get(n, number) for n, number in enumerate(checked, 1))


def per_sample_apart(thresholds: Any, policy: Policy, samples: int) -> tuple[list[Any], dict[int, Floats]]:
    """Return the thresholds of a call with 0 for those per sample, and those per sample by the number of their exit.

    Raises:
        InputError: thresholds per sample are not numbers, or not as many as samples; or the policies do not fit.
    """
    given = listed(thresholds)  # runs in every call with thresholds per sample, so keep it short
    if given and isinstance(given[0], (Policy, Choice)):
        _check_count(len(given), samples)
        given = _of_policies(given, policy)
    numbers, each = list(given), {}
    for n, one in enumerate(given, 1):
        if (values := _rows(one)) is not None:
            if len(values) != samples:
                _check_count(len(values), samples)
            numbers[n - 1], each[n] = 0.0, values
    return numbers, each


def none_given(thresholds: Any, samples: int) -> bool:
    """Whether a call gives no thresholds; an empty list holds the policies of an empty batch."""
    return thresholds is None or (not samples and isinstance(thresholds, (list, tuple)) and not thresholds)


def listed(thresholds: Any) -> Sequence[Any]:
    """Return the thresholds of a call as a list or tuple, also those of an iterator. Raises `InputError`."""
    if isinstance(thresholds, (list, tuple)):
        return thresholds
    if isinstance(thresholds, (Policy, Choice)):
        raise InputError("thresholds must be a list; got one policy for all samples: give its .thresholds")
    return ordered("thresholds", thresholds, "give a number for each exit except the last, or None for never")


def _check_count(thresholds: int, samples: int) -> None:
    if thresholds not in (1, samples):
        raise InputError(f"thresholds are given for {thresholds} samples, but the batch has {samples}")


def _of_policies(given: Sequence[Any], policy: Policy) -> list[Any]:
    """Return the thresholds per exit of B policies; minus infinity where one has none."""
    policies = [one.policy if isinstance(one, Choice) else one for one in given]
    for one in policies:
        if not isinstance(one, Policy) or one.num_exits != policy.num_exits or one.score != policy.score:
            raise InputError(f"a policy per sample must have the exits and the score of {policy}; got {one}")
    columns = zip(*(one.thresholds for one in policies), strict=True)
    return [
        None if set(column) == {None} else np.array([-math.inf if t is None else t for t in column])
        for column in columns
    ]


def _rows(threshold: Any) -> Floats | None:
    """Return thresholds per sample as an array; None for a single number and for what is none."""
    if getattr(threshold, "ndim", 0) != 1:
        if isinstance(threshold, (list, tuple)):
            raise InputError("thresholds per sample must be a numpy array (B,) for each exit; got a list")
        return None
    values = threshold
    if hasattr(threshold, "detach"):
        with contextlib.suppress(TypeError, RuntimeError):  # numpy has no bfloat16 or sparse tensors
            values = threshold.detach().cpu().numpy()
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        raise InputError(f"thresholds per sample must be numbers; got {values!r:.80}")
    if len(values) and math.isnan(values[values.argmax()]):  # argmax finds the first NaN, if there is one
        raise InputError("thresholds per sample must be numbers, or minus infinity for never; got NaN")
    if values.dtype is _FLOAT32:
        return values
    with np.errstate(over="ignore"):  # a threshold beyond float32 is infinite
        return values.astype(np.float32)


def check_thresholds(
    thresholds: Sequence[float | None], policy: Policy, *, where: str, remedy: str
) -> tuple[float | None, ...]:
    """Return the thresholds of a call as the engine uses them, one per early exit.

    None: the policy leaves the exit out. Minus infinity: the caller gave None, so no sample leaves there.

    Args:
        thresholds: as given by the caller.
        policy: names the exits in use.
        where: for the message, such as ``"this file"``.
        remedy: for the message: how to include an exit, such as ``"export again"``.

    Raises:
        InputError: `thresholds` is not a list of N-1 numbers or None, or it has a number for an exit that is left out.
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
