"""Judging and choosing thresholds, on recorded outputs and measured costs alone: evaluate, frontier, choose.

A threshold acts as the float32 number that the deployed network compares with, so a policy routes the recorded samples
there as it does here. Shape letters: S samples, N exits, P policies.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import InfeasibleError, InputError
from .scores import Score, of_choice, of_record
from .search import Points, Problem, ascend, between, beyond, grid, join, leaving, mean_cost, sweep
from .types import Choice, ExitCost, ExitRecord, Floats, Ints, Outcome, Policy

GRID_EXITS = 3
"""Up to so many thresholds all combinations are searched; beyond, coordinate ascent."""

SLACK = 1e-9
"""Limits count as met to within this much, so that a limit written as a decimal means what it says."""

_Z95 = 1.959963984540054


def route(scores: Floats, thresholds: Sequence[float | None]) -> Ints:
    """The exit that answers each sample: the first whose score is strictly below its threshold, else the last.

    Args:
        scores: `(S, N)`, smaller = surer. The last exit's are not looked at; NaN never leaves early.
        thresholds: N-1 of them, taken as float32; None means never.

    Returns:
        `(S,)` int64 exits, from 1.

    Raises:
        InputError: the number of thresholds is not N-1.

    Source: Teerapittayanon et al. 2016, Figure 2.
    """
    scores = np.asarray(scores, np.float32)
    if scores.ndim != 2 or len(thresholds) != scores.shape[1] - 1:
        raise InputError(
            f"{len(thresholds)} thresholds need scores of shape (S, {len(thresholds) + 1}), one column an exit; "
            f"got {scores.shape}"
        )
    return leaving(scores, _float32(thresholds)) + 1


def evaluate(record: ExitRecord, policy: Policy, cost: ExitCost | None = None) -> Outcome:
    """What `policy` does on `record`: accuracy, who leaves where and, given `cost`, time and MACs.

    Leaving at exit n costs the trunk up to n and the branches in use up to n; a branch whose threshold is None costs
    nothing. The accuracy's interval is Wilson's, at 95 %; for losses between 0 and 1 it is conservative, since none
    varies more than a 0/1 loss of the same mean.

    Args:
        record: S samples, N exits.
        policy: a score and N-1 thresholds.
        cost: N stages, or None to leave the costs out.

    Returns:
        The outcome; `p95_us` and `worst_us` are over the samples of the record.

    Raises:
        InputError: record, policy and cost are not for one number of exits.

    Source: Teerapittayanon et al. 2016, Figure 2; interval: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    _same_exits(record, cost)
    if policy.exits != record.exits:
        raise InputError(
            f"the policy has {len(policy.thresholds)} thresholds, but a record of {record.exits} exits needs "
            f"{record.exits - 1}, one an exit but the last: give None for an exit that is not to be used"
        )
    position = route(of_record(record, policy.score), policy.thresholds) - 1
    losses = record.losses.astype(np.float64)
    loss = losses[np.arange(record.samples), position]
    counts = np.bincount(position, minlength=record.exits).astype(np.float64)
    wrong = np.bincount(position, loss, minlength=record.exits)
    accuracy = _accuracy(loss.sum(), record.samples)
    costs = {}
    if cost is not None:
        us, macs = cost.latency_us(policy.enabled), cost.macs(policy.enabled)
        costs = {
            "mean_us": float(mean_cost(counts, us, record.samples)),
            "p95_us": float(np.quantile(us[position], 0.95, method="inverted_cdf")),
            "worst_us": float(us[position].max()),
            "mean_macs": float(mean_cost(counts, macs, record.samples)),
        }
    return Outcome(
        samples=record.samples,
        accuracy=accuracy,
        accuracy_interval=wilson(accuracy, record.samples),
        last_accuracy=_accuracy(losses[:, -1].sum(), record.samples),
        exit_share=tuple(float(c) / record.samples for c in counts),
        exit_accuracy=tuple(_accuracy(w, c) if c else None for w, c in zip(wrong, counts, strict=True)),
        **costs,
    )


@dataclass(frozen=True, eq=False)
class Frontier:
    """The threshold vectors that no other beats in both accuracy and mean time, cheapest and least accurate first.

    Attributes:
        thresholds: `(P, N-1)` float32, NaN for never.
        accuracy: `(P,)` float64, 1 - mean loss.
        mean_us: `(P,)` float64, microseconds a sample.
        share: `(P, N)` float64, share of the samples that leave at each exit.
        score: what the thresholds are compared with.
    """

    thresholds: Floats
    accuracy: Floats
    mean_us: Floats
    share: Floats
    score: str | Score = "entropy"

    def __len__(self) -> int:
        """P, the number of policies."""
        return len(self.accuracy)

    def policy(self, index: int) -> Policy:
        """The policy at position `index`."""
        return Policy(self.score, _optional(self.thresholds[index]))


def frontier(
    record: ExitRecord, cost: ExitCost, score: str | Score | None = None, *, vectors: int = 1_000_000
) -> Frontier:
    """The best accuracy for every mean time that thresholds can give on `record`.

    Thresholds lie midway between neighbouring recorded scores, and *never*, which removes an exit and its cost, is one
    of them. One threshold: exact. Two or three: exact while the combinations of all distinct scores are at most
    `vectors`, else on a grid of the scores' quantiles of about that size, then exact along one threshold at a time.
    More: coordinate ascent from several starts.

    Args:
        record: S samples, N exits.
        cost: N stages.
        score: a name in `branchynet.scores`, or a callable; by default the one that `record` holds, or else entropy.
        vectors: how many combinations to search for each set of exits in use; 1,000,000 take about 0.1 s and 50 MB.

    Returns:
        The Pareto set on this record: optimistic for other data, the more so the smaller the record.

    Raises:
        InputError: record and cost are not for one number of exits, or the score is unknown or not the record's.
    """
    score = of_choice(record, score)
    points = _search(_problem(record, cost, score), vectors)
    return Frontier(
        thresholds=points.thresholds,
        accuracy=1 - points.loss / record.samples,
        mean_us=points.us,
        share=points.counts / record.samples,
        score=score,
    )


def choose(
    record: ExitRecord,
    cost: ExitCost | None = None,
    *,
    max_drop: float | None = None,
    min_accuracy: float | None = None,
    max_latency_us: float | None = None,
    score: str | Score | None = None,
    vectors: int = 1_000_000,
) -> Choice:
    """The best thresholds under exactly one limit, searched as in `frontier`.

    The first two limits minimise the mean time, and of equals take the more accurate; the third maximises accuracy,
    and of equals takes the cheaper. Choose on validation data and report on other data.

    Args:
        record: S samples, N exits.
        cost: N stages. Without one, each trunk segment counts as 1 and branches as nothing: the mean exit is minimised.
        max_drop: accuracy at most this far below the last exit's, as a fraction (0.01 is one point).
        min_accuracy: accuracy at least this, between 0 and 1.
        max_latency_us: mean microseconds a sample at most this; needs `cost`.
        score: a name in `branchynet.scores`, or a callable; by default the one that `record` holds, or else entropy.
        vectors: how many combinations to search, as in `frontier`.

    Returns:
        The choice, with its outcome on `record`.

    Raises:
        InputError: not exactly one limit, a limit out of range, no cost for `max_latency_us`, unequal numbers of exits.
        InfeasibleError: no thresholds meet the limit; the message names the best that can be reached.

    Source: Teerapittayanon et al. 2016, section V-B (screening under an accuracy or a time constraint).
    """
    constraint = _constraint(max_drop=max_drop, min_accuracy=min_accuracy, max_latency_us=max_latency_us)
    if max_latency_us is not None and cost is None:
        raise InputError("max_latency_us needs a cost: measure one with measure(...), or give max_drop or min_accuracy")
    score = of_choice(record, score)
    problem = _problem(record, cost or ExitCost((1.0,) * record.exits, (0.0,) * record.exits), score)
    most_loss, most_us = math.inf, math.inf
    if max_latency_us is not None:
        most_us = max_latency_us * (1 + SLACK)
    elif min_accuracy is not None:
        most_loss = (1 - min_accuracy + SLACK) * record.samples
    elif max_drop is not None:
        most_loss = problem.losses[:, -1].sum() + (max_drop + SLACK) * record.samples

    points = _search(problem, vectors)
    best = _pick(points, most_loss, most_us)
    if best is None:
        raise InfeasibleError(_unreachable(constraint, points, record.samples))
    best = _refine(problem, best, most_loss, most_us)
    policy = Policy(score, _optional(_centred(problem, best.thresholds[0])))
    return Choice(policy, constraint, evaluate(record, policy, cost), record.digest)


def wilson(share: float, samples: int) -> tuple[float, float]:
    """Wilson's 95 % interval for a `share` seen in so many `samples`."""
    spread = _Z95**2 / samples
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def _search(problem: Problem, vectors: int) -> Points:
    return grid(problem, vectors) if problem.scores.shape[1] - 1 <= GRID_EXITS else ascend(problem)


def _pick(points: Points, most_loss: float, most_us: float) -> Points | None:
    """The best point within both limits, one of which is infinite: that one's figure is then minimised last."""
    within = np.nonzero((points.loss <= most_loss) & (points.us <= most_us))[0]
    if not len(within):
        return None
    loss, us = points.loss[within], points.us[within]
    order = np.lexsort((us, loss) if most_loss == math.inf else (loss, us))
    return points.take(within[order[:1]])


def _refine(problem: Problem, best: Points, most_loss: float, most_us: float) -> Points:
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


def _centred(problem: Problem, thresholds: Floats) -> Floats:
    """The thresholds moved midway between the scores of those samples that reach each exit: same routes, more room."""
    position = leaving(problem.scores, thresholds)
    centred = thresholds.copy()
    for n in np.nonzero(~np.isnan(thresholds))[0]:
        leaves, stays = problem.scores[position == n, n], problem.scores[position > n, n]
        stays = stays[stays < np.inf]
        if len(leaves) and len(stays):
            centred[n] = between(leaves.max(keepdims=True), stays.min(keepdims=True))[0]
        elif len(leaves):
            centred[n] = beyond(leaves.max(keepdims=True))[0]
    return centred


def _problem(record: ExitRecord, cost: ExitCost, score: str | Score) -> Problem:
    _same_exits(record, cost)
    return Problem(of_record(record, score), record.losses.astype(np.float64), cost)


def _same_exits(record: ExitRecord, cost: ExitCost | None) -> None:
    if cost is not None and cost.exits != record.exits:
        raise InputError(
            f"the cost has {cost.exits} exits, but the record has {record.exits}: measure the network that was recorded"
        )


def _constraint(**limits: float | None) -> dict[str, float]:
    """The one limit that was given, checked."""
    given = {name: float(limit) for name, limit in limits.items() if limit is not None}
    if len(given) != 1:
        shown = " and ".join(f"{name}={limit:g}" for name, limit in given.items()) or "none"
        raise InputError(f"give exactly one of {', '.join(limits)}; got {shown}")
    name, limit = next(iter(given.items()))
    if not math.isfinite(limit):
        raise InputError(f"{name}={limit:g} is not a finite number")
    if name != "max_latency_us" and not -1 <= limit <= 1:
        raise InputError(f"{name}={limit:g} is out of range: it is a fraction, such as 0.01 for one point")
    return given


def _unreachable(constraint: dict[str, float], points: Points, samples: int) -> str:
    name, limit = next(iter(constraint.items()))
    best = int((points.us if name == "max_latency_us" else points.loss).argmin())
    what = "the cheapest" if name == "max_latency_us" else "the most accurate"
    return (
        f"no thresholds meet {name}={limit:g} on this record of {samples} samples; {what} are "
        f"{_optional(points.thresholds[best])}, with accuracy {1 - points.loss[best] / samples:.4f} at a mean cost of "
        f"{points.us[best]:.4g} us a sample"
    )


def _accuracy(loss: float, samples: int) -> float:
    return 1 - float(loss) / int(samples)


def _float32(thresholds: Sequence[float | None]) -> Floats:
    with np.errstate(over="ignore"):  # a threshold beyond float32 is infinite there too
        return np.array([np.nan if t is None else t for t in thresholds], np.float64).astype(np.float32)


def _optional(thresholds: Floats) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(t) else float(t) for t in thresholds)
