"""Evaluate thresholds from recorded outputs and measured costs.

Thresholds are rounded to float32 as in the deployed network, so both route recorded samples to the same exits.
Shape letters: S samples, N exits, P policies.
"""

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..argument_checks import instance, whole
from ..errors import InputError
from .coordinate_ascent import ascend
from .exit_cost import ExitCost
from .exit_record import ExitRecord, check_cost, check_same_network
from .exit_rule import exit_positions, route
from .fitted_scores import samples_fitted_on
from .record_scores import score_in_use, scores_of_record
from .sample_digests import share_samples
from .search import SearchPoints, SearchProblem, between, beyond, grid, mean_cost
from .values import Z95, Choice, Floats, Ints, Outcome, Policy

if TYPE_CHECKING:
    from .scores import Score

GRID_EXITS = 3
"""For at most this many thresholds, all combinations are searched; for more, coordinate ascent is used."""


def first_correct(losses: Floats) -> Ints:
    """Return the position `(S,)` of the first exit that is right, from losses `(S, N)`; the last exit if none is."""
    right = losses < 0.5
    right[:, -1] = True
    return right.argmax(axis=1).astype(np.int64)


def evaluate(record: ExitRecord, policy: Policy | Choice, cost: ExitCost | None = None) -> Outcome:
    """Compute the accuracy of `policy` on `record`, the share of samples per exit and, given `cost`, time and MACs.

    Leaving at exit n costs the trunk and the branches in use up to n; a branch with the threshold None costs nothing.
    The interval of the accuracy is Wilson's 95% interval. It is conservative for losses between 0 and 1, because they
    vary at most as much as a 0/1 loss with the same mean.

    Args:
        record: S samples, N exits.
        policy: a score and N-1 thresholds, or a `Choice`. A choice on `record` itself is optimistic, and warned of.
        cost: N stages, or None to leave the costs out.

    Returns:
        The outcome; `p95_us` and `worst_us` are over the samples of the record.

    Raises:
        InputError: record, policy and cost have different numbers of exits, or are of different networks.

    Example:
        >>> record = ExitRecord.from_scores(scores=[[0.1, 0.0], [0.9, 0.0]], losses=[[0, 0], [1, 0]], score="entropy")
        >>> outcome = evaluate(record, Policy("entropy", (0.5,)), ExitCost((10.0, 30.0), (5.0, 0.0)))
        >>> outcome.accuracy, outcome.exit_share, outcome.mean_us
        (1.0, (0.5, 0.5), 30.0)

    Source: Teerapittayanon et al. 2016, Figure 2; interval: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    check_cost(record, cost)
    policy = policy_for(record, policy, "so its results are optimistic: report those of another record")
    position = route(scores_of_record(record, policy.score), policy.thresholds) - 1
    loss = record.losses[np.arange(record.samples), position].astype(np.float64)
    counts = np.bincount(position, minlength=record.num_exits).astype(np.float64)
    wrong = np.bincount(position, loss, minlength=record.num_exits)
    accuracy = float(1 - loss.sum() / record.samples)
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
        last_accuracy=float(1 - record.losses[:, -1].sum(dtype=np.float64) / record.samples),
        exit_share=tuple(float(c) / record.samples for c in counts),
        exit_accuracy=tuple(float(1 - w / c) if c else None for w, c in zip(wrong, counts, strict=True)),
        **costs,
    )


def policy_for(record: ExitRecord, policy: Policy | Choice, consequence: str = "") -> Policy:
    """Return the policy, or that of a choice.

    With a `consequence`, it warns of it if the thresholds were chosen, or the score was fitted, on samples of `record`.

    Raises:
        InputError: neither, or one of another network or number of exits than the record's.
    """
    if isinstance(policy, Choice):
        check_same_network("the record and the choice", record.network, policy.network)
        used = [policy.samples, samples_fitted_on(policy.policy.score)]
        found = record.sample_digests if any(used) else None
        shared = found is not None and any(share_samples(one, found) for one in used)
        if consequence and (shared or policy.record_digest == record.digest):
            warnings.warn(f"these thresholds were chosen on this record, {consequence}", stacklevel=3)
        policy = policy.policy
    instance("policy", policy, Policy, "give Policy(thresholds=(...)), or what choose(...) returns")
    if policy.num_exits != record.num_exits:
        raise InputError(
            f"the policy has {len(policy.thresholds)} thresholds, but a record of {record.num_exits} exits needs "
            f"{record.num_exits - 1}, one per exit except the last: give None for an exit that you do not use, or the "
            "record of the network that the policy was chosen for"
        )
    return policy


@dataclass(frozen=True, eq=False)
class Frontier:
    """The Pareto set of threshold vectors for accuracy and mean time, cheapest and least accurate first.

    Attributes:
        thresholds: `(P, N-1)` float32, NaN for never.
        accuracy: `(P,)` float64, 1 - mean loss.
        mean_us: `(P,)` float64, microseconds per sample.
        share: `(P, N)` float64, share of the samples that leave at each exit.
        score: the score that is compared with the thresholds.
    """

    thresholds: Floats
    accuracy: Floats
    mean_us: Floats
    share: Floats
    score: "str | Score" = "entropy"

    def __len__(self) -> int:
        """P, the number of policies."""
        return len(self.accuracy)

    @property
    def knee(self) -> int:
        """The position from which accuracy costs much time: the farthest above the chord between both ends.

        Time and accuracy are scaled to [0, 1] (Satopaa et al. 2011, Finding a "Kneedle" in a Haystack).
        """
        us, accuracy = (np.ptp(v) or 1.0 for v in (self.mean_us, self.accuracy))
        return int(((self.accuracy - self.accuracy[0]) / accuracy - (self.mean_us - self.mean_us[0]) / us).argmax())

    def policy(self, index: int) -> Policy:
        """Return the policy at position `index`. Raises `InputError` if there is none."""
        index = whole("index", index, -len(self), len(self) - 1)
        return Policy(self.score, policy_thresholds(self.thresholds[index]))


def frontier(
    record: ExitRecord, cost: ExitCost, score: "str | Score | None" = None, *, vectors: int = 1_000_000
) -> Frontier:
    """Compute the best accuracy on `record` for every mean time that thresholds can give.

    Candidate thresholds lie midway between neighboring recorded scores; *never* removes an exit and its cost. For one
    threshold the result is exact. For two or three it is exact if at most `vectors` combinations remain (for two, a
    hundred times as many) without those that a looser one certainly beats. Otherwise it comes from a grid of about
    `vectors` combinations, and exact sweeps of one threshold at a time. More thresholds are searched by coordinate
    ascent from several starts.

    Args:
        record: S samples, N exits.
        cost: N stages.
        score: a name in `branchynet.policy.scores`, a fitted score, or a callable; by default the score that `record`
            holds, or entropy.
        vectors: how many combinations to search per set of exits in use; 1,000,000 take about 0.1 s and 50 MB.

    Returns:
        The Pareto set on this record. It is optimistic for other data, more so for a smaller record.

    Raises:
        InputError: record and cost are of different networks, or the score is unknown or not that of the record.

    Example:
        >>> record = ExitRecord.from_scores(scores=[[0.1, 0.0], [0.9, 0.0]], losses=[[0, 0], [1, 0]], score="entropy")
        >>> curve = frontier(record, ExitCost((10.0, 30.0), (5.0, 0.0)))
        >>> curve.accuracy, curve.mean_us  # all leave at exit 1, or only the surer sample
        (array([0.5, 1. ]), array([15., 30.]))
    """
    instance("cost", cost, ExitCost, "give what measure(...) returns")
    check_cost(record, cost)
    vectors = whole("vectors", vectors, 1)
    score = score_in_use(record, score)
    points = best_points(problem_of(record, cost, score), vectors)
    return Frontier(
        thresholds=points.thresholds,
        accuracy=1 - points.loss / record.samples,
        mean_us=points.us,
        share=points.counts / record.samples,
        score=score,
    )


def wilson(share: float, samples: int) -> tuple[float, float]:
    """Return Wilson's 95% interval for a `share` observed in `samples` samples."""
    spread = Z95**2 / samples
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def best_points(problem: SearchProblem, vectors: int) -> SearchPoints:
    """Return the Pareto set, over all combinations for up to `GRID_EXITS` thresholds, else by coordinate ascent."""
    return grid(problem, vectors) if problem.scores.shape[1] - 1 <= GRID_EXITS else ascend(problem)


def problem_of(record: ExitRecord, cost: ExitCost, score: "str | Score") -> SearchProblem:
    """Return the search problem of a record, for a cost of the same network."""
    scores = np.asfortranarray(scores_of_record(record, score))  # the search reads columns
    return SearchProblem(scores, record.losses.astype(np.float64, order="F"), cost)


def centered(problem: SearchProblem, thresholds: Floats) -> Floats:
    """Move thresholds midway between the neighboring scores at each exit, which keeps every sample's exit.

    An exit at which no sample leaves is disabled, and its branch costs nothing.
    """
    position = exit_positions(problem.scores, thresholds)
    moved = thresholds.copy()
    for n in np.nonzero(~np.isnan(thresholds))[0]:
        scores, leave = problem.scores[:, n], position == n
        if not leave.any():
            moved[n] = np.nan
            continue
        below = np.where(leave, scores, np.float32(-np.inf)).max(keepdims=True)
        above = np.fmin.reduce(np.where(position > n, scores, np.float32(np.inf)), keepdims=True)  # NaN never leaves
        moved[n] = (between(below, above) if above < np.inf else beyond(below))[0]
    return moved


def policy_thresholds(thresholds: Floats) -> tuple[float | None, ...]:
    """Return thresholds for a `Policy` from an array with NaN for never."""
    return tuple(None if np.isnan(t) else float(t) for t in thresholds)
