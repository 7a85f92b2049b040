"""Choose thresholds under one limit, with a promise that holds for other samples.

Shape letters: S samples, N exits, P threshold vectors.
"""

import math
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..argument_checks import whole
from ..errors import InfeasibleError, InputError
from .evaluation import best_points, centered, evaluate, policy_thresholds, problem_of
from .exit_cost import ExitCost
from .exit_record import ExitRecord, check_cost
from .explanation import warn_of_chance, why_never
from .limits import Limit, check_limit
from .promise import bound_of, check_samples, check_size, promised
from .record_scores import score_in_use
from .search import SearchPoints, SearchProblem, join, sweep
from .values import Choice, Floats, Policy, Promise

if TYPE_CHECKING:
    from .scores import Score

_LARGE = 0.2  # a user hardly ever means a larger drop in accuracy


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

    The first three limits bound the loss of accuracy, and `choose` minimizes the mean time. The other two bound the
    mean cost, and `choose` maximizes accuracy. Ties go to the cheaper or the more accurate policy. `choose` searches
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
        cost: N stages. By default each trunk segment costs 1 and branches cost nothing: the mean exit is minimized.
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
        UserWarning: no thresholds keep the promise, so that no sample leaves early; an exit is hardly more accurate
            than chance; many samples occur in the record more than once; or ``max_drop`` or ``max_disagreement`` is so
            large that it may be meant in percent.

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
    limit, confidence = check_limit(
        confidence,
        bound,
        max_drop=max_drop,
        min_accuracy=min_accuracy,
        max_disagreement=max_disagreement,
        max_latency_us=max_latency_us,
        max_macs=max_macs,
    )
    if not limit.on_cost and not limit.absolute and limit.value > _LARGE:
        points = f"{limit.value:g} points give {limit.value / 100:g}"
        warnings.warn(f"{limit} allows {100 * limit.value:g} points: it is a fraction; for {points}", stacklevel=2)
    vectors = whole("vectors", vectors, 1)
    check_cost(record, cost)
    score = score_in_use(record, score)
    warn_of_chance(record)
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
    if limit.without_labels:
        if record.outputs is None:
            raise InputError("max_disagreement needs a record of outputs; this one holds scores and losses only")
        record = replace(record, labels=record.outputs[:, -1].argmax(axis=1), losses=None)
    elif record.labels is not None and record.samples > 1 and (record.labels == record.labels[0]).all():
        raise InputError(
            f"all {record.samples} labels of the record are class {record.labels[0]}: choose on samples of all "
            "classes, in the proportions of the data that the network will process"
        )
    cost = cost or ExitCost((1.0,) * record.num_exits, (0.0,) * record.num_exits)
    if limit.name == "max_macs":
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
        what, values = ("the cheapest", points.us) if limit.on_cost else ("the most accurate", points.loss)
        unit, i = "multiply-accumulates" if limit.name == "max_macs" else "us", int(values.argmin())
        samples, thresholds = len(problem.losses), policy_thresholds(points.thresholds[i])
        raise InfeasibleError(
            f"no thresholds meet {limit} on this record of {samples} samples; {what} are {thresholds}, with accuracy "
            f"{1 - points.loss[i] / samples:.4f} at a mean cost of {points.us[i]:.4g} {unit} per sample"
            f"{limit.last_accuracy(problem.losses)}: {limit.remedy}"
        )
    return centered(problem, _refine(problem, best, most_loss, most_us).thresholds[0])


def _pick(points: SearchPoints, most_loss: float, most_us: float) -> SearchPoints | None:
    """Return the best point within both limits. One limit is infinite, and its quantity is minimized first."""
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
    record: ExitRecord, *, confidence: float | None = 0.95, bound: str | None = None, **limits: float | None
) -> bool:
    """Return whether `choose` gives a promise. Raises as `choose` does, before any cost is measured."""
    limit, confidence = check_limit(confidence, bound, **limits)
    if confidence is None or limit.on_cost:
        return False
    if record.labels is not None:
        bound = bound or ("betting" if limit.signed else "binomial")
        check_size(record.samples, limit, 1 - confidence, bound)
    return True
