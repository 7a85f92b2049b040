"""Choose thresholds under one limit, with a promise that holds for other samples.

Shape letters: S samples, N exits, P threshold vectors.
"""

import math
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..argument_checks import real, whole
from ..errors import InfeasibleError, InputError
from .evaluation import best_points, centred, evaluate, policy_thresholds, problem_of
from .exit_cost import ExitCost
from .exit_record import ExitRecord, check_cost
from .explanation import why_never
from .limits import Limit, one_limit
from .promise import bound_of, check_samples, check_size, promised
from .record_scores import score_in_use
from .search import SearchPoints, SearchProblem, join, sweep
from .values import BOUNDS, Choice, Floats, Policy, Promise

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
    """Choose the best thresholds under exactly one limit.

    The first three limits bound the loss of accuracy, and `choose` minimises the mean time. The other two bound the
    mean cost, and `choose` maximises accuracy. Ties go to the cheaper or the more accurate policy. `choose` searches
    in the same way as `frontier`.

    A limit on accuracy comes with a promise: with probability `confidence` over the draw of the record, the limit holds
    for the distribution of the record. One half of the record finds candidates; the other half tests them, in an order
    fixed beforehand, until one fails. If no candidate passes, no sample leaves early, which always keeps ``max_drop``
    and ``max_disagreement``. With ``confidence=None`` there is no promise: the limit holds on the record, and fails on
    other data about half of the time.

    One record gives one promise. If you take the best of k promised choices on one record, set
    ``confidence=1 - 0.05 / k``. Choose on validation data, and report results on other data.

    Args:
        record: S samples, N exits.
        cost: N stages. By default each trunk segment costs 1 and branches cost nothing: the mean exit is minimised.
        max_drop: maximum drop in accuracy from the last exit, as a fraction (0.01 is one point).
        min_accuracy: minimum accuracy, between 0 and 1, such as that of a plain network.
        max_disagreement: maximum share of samples with another class than that of the last exit. Needs outputs, and
            reads no labels.
        max_latency_us: maximum mean microseconds per sample; needs `cost`.
        max_macs: maximum mean multiply-accumulates per sample; needs `cost`.
        confidence: of the promise, between 0 and 1, or None.
        bound: ``"betting"`` tests the signed loss, which credits answers that leaving early corrects.
            ``"binomial"`` is an exact test of the answers that leaving early makes wrong, for losses of 0 and 1. The
            default is the sharper one: betting for ``max_drop``, binomial for the other two limits.
        score: a name in `branchynet.policy.scores`, a fitted score, or a callable; by default the score that `record`
            holds, or entropy.
        vectors: how many combinations to search, as in `frontier`.

    Returns:
        The choice, with its promise and its outcome on all of `record`. If no sample leaves early, `reason` says why.

    Raises:
        InputError: not exactly one limit, a limit or confidence out of range, no cost for a limit on cost, a record and
            a cost of different networks, too few samples for the promise (the message names the number needed), a score
            or exits that were fitted or selected on the samples that test the promise, or labels that are all of one
            class.
        InfeasibleError: no thresholds meet the limit; the message names the best value that can be reached.

    Warns:
        UserWarning: no thresholds keep the promise, so that no sample leaves early; many samples occur in the record
            more than once; or ``max_drop`` or ``max_disagreement`` is so large that it may be meant in percent.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> scores = rng.random((2000, 2))  # 2,000 samples, 2 exits; a smaller score is surer
        >>> losses = np.stack([scores[:, 0] > 0.9, np.zeros(2000)], axis=1)  # exit 1 is wrong if its score is above 0.9
        >>> choice = choose(ExitRecord.from_scores(scores, losses, "entropy"), max_drop=0.02)
        >>> choice.outcome.exit_share[0] > 0.8
        True

    Source: Teerapittayanon et al. 2016, section V-B (screening under an accuracy or a time constraint).
    `branchynet.policy.risk_tests` explains the promise.
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
    problem = _problem_under(limit, record, cost, score)
    if limit.on_cost or confidence is None:
        best, promise = _within(problem, limit, vectors), None
    else:
        bound = bound_of(problem, limit, bound)
        check_samples(record, score)
        best, sizes = promised(problem, limit, 1 - confidence, bound, vectors)
        promise = Promise(limit.name, limit.value, confidence, bound, *sizes)
    policy = Policy(score, policy_thresholds(best))
    choice = Choice(
        policy,
        {limit.name: limit.value},
        evaluate(record, policy, cost),
        record.digest,
        promise,
        record.network,
        samples=record.sketch,
    )
    return replace(choice, reason=why_never(record, cost, choice))


def nearest_to(
    record: ExitRecord, cost: ExitCost, accuracy: float, score: "str | Score" = "entropy"
) -> tuple[Choice, bool]:
    """Return the cheapest choice of that accuracy on the record and True, or the most accurate choice and False.

    The choice has no promise. Use it to compare with another network, whose accuracy this one may not reach.
    """
    try:
        return choose(record, cost, score=score, min_accuracy=accuracy, confidence=None), True
    except InfeasibleError:
        longest = float(cost.latency_us([True] * cost.num_exits)[-1])
        return choose(record, cost, score=score, max_latency_us=longest), False


def _problem_under(limit: Limit, record: ExitRecord, cost: ExitCost | None, score: "str | Score") -> SearchProblem:
    """Return the search problem with the losses and costs that the limit bounds."""
    if cost is None and limit.on_cost:
        raise InputError(
            f"{limit.name} needs a cost: measure one with measure(...), or give max_drop, min_accuracy or "
            "max_disagreement"
        )
    if record.labels is not None and not limit.without_labels and record.samples > 1:
        if (record.labels == record.labels[0]).all():
            raise InputError(
                f"all {record.samples} labels of the record are class {record.labels[0]}: choose on samples of all "
                "classes, in the proportions of the data that the network will process"
            )
    if limit.without_labels:
        if record.outputs is None:
            raise InputError("max_disagreement needs a record of outputs; this one holds scores and losses only")
        record = replace(record, labels=record.outputs[:, -1].argmax(axis=1), losses=None)
    cost = cost or ExitCost((1.0,) * record.num_exits, (0.0,) * record.num_exits)
    if limit.on_macs:
        if not any(cost.trunk_macs):
            raise InputError(
                "max_macs needs a cost with multiply-accumulates (trunk_macs, branch_macs): measure(...) counts them "
                "if the size of every product is known"
            )
        cost = ExitCost(cost.trunk_macs, cost.branch_macs, network=cost.network)
    return problem_of(record, cost, score)


def _within(problem: SearchProblem, limit: Limit, vectors: int) -> Floats:
    """Return the best thresholds `(N-1,)` on the record itself."""
    most_loss, most_us = limit.allowed_loss(problem.losses), limit.allowed_cost
    points = best_points(problem, vectors)
    best = _pick(points, most_loss, most_us)
    if best is None:
        raise InfeasibleError(_unreachable(limit, points, len(problem.losses)))
    best = _refine(problem, best, most_loss, most_us)
    return centred(problem, best.thresholds[0])


def _pick(points: SearchPoints, most_loss: float, most_us: float) -> SearchPoints | None:
    """Return the best point within both limits. One limit is infinite, and its quantity is minimised first."""
    within = np.nonzero((points.loss <= most_loss) & (points.us <= most_us))[0]
    if not len(within):
        return None
    loss, us = points.loss[within], points.us[within]
    order = np.lexsort((us, loss) if most_loss == math.inf else (loss, us))
    return points.take(within[order[:1]])


def _refine(problem: SearchProblem, best: SearchPoints, most_loss: float, most_us: float) -> SearchPoints:
    """Move one threshold at a time among all distinct scores, because the search may have used only some of them."""
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
    """Return whether `choose` gives a promise. Raises as `choose` does, before any cost is measured."""
    limit = check_limit(confidence, bound, **limits)
    if confidence is None or limit.on_cost:
        return False
    if record.labels is not None:
        bound = bound or ("betting" if limit.signed else "binomial")
        check_size(record.samples, limit, 1 - confidence, bound)
    return True


def check_limit(confidence: float | None, bound: str | None = None, **limits: float | None) -> Limit:
    """Return the one limit that was given. Raises `InputError` for any argument that is out of range."""
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
        f"cost of {points.us[best]:.4g} {unit} per sample"
    )
