"""Choose thresholds under a promise: one half of a record finds candidates, and the other half tests them.

Shape letters: S samples, N exits.
"""

import bisect
import math
import warnings
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InfeasibleError, InputError
from .evaluation import best_points, centered
from .exit_record import ExitRecord
from .exit_rule import exit_positions
from .fitted_scores import samples_fitted_on
from .limits import Limit
from .risk_tests import fixed_sequence_test, halves, samples_needed
from .sample_digests import COPIED, REPEATED, digests, repeated, repeated_rows, share_samples
from .search import SearchProblem, evenly, points_at
from .values import Floats

if TYPE_CHECKING:
    from .scores import Score

_CANDIDATES = 128
"""At most this many policies are tested for a promise."""


def check_samples(record: ExitRecord, score: "str | Score") -> None:
    """Check that the samples that test a promise were not used before, to fit the score or to select the exits.

    Raises:
        InputError: they were used before; or half of the samples or more are copies of others, by their inputs.

    Warns:
        UserWarning: many samples occur in the record more than once, perhaps in both halves; or the check for earlier
            use is not possible.
    """
    fitted = samples_fitted_on(score)
    found = record.sample_digests
    share = repeated_rows(record.scores, record.losses) if found is None else repeated(found)  # type: ignore[arg-type]
    if share >= COPIED and record.inputs is not None:
        raise InputError(
            f"{share:.0%} of the record's {record.samples} samples are copies of others, by their inputs, so both "
            "halves hold the same samples and a promise would not hold: record every sample once, or ask for no "
            "promise with confidence=None; if equal samples were drawn independently, leave their inputs out: "
            "ExitRecord(record.outputs, record.labels)"
        )
    if share > REPEATED:
        warnings.warn(
            f"{share:.0%} of the record's {record.samples} samples are copies of others: if the same data were "
            "recorded several times, the promise does not hold; record every sample once",
            stacklevel=3,
        )
    if found is None:
        if fitted or record.selected_on:
            what = f"the {score} score" if fitted else "the network or the score"
            warnings.warn(
                f"{what} was fitted or selected on samples that may be among these, which cannot be checked, because "
                "the record does not know its samples: give it inputs=, the digests of their inputs",
                stacklevel=3,
            )
        return
    why = ""
    if _used(record, (fitted,)):
        why = (
            f"the {score} score was fitted on samples that would test the promise, which then would not hold: fit "
            "it on some of the samples, record.take(slice(0, None, 2)), and choose on the others, "
            "record.take(slice(1, None, 2)), or ask for no promise with confidence=None"
        )
    elif _used(record, record.selected_on):
        why = (
            "this network's exits or averages were selected on samples that would test the promise, or the record's "
            "score was fitted on them, and the promise would not hold: give a record of other samples; after advise, "
            "give the whole record of its validation samples in the same order, because advise used only half of it; "
            "or ask for no promise with confidence=None"
        )
    if why and share < COPIED:
        raise InputError(why)
    if why:  # equal samples may be different draws
        few = "the record has few distinct samples; unless equal samples were drawn independently"
        warnings.warn(f"{few}, {why}", stacklevel=3)


def _used(record: ExitRecord, before: tuple[str, ...]) -> bool:
    """Return whether the samples that test a promise share samples with a set that has a sketch in `before`."""
    if not any(before):
        return False
    known = [record.inputs, None if record.outputs is None else digests(record.outputs)]
    _, calibration = halves(record.samples)
    return any(share_samples(one, found[calibration]) for one in before for found in known if found is not None)


def bound_of(problem: SearchProblem, limit: Limit, bound: str | None) -> str:
    """Return `bound`, or the sharper one for None. Raises `InputError` for binomial with losses other than 0 and 1."""
    whole = bool(((problem.losses == 0) | (problem.losses == 1)).all())
    if bound == "binomial" and not whole:
        raise InputError("the binomial bound needs losses of 0 and 1; the record has others: take bound='betting'")
    return bound or ("binomial" if whole and not limit.signed else "betting")


def check_size(samples: int, limit: Limit, delta: float, bound: str) -> None:
    """Raise `InputError` if `samples` are too few for a promise, and name the smallest limit for which they suffice."""
    needed = samples_needed(limit.risk, delta, bound)
    if samples - samples // 2 >= needed:
        return
    carried = tightest_limit(samples, delta, bound, absolute=limit.absolute)
    other = "" if carried is None else f"take {limit.name}={carried:g}, the tightest limit for this many samples, "
    raise InputError(
        f"a promise of {limit} at {1 - delta:.0%} confidence by the {bound} bound needs at least "
        f"{2 * needed} samples, half of them to find candidates and half to test them; the record has {samples}, so "
        f"none could leave early: {other}record more, or ask for no promise with confidence=None"
    )


_LIMITS = tuple(float(f"{digits}e-{power}") for power in range(6, 1, -1) for digits in range(10, 100))[:-49]
"""Limits that an error may name: two digits, up to 0.5."""


def tightest_limit(samples: int, delta: float, bound: str, *, absolute: bool = False) -> float | None:
    """Return the smallest limit, in two digits, that a record of `samples` can promise; None if there is none.

    If `absolute`, return the largest accuracy instead, 1 minus such a limit.
    """
    limits = [round(1 - limit, 8) for limit in _LIMITS] if absolute else _LIMITS
    enough = lambda limit: samples_needed(1 - limit if absolute else limit, delta, bound) <= samples - samples // 2  # noqa: E731
    found = bisect.bisect_left(limits, True, key=enough)
    return limits[found] if found < len(limits) else None


def promised(
    problem: SearchProblem, limit: Limit, delta: float, bound: str, vectors: int
) -> tuple[Floats, tuple[int, int]]:
    """Return thresholds `(N-1,)` that keep the limit with probability 1 - delta, and the sizes of both halves."""
    tuning_rows, calibration_rows = halves(len(problem.scores))
    sizes = len(tuning_rows), len(calibration_rows)
    check_size(len(problem.scores), limit, delta, bound)
    tuning, calibration = problem.take(tuning_rows), problem.take(calibration_rows)
    points = best_points(tuning, vectors)
    room = 2 * math.sqrt(sizes[0] * max(limit.risk, 0))  # two standard errors, as the tuning half may have bad luck
    kept = np.nonzero(points.loss <= limit.allowed_loss(tuning.losses) + room)[0][::-1]  # dearest and surest first
    kept = kept[evenly(len(kept), _CANDIDATES)]
    candidates = [centered(tuning, points.thresholds[i]) for i in kept]
    never = np.full(problem.scores.shape[1] - 1, np.nan, np.float32)
    safe = not limit.absolute and limit.value >= 0  # never leaving early always keeps the limit
    # One candidate at a time: all at once would hold 128 numbers per sample.
    before, after = (map(partial(_differences, half, limit.absolute), candidates) for half in (tuning, calibration))
    passed = candidates[: fixed_sequence_test(before, after, limit.risk, delta, bound)]
    if not (safe or passed):
        reached = 1 - points.loss.min() / sizes[0]
        raise InfeasibleError(
            f"no thresholds keep {limit} at {1 - delta:.0%} confidence on {sizes[1]} calibration "
            f"samples; the most accurate reached {reached:.4f} on the {sizes[0]} others"
            f"{limit.last_accuracy(tuning.losses)}: record more samples, or {limit.remedy}"
        )
    early = [not np.isnan(candidate).all() for candidate in candidates]
    if any(early) and not any(early[: len(passed)]):
        more = "record more samples, or allow more" if limit.value > 0 else "allow more than 0"
        warnings.warn(
            f"no thresholds keep {limit} at {1 - delta:.0%} confidence on {sizes[1]} calibration samples, so "
            f"no sample leaves early: {more}",
            stacklevel=3,
        )
    found = np.array([never, *passed] if safe else passed)
    return found[points_at(problem, found).us.argmin()], sizes


def _differences(problem: SearchProblem, absolute: bool, thresholds: Floats) -> Floats:
    """Return the loss `(S,)` of each answer, minus that of the last exit unless `absolute`."""
    answer = problem.losses[np.arange(len(problem.losses)), exit_positions(problem.scores, thresholds)]
    return answer if absolute else answer - problem.losses[:, -1]
