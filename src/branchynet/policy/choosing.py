"""Choosing thresholds under one limit, with a promise that holds for other samples: choose.

Shape letters: S samples, N exits, P threshold vectors.
"""

import math
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..arguments import real, whole
from ..errors import InfeasibleError, InputError
from .digests import sketch
from .evaluation import best_points, centred, evaluate, policy_thresholds, problem_of
from .exit_record import ExitRecord, check_cost
from .explanation import why_never
from .limits import Limit, one_limit
from .promise import bound_of, check_samples, check_size, promised
from .record_scores import score_in_use
from .search import SearchPoints, SearchProblem, join, sweep
from .values import BOUNDS, Choice, ExitCost, Floats, Policy, Promise

if TYPE_CHECKING:
    from .scores import Score


def choose(
    record: ExitRecord,
    cost: ExitCost | None = None,
    *,
    max_drop: float | None = None,
    min_accuracy: float | None = None,
    max_disagreement: float | None = None,
    max_latency_us: float | None = None,
    max_macs: float | None = None,
    confidence: float | None = 0.95,
    bound: str | None = None,
    score: "str | Score | None" = None,
    vectors: int = 1_000_000,
) -> Choice:
    """The best thresholds under exactly one limit, searched as in `frontier`.

    The first three limits bound what leaving early may cost in accuracy, and the mean time is minimised; the other two
    bound the mean cost, and accuracy is maximised. Of equals the cheaper or the more accurate is taken.

    A limit on accuracy comes with a promise: with probability `confidence` over the draw of the record, the limit holds
    for the distribution that it was drawn from. Half of the record finds candidates and the other half tests them, in
    an order fixed beforehand, until one fails. Never leaving early always keeps ``max_drop`` and ``max_disagreement``,
    and is the answer where no candidate is sure enough. ``confidence=None`` asks for no promise: the limit then holds
    on the record itself, and on other data about half the time not.

    One record gives one promise. The best of several promised choices on one record keeps its promise less often: for
    the best of k take ``confidence=1 - 0.05 / k``.

    Choose on validation data, and report on other data.

    Args:
        record: S samples, N exits.
        cost: N stages. Without one, each trunk segment counts as 1 and branches as nothing: the mean exit is minimised.
        max_drop: accuracy at most this far below the last exit's, as a fraction (0.01 is one point).
        min_accuracy: accuracy at least this, between 0 and 1: that of a plain network, say.
        max_disagreement: another class than the last exit's for at most this share of the samples; needs outputs, and
            looks at no labels.
        max_latency_us: mean microseconds a sample at most this; needs `cost`.
        max_macs: mean multiply-accumulates a sample at most this; needs `cost`.
        confidence: of the promise, between 0 and 1, or None.
        bound: ``"betting"`` on the signed loss, which credits answers that leaving early put right, or ``"binomial"``,
            exact on the answers that it made wrong, for losses of 0 and 1. By default betting for ``max_drop``, and
            binomial for the other two, whose loss has no sign: each is the sharper there.
        score: a name in `branchynet.policy.record_scores`, or a callable; by default the one that `record` holds, or
            else entropy.
        vectors: how many combinations to search, as in `frontier`.

    Returns:
        The choice, with its promise, and its outcome on all of `record`. Where no sample leaves early, `reason` says
        why; ``print(choice)`` shows all of it.

    Raises:
        InputError: not exactly one limit, a limit or confidence out of range, no cost for a limit on cost, record and
            cost of different networks, too few samples for the promise (the message says how many it needs), a score or
            exits that were fitted to or selected on the samples that test the promise, or labels that are all of one
            class.
        InfeasibleError: no thresholds meet the limit; the message names the best that can be reached.

    Warns:
        UserWarning: under a promise, no thresholds are sure enough, so that no sample leaves early; or many samples
            stand in the record more than once; or ``max_drop`` or ``max_disagreement`` is so large that it may be
            meant in percent.

    Source: Teerapittayanon et al. 2016, section V-B (screening under an accuracy or a time constraint); the promise as
    in `branchynet.policy.risk_tests`.
    """
    limit = check_limit(
        confidence,
        bound,
        max_drop=max_drop,
        min_accuracy=min_accuracy,
        max_disagreement=max_disagreement,
        max_latency_us=max_latency_us,
        max_macs=max_macs,
    )
    _warn_of_percent(limit)
    vectors = whole("vectors", vectors, 1)
    confidence = None if confidence is None else real("confidence", confidence)
    check_cost(record, cost)
    score = score_in_use(record, score)
    problem = _what_is_searched(record, cost, score, limit)
    if limit.on_cost or confidence is None:
        best, promise = _within(problem, limit, vectors), None
    else:
        bound = bound_of(problem, limit, bound)
        check_samples(record, score)
        best, sizes = promised(problem, limit, 1 - confidence, bound, vectors)
        promise = Promise(limit.name, limit.value, confidence, bound, *sizes)
    policy = Policy(score, policy_thresholds(best))
    known = record.sample_digests
    choice = Choice(
        policy,
        {limit.name: limit.value},
        evaluate(record, policy, cost),
        record.digest,
        promise,
        record.network,
        samples="" if known is None else sketch(known),
    )
    return replace(choice, reason=why_never(record, cost, choice))


def nearest_to(
    record: ExitRecord, cost: ExitCost, accuracy: float, score: "str | Score" = "entropy"
) -> tuple[Choice, bool]:
    """The cheapest choice of that accuracy on the record, and True; else the most accurate one, and False.

    Without a promise: for comparisons at the accuracy of another network, which this one may not reach.
    """
    try:
        return choose(record, cost, score=score, min_accuracy=accuracy, confidence=None), True
    except InfeasibleError:
        longest = float(cost.latency_us([True] * cost.num_exits)[-1])
        return choose(record, cost, score=score, max_latency_us=longest), False


def _what_is_searched(record: ExitRecord, cost: ExitCost | None, score: "str | Score", limit: Limit) -> SearchProblem:
    """The record's scores, the losses and the costs that the limit is about."""
    if cost is None and limit.on_cost:
        raise InputError(
            f"{limit.name} needs a cost: measure one with measure(...), or give max_drop, min_accuracy or "
            "max_disagreement"
        )
    if record.labels is not None and not limit.without_labels and record.samples > 1:
        if (record.labels == record.labels[0]).all():
            raise InputError(
                f"all {record.samples} labels of the record are class {record.labels[0]}: choose on samples of all "
                "classes, in the proportions that the network will meet"
            )
    if limit.without_labels:
        if record.outputs is None:
            raise InputError("max_disagreement needs a record of outputs; this one holds scores and losses only")
        record = replace(record, labels=record.outputs[:, -1].argmax(axis=1), losses=None)
    cost = cost or ExitCost((1.0,) * record.num_exits, (0.0,) * record.num_exits)
    if limit.on_macs:
        if not any(cost.trunk_macs):
            raise InputError(
                "max_macs needs a cost with multiply-accumulates (trunk_macs, branch_macs); measure one, which has "
                "them where the size of every product is known"
            )
        cost = ExitCost(cost.trunk_macs, cost.branch_macs, network=cost.network)
    return problem_of(record, cost, score)


def _within(problem: SearchProblem, limit: Limit, vectors: int) -> Floats:
    """The best thresholds `(N-1,)` on the record itself."""
    most_loss, most_us = limit.allowed_loss(problem.losses), limit.allowed_cost
    points = best_points(problem, vectors)
    best = _pick(points, most_loss, most_us)
    if best is None:
        raise InfeasibleError(_unreachable(limit, points, len(problem.losses)))
    best = _refine(problem, best, most_loss, most_us)
    return centred(problem, best.thresholds[0])


def _pick(points: SearchPoints, most_loss: float, most_us: float) -> SearchPoints | None:
    """The best point within both limits, one of which is infinite: that one's figure is then minimised last."""
    within = np.nonzero((points.loss <= most_loss) & (points.us <= most_us))[0]
    if not len(within):
        return None
    loss, us = points.loss[within], points.us[within]
    order = np.lexsort((us, loss) if most_loss == math.inf else (loss, us))
    return points.take(within[order[:1]])


def _refine(problem: SearchProblem, best: SearchPoints, most_loss: float, most_us: float) -> SearchPoints:
    """Move one threshold at a time among all distinct scores, since the search may have seen only some of them."""
    moved = True
    while moved:
        moved = False
        for n in range(problem.scores.shape[1] - 1):
            found = _pick(join([best, sweep(problem, best.thresholds[0], n)]), most_loss, most_us)
            assert found is not None  # `best` is within the limits
            if not np.array_equal(found.thresholds, best.thresholds, equal_nan=True):
                best, moved = found, True
    return best


def check_call(
    record: ExitRecord,
    *,
    confidence: float | None = 0.95,
    bound: str | None = None,
    vectors: int = 1,
    **limits: float | None,
) -> bool:
    """Whether `choose` would promise something; raises what it would for these arguments, before costs are measured."""
    limit = check_limit(confidence, bound, **limits)
    if confidence is None or limit.on_cost:
        return False
    if record.labels is not None:
        bound = bound or ("betting" if limit.signed else "binomial")
        check_size(record.samples, limit, 1 - confidence, bound)
    return True


def check_limit(confidence: float | None, bound: str | None = None, **limits: float | None) -> Limit:
    """The one limit that was given. Raises `InputError` for any of these that is out of range."""
    confidence = None if confidence is None else real("confidence", confidence)
    if confidence is not None and not 0 < confidence < 1:
        raise InputError(f"confidence={confidence:g} must lie between 0 and 1, such as 0.95; or None for no promise")
    if bound not in (None, *BOUNDS):
        raise InputError(f"unknown bound {bound!r}; take one of {', '.join(BOUNDS)}, or None for the sharper")
    return one_limit(limits)


def _warn_of_percent(limit: Limit) -> None:
    if limit.suspicious:
        warnings.warn(
            f"{limit} allows {100 * limit.value:g} points: it is a fraction; for {limit.value:g} points give "
            f"{limit.value / 100:g}",
            stacklevel=3,
        )


def _unreachable(limit: Limit, points: SearchPoints, samples: int) -> str:
    best = int((points.us if limit.on_cost else points.loss).argmin())
    what = "the cheapest" if limit.on_cost else "the most accurate"
    unit = "multiply-accumulates" if limit.on_macs else "us"
    return (
        f"no thresholds meet {limit} on this record of {samples} samples; {what} are "
        f"{policy_thresholds(points.thresholds[best])}, with accuracy {1 - points.loss[best] / samples:.4f} at a mean "
        f"cost of {points.us[best]:.4g} {unit} a sample"
    )
