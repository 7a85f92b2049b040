"""Thresholds under a promise: candidates from one half of a record, tested on the other.

Shape letters: S samples, N exits.
"""

import bisect
import math
import warnings
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InfeasibleError, InputError
from .digests import COPIED, REPEATED, digests, repeated, repeated_rows, share_samples
from .evaluation import best_points, centred
from .exit_record import ExitRecord
from .exit_rule import exit_positions
from .fitted_scores import FittedScore
from .limits import Limit
from .risk_tests import fewest, fixed_sequence_test, halves
from .search import SearchProblem, mean_cost
from .values import Floats

if TYPE_CHECKING:
    from .scores import Score

_CANDIDATES = 128
"""At most so many policies are put to the test for a promise."""


def check_samples(record: ExitRecord, score: "str | Score") -> None:
    """A promise is tested on samples that neither fitted nor selected what is promised of.

    Raises:
        InputError: they did; or half of the samples or more are copies of others, by their inputs.

    Warns:
        UserWarning: many samples stand in the record more than once, perhaps in both halves; or the samples that fitted
            or selected cannot be told from those that test.
    """
    fitted = score.fitted_on if isinstance(score, FittedScore) else ""
    share = _copies(record)
    if share >= COPIED and record.inputs is not None:
        raise InputError(
            f"{share:.0%} of the record's {record.samples} samples are copies of others, by their inputs, so that both "
            "halves hold the same samples and a promise would not hold: record every sample once, or ask for no "
            "promise with confidence=None; where equal samples were drawn one by one, leave their inputs out: "
            "ExitRecord(record.outputs, record.labels)"
        )
    if share > REPEATED:
        warnings.warn(
            f"{share:.0%} of the record's {record.samples} samples are copies of others: where the same data were "
            "recorded several times, the promise does not hold; record every sample once",
            stacklevel=3,
        )
    if record.sample_digests is None:
        if fitted or record.selected_on:
            what = f"the {score} score" if fitted else "the network or the score"
            warnings.warn(
                f"{what} was fitted or selected on samples that may be among these, which cannot be checked, since the "
                "record does not know its samples: give it inputs=, the digests of their inputs",
                stacklevel=3,
            )
    elif _used(record, (fitted,)):
        _refuse(
            f"the {score} score was fitted on samples that would test the promise, which then would not hold: fit "
            "it on some of the samples, record.take(slice(0, None, 2)), and choose on the others, "
            "record.take(slice(1, None, 2)), or ask for no promise with confidence=None",
            share,
        )
    elif _used(record, record.selected_on):
        _refuse(
            "this network's exits or averages were selected on samples that would test the promise, or the record's "
            "score was fitted on them, and it then would not hold: give a record of other samples, or, after advise, "
            "the whole record of its validation samples in the same order, of which it left half alone; or ask for no "
            "promise with confidence=None",
            share,
        )


def _copies(record: ExitRecord) -> float:
    """The share of the samples that are copies, as far as the record can tell."""
    if record.sample_digests is not None:
        return repeated(record.sample_digests)
    assert record.scores is not None
    return repeated_rows(record.scores, record.losses)


def _used(record: ExitRecord, before: tuple[str, ...]) -> bool:
    """Whether a set whose sketch `before` holds, of inputs or of outputs, shares samples with those that test."""
    if not any(before):
        return False
    known = [record.inputs, None if record.outputs is None else digests(record.outputs)]
    _, calibration = halves(record.samples)
    return any(share_samples(one, found[calibration]) for one in before for found in known if found is not None)


def _refuse(why: str, copies: float) -> None:
    """Raises `InputError`, or warns where samples are often equal, so that equal ones may be different draws."""
    if copies < COPIED:
        raise InputError(why)
    warnings.warn(f"the record has few distinct samples; unless equal ones were drawn one by one, {why}", stacklevel=4)


def bound_of(problem: SearchProblem, limit: Limit, bound: str | None) -> str:
    """The bound asked for, or the sharper. Raises `InputError` for the binomial one on losses other than 0 and 1."""
    whole = bool(((problem.losses == 0) | (problem.losses == 1)).all())
    if bound == "binomial" and not whole:
        raise InputError("the binomial bound needs losses of 0 and 1; the record has others: take bound='betting'")
    return bound or ("binomial" if whole and not limit.signed else "betting")


def check_size(samples: int, limit: Limit, delta: float, bound: str) -> None:
    """Raises `InputError` where so many samples cannot carry a promise; names the smallest limit that they can."""
    needed = fewest(limit.risk, delta, bound)
    if len(halves(samples)[1]) >= needed:
        return
    carried = tightest(samples, delta, bound, absolute=limit.absolute)
    other = "" if carried is None else f"take {limit.name}={carried:g}, the tightest limit that so many can carry, "
    raise InputError(
        f"a promise of {limit} at {1 - delta:.0%} confidence by the {bound} bound needs at least "
        f"{2 * needed} samples, half of them to find candidates and half to test them; the record has {samples}, so "
        f"that none could leave early: {other}record more, or ask for no promise with confidence=None"
    )


_LIMITS = tuple(float(f"{digits}e-{power}") for power in range(6, 1, -1) for digits in range(10, 100))[:-49]
"""Limits that an error may name: two digits, up to 0.5, beyond which nobody promises anything."""


def tightest(samples: int, delta: float, bound: str, *, absolute: bool = False) -> float | None:
    """The smallest limit, in two digits, that so many samples can carry a promise of; None where they carry none.

    Args:
        samples: of the record, half of which test the promise.
        delta: 1 - confidence.
        bound: one of `guarantee.BOUNDS`.
        absolute: give the largest accuracy instead, 1 less such a limit.
    """
    size = len(halves(samples)[1])
    limits = [round(1 - limit, 8) for limit in _LIMITS] if absolute else _LIMITS
    enough = lambda limit: fewest(1 - limit if absolute else limit, delta, bound) <= size  # noqa: E731
    found = bisect.bisect_left(limits, True, key=enough)
    return limits[found] if found < len(limits) else None


def promised(
    problem: SearchProblem, limit: Limit, delta: float, bound: str, vectors: int
) -> tuple[Floats, tuple[int, int]]:
    """Thresholds `(N-1,)` that keep the limit with probability 1 - delta, and the sizes of both halves."""
    tuning_rows, calibration_rows = halves(len(problem.scores))
    sizes = len(tuning_rows), len(calibration_rows)
    check_size(len(problem.scores), limit, delta, bound)
    tuning, calibration = problem.take(tuning_rows), problem.take(calibration_rows)
    points = best_points(tuning, vectors)
    room = 2 * math.sqrt(sizes[0] * max(limit.risk, 0))  # the tuning half may be the unlucky one: two standard errors
    kept = np.nonzero(points.loss <= limit.allowed_loss(tuning.losses) + room)[0][::-1]  # dearest and surest first
    kept = kept[np.unique(np.linspace(0, len(kept) - 1, min(len(kept), _CANDIDATES)).astype(int))]
    candidates = [centred(tuning, points.thresholds[i]) for i in kept]
    never = np.full(problem.scores.shape[1] - 1, np.nan, np.float32)
    safe = not limit.absolute and limit.value >= 0  # never leaving early keeps the limit by itself
    # One candidate at a time: all of them at once would hold 128 numbers per sample.
    before, after = (map(partial(_differences, half, limit.absolute), candidates) for half in (tuning, calibration))
    standing = candidates[: fixed_sequence_test(before, after, limit.risk, delta, bound)]
    if not (safe or standing):
        reached = 1 - points.loss.min() / sizes[0]
        raise InfeasibleError(
            f"no thresholds keep {limit} at {1 - delta:.0%} confidence on {sizes[1]} calibration "
            f"samples; the most accurate reached {reached:.4f} on the {sizes[0]} others: record more samples, or lower "
            "the limit"
        )
    early = [not np.isnan(candidate).all() for candidate in candidates]
    if any(early) and not any(early[: len(standing)]):
        more = "record more samples, or allow more" if limit.value > 0 else "allow more than 0"
        warnings.warn(
            f"no thresholds keep {limit} at {1 - delta:.0%} confidence on {sizes[1]} calibration samples, so "
            f"that no sample leaves early: {more}",
            stacklevel=3,
        )
    if safe:
        standing = [never, *standing]
    return min(standing, key=lambda thresholds: _mean_us(problem, thresholds)), sizes


def _differences(problem: SearchProblem, absolute: bool, thresholds: Floats) -> Floats:
    """`(S,)` loss of the answer, less that of the last exit unless `absolute`."""
    answer = problem.losses[np.arange(len(problem.losses)), exit_positions(problem.scores, thresholds)]
    return answer if absolute else answer - problem.losses[:, -1]


def _mean_us(problem: SearchProblem, thresholds: Floats) -> float:
    counts = np.bincount(exit_positions(problem.scores, thresholds), minlength=problem.scores.shape[1])
    each = problem.cost.latency_us([*~np.isnan(thresholds), True])
    return float(mean_cost(counts.astype(np.float64), each, len(problem.scores)))
