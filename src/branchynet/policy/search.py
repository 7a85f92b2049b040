"""Compute accuracy and cost of many threshold vectors at once, from cumulative counts of samples.

Shape letters: S samples, N exits, P threshold vectors, K candidate thresholds of one exit. A threshold of NaN means
*never* (None in a `Policy`): the branch of that exit is left out, with its cost.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .exit_cost import ExitCost
from .exit_rule import exit_positions
from .values import Floats, Ints

_FILLS = 16  # points from which one threshold at a time is swept
_ROUNDS = 100  # rounds of at most `vectors` combinations for an exact result with two thresholds


@dataclass(frozen=True, eq=False)
class SearchProblem:
    """The data of a search: scores `(S, N)` float32, losses `(S, N)`, and the cost of each exit."""

    scores: Floats
    losses: Floats
    cost: ExitCost

    def take(self, rows: Ints) -> "SearchProblem":
        """Return the problem restricted to the samples `rows`."""
        return SearchProblem(self.scores.T[:, rows].T, self.losses.T[:, rows].T, self.cost)

    @functools.cached_property
    def order(self) -> list[Ints]:
        """For each early exit, the samples from surest to least sure, without NaN and infinity, which never leave."""
        return [_surest_first(column) for column in self.scores[:, :-1].T]


def _surest_first(scores: Floats) -> Ints:
    """Return the positions of the scores `(S,)` below infinity in ascending order, in half the memory of int64."""
    order: Any = np.argsort(scores, kind="stable").astype(np.int32 if len(scores) < 2**31 else np.int64)
    return order[scores[order] < np.inf]


@dataclass(frozen=True, eq=False)
class SearchPoints:
    """Threshold vectors with their losses and costs.

    Attributes:
        thresholds: `(P, N-1)` float32, NaN for never.
        loss: `(P,)` summed loss.
        us: `(P,)` mean microseconds per sample.
        counts: `(P, N)` how many samples leave at each exit.
    """

    thresholds: Floats
    loss: Floats
    us: Floats
    counts: Floats

    def take(self, index: Ints) -> "SearchPoints":
        """Return the points at `index`, in that order."""
        return SearchPoints(self.thresholds[index], self.loss[index], self.us[index], self.counts[index])

    def pareto(self) -> "SearchPoints":
        """Return the Pareto set, cheapest first; of equal points it keeps the first."""
        order = np.lexsort((self.loss, self.us))
        loss = self.loss[order]
        better = np.ones(len(loss), bool)
        better[1:] = loss[1:] < np.minimum.accumulate(loss)[:-1]
        return self.take(order[better])


def join(points: list[SearchPoints]) -> SearchPoints:
    """Concatenate points."""
    names = ("thresholds", "loss", "us", "counts")
    return SearchPoints(*(np.concatenate([getattr(p, name) for p in points]) for name in names))


def best_of(sets: Iterable[SearchPoints]) -> SearchPoints:
    """Return the Pareto set of several sets, with one set at a time in memory; of equal points it keeps the first."""
    return functools.reduce(lambda found, points: join([found, points]).pareto(), sets).pareto()


def mean_cost(counts: Floats | Sequence[Floats], each: Floats, samples: int) -> Floats:
    """Return the mean cost if `counts` `(N, ...)` samples leave at exits with the costs `each` `(N,)`.

    The sum runs over the exits in order, so one vector and a million give the same bits, and a limit that the search
    meets is also met in `evaluate`.
    """
    return sum((count * cost for count, cost in zip(counts, each, strict=True)), np.zeros(())) / samples


def points_at(problem: SearchProblem, thresholds: Floats) -> SearchPoints:
    """Evaluate threshold vectors `(P, N-1)`."""
    samples, exits = problem.scores.shape
    losses, us, counts = [], [], []
    for row in thresholds:
        position = exit_positions(problem.scores, row)
        counts.append(np.bincount(position, minlength=exits).astype(np.float64))
        losses.append(problem.losses[np.arange(samples), position].sum())
        us.append(mean_cost(counts[-1], problem.cost.latency_us([*~np.isnan(row), True]), samples))
    return SearchPoints(thresholds, np.array(losses), np.array(us), np.array(counts))


def evenly(count: int, most: int) -> Ints:
    """Return at most `most` of `count` positions, evenly spaced, including the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))


def between(below: Floats, above: Floats) -> Floats:
    """Return float32 thresholds midway between neighbors: `below` is strictly less, and `above` is not."""
    middle = ((below.astype(np.float64) + above.astype(np.float64)) / 2).astype(np.float32)
    return np.where(middle > below, middle, above)  # the middle of adjacent floats may be rounded down


def beyond(top: Floats) -> Floats:
    """Return a threshold above every recorded score up to `top`, with a margin for rounding in an engine."""
    limit = np.finfo(np.float32)
    top = np.maximum(top, limit.min).astype(np.float64)
    return np.minimum(top + 1e-3 * np.maximum(np.abs(top), 1), limit.max).astype(np.float32)


def cuts(scores: Floats, harmed: np.ndarray | None = None) -> Floats:
    """Return candidate thresholds `(K,)` for one exit: between neighboring distinct scores `(S,)`, and above the last.

    `harmed` `(S,)` marks samples with a higher loss if they leave there. Given it, only thresholds remain that a looser
    one does not certainly beat: the last, and those just below a harmed sample.
    """
    finite = scores < np.inf
    values = np.unique(scores[finite])
    if not len(values):
        return np.empty(0, np.float32)
    thresholds = np.append(between(values[:-1], values[1:]), beyond(values[-1:]))
    if harmed is None:
        return thresholds
    kept = np.zeros(len(values), bool)
    kept[np.searchsorted(values, scores[finite & harmed])] = True
    return thresholds[np.append(kept[1:], True)]


def thinned(scores: Floats, thresholds: Floats, most: int) -> Floats:
    """Return at most `most` of the candidates, which divide both samples and candidates into about equal parts."""
    if len(thresholds) <= most:
        return thresholds
    samples = np.searchsorted(np.sort(scores), thresholds) / len(scores)
    position = samples / max(samples[-1], 1e-9) + np.arange(1, len(thresholds) + 1) / len(thresholds)
    return thresholds[np.unique(np.searchsorted(position / 2, np.arange(1, most + 1) / most - 1e-12))]


def grid(problem: SearchProblem, vectors: int) -> SearchPoints:
    """Return the Pareto set over all combinations of candidate thresholds, for every set of exits in use.

    A candidate is left out if a looser threshold is certainly better, that is, if more samples could leave without an
    increase in loss. The result is exact if the other candidates have at most `vectors` combinations, or a hundred
    times as many for two thresholds. With more, about `vectors` combinations are tried per set of exits, and sweeps
    over all distinct scores from points of the result fill the gaps.
    """
    early = problem.scores.shape[1] - 1
    found, exact = [], True
    for size in range(early + 1):  # fewest exits first: of equal points, the simplest is kept
        for used in itertools.combinations(range(early), size):
            candidates = _candidates(problem, used)
            count = math.prod(map(len, candidates))
            if count > vectors * (_ROUNDS if size <= 2 else 1):
                exact, room = False, vectors
                for k, i in enumerate(sorted(range(size), key=lambda i: len(candidates[i])), start=1):
                    most = max(2, int(room ** (1 / (size + 1 - k)) + 1e-9))
                    candidates[i] = thinned(problem.scores[:, used[i]], candidates[i], most)
                    room = max(1, room // len(candidates[i]))
            if all(map(len, candidates)):
                found.append(_in_parts(problem, used, candidates, vectors))
    points = join(found).pareto()
    if exact:
        return points
    filled = (around(problem, points.thresholds[i]) for i in evenly(len(points.loss), _FILLS))
    return best_of(itertools.chain([points], filled))


def _candidates(problem: SearchProblem, used: tuple[int, ...]) -> list[Floats]:
    """Return, for each exit in `used` (from 0), the thresholds that a looser one does not certainly beat.

    Leaving there never costs more than leaving later, and is less accurate only for samples with a smaller loss at a
    later exit in use.
    """
    later, found = problem.losses[:, -1], []
    for n in reversed(used):
        found.append(cuts(problem.scores[:, n], problem.losses[:, n] > later))
        later = np.minimum(later, problem.losses[:, n])
    return found[::-1]


def _in_parts(problem: SearchProblem, used: tuple[int, ...], candidates: list[Floats], vectors: int) -> SearchPoints:
    """Return the Pareto set of all combinations, with about `vectors` of them in memory at once."""
    if not used:
        return _combinations(problem, used, candidates)
    rows = max(1, vectors // math.prod(map(len, candidates[1:])))
    return best_of(
        _combinations(problem, used, [candidates[0][start : start + rows], *candidates[1:]])
        for start in range(0, len(candidates[0]), rows)
    )


def _combinations(problem: SearchProblem, used: tuple[int, ...], candidates: list[Floats]) -> SearchPoints:
    """Return the combinations of `candidates` that none dominates, for the early exits `used` (from 0)."""
    samples, exits = problem.scores.shape
    last = problem.losses[:, -1]
    # A sample in bin b leaves at the candidates with index >= b, and in bin K at none.
    bins = [np.searchsorted(c, problem.scores[:, n], side="right") for n, c in zip(used, candidates, strict=True)]
    loss = np.full((), last.sum())
    counts: list[Floats] = [np.zeros(())] * exits
    for i, n in enumerate(used):
        shape = tuple(len(c) + 1 for c in candidates[: i + 1])
        cell = np.ravel_multi_index(bins[: i + 1], shape)
        right = (slice(None),) * (i + 1) + (None,) * (len(used) - i - 1)
        counts[n] = _leaving(cell, None, shape)[right]
        loss = loss + _leaving(cell, problem.losses[:, n] - last, shape)[right]
    counts[-1] = samples - sum(counts[:-1], np.zeros(loss.shape))
    enabled = [n in used for n in range(exits - 1)]
    us = mean_cost(counts, problem.cost.latency_us([*enabled, True]), samples)
    index = np.nonzero(_not_dominated(loss).ravel())[0]
    where = np.unravel_index(index, loss.shape) if used else ()
    thresholds = np.full((len(index), exits - 1), np.nan, np.float32)
    for n, c, i in zip(used, candidates, where, strict=True):
        thresholds[:, n] = c[i]
    kept = np.stack([np.broadcast_to(c, loss.shape).ravel()[index] for c in counts], axis=1)
    return SearchPoints(thresholds, loss.ravel()[index], np.broadcast_to(us, loss.shape).ravel()[index], kept)


def _leaving(cell: Ints, weights: Floats | None, shape: tuple[int, ...]) -> Floats:
    """Sum `weights` (or count) over the samples that stay at all axes except the last and leave at the last."""
    total = np.bincount(cell, weights, minlength=int(np.prod(shape))).reshape(shape)
    total = np.cumsum(total, axis=-1)[..., :-1]
    for axis in range(len(shape) - 1):
        total = np.flip(np.cumsum(np.flip(total, axis), axis=axis), axis)
        total = total[(slice(None),) * axis + (slice(1, None),)]
    return total.astype(np.float64, copy=False)


def _not_dominated(loss: Floats) -> np.ndarray:
    """Mark the combinations with a smaller loss than all looser ones, which never cost more with the same exits."""
    if not loss.ndim:
        return np.ones((), bool)
    best = np.pad(loss, [(0, 1)] * loss.ndim, constant_values=np.inf)
    for axis in range(loss.ndim):
        best = np.flip(np.minimum.accumulate(np.flip(best, axis), axis=axis), axis)
    keep = np.ones(loss.shape, bool)
    for axis in range(loss.ndim):
        keep &= loss < best[tuple(slice(1, None) if a == axis else slice(None, -1) for a in range(loss.ndim))]
    return keep


def sweep(problem: SearchProblem, thresholds: Floats, n: int) -> SearchPoints:
    """Return the points with any threshold at the early exit n (from 0) that no looser one beats, and the others fixed.

    Leaving at n never costs more than leaving later. The first point has *never*.
    """
    samples, exits = problem.scores.shape
    never = thresholds.copy()
    never[n] = np.nan
    answering = exit_positions(problem.scores, never)
    answered = problem.losses[np.arange(samples), answering]
    first = np.bincount(answering, minlength=exits).astype(np.float64)
    base = answered.sum()

    order = problem.order[n]
    later = answering.take(order)
    reach = later > n
    order, later = order[reach], later[reach]  # samples that reach exit n
    scores = problem.scores[:, n].take(order)
    edge = np.nonzero(np.append(scores[:-1] < scores[1:], True))[0] if len(order) else np.empty(0, np.int64)
    loss = base + np.cumsum((problem.losses[:, n] - answered).take(order))[edge]
    kept = np.nonzero(loss <= np.append(np.minimum.accumulate(loss[::-1])[::-1][1:], np.inf))[0]
    edge, loss = edge[kept], loss[kept]

    table = np.tile(first, (len(edge) + 1, 1))
    table[1:, n] += edge + 1
    for m in range(n + 1, exits):
        if first[m]:
            table[1:, m] -= np.cumsum(later == m, dtype=order.dtype).take(edge)
    enabled = [*~np.isnan(never), True]
    alone = mean_cost(first, problem.cost.latency_us(enabled), samples)
    enabled[n] = True
    us = np.append(alone, mean_cost(table[1:].T, problem.cost.latency_us(enabled), samples))
    rows = np.tile(never, (len(edge) + 1, 1))
    if len(edge):
        above = scores.take(np.minimum(edge + 1, len(scores) - 1))
        rows[1:, n] = between(scores.take(edge), above)
        rows[-1, n] = beyond(scores[-1:])[0]  # no threshold is looser
    return SearchPoints(thresholds=rows, loss=np.append(base, loss), us=us, counts=table)


def around(problem: SearchProblem, point: Floats) -> SearchPoints:
    """Return the Pareto set of all vectors that differ from `point` in at most one threshold."""
    return best_of(sweep(problem, point, n) for n in range(len(point)))
