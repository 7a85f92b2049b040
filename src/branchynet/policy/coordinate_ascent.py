"""Threshold vectors for any number of exits, by coordinate ascent.

Shape letters: S samples, N exits.
"""

import itertools

import numpy as np

from .exit_rule import exit_positions
from .search import SearchPoints, SearchProblem, around, best_of, cuts, join, mean_cost, sweep, thinned
from .values import Floats

CLIMBED = 30_000
"""Of more samples, so many are climbed on, drawn at random; what is found is then judged on all of them."""

_JUDGED = 64  # points of the climb that are judged on all samples
_SWEPT = 12  # of them, those from which one threshold at a time is swept over all samples


def ascend(problem: SearchProblem, prices: int = 24) -> SearchPoints:
    """A Pareto set for any number of exits: coordinate ascent of loss + price x time, for many prices and starts.

    Each step sets one threshold to its best value with the others held. All thresholds tried where no step helps
    enter the set, which fills the gaps between the prices. Not proven best: tests compare it with `grid`.
    """
    samples = len(problem.scores)
    if samples <= CLIMBED:
        return _climbed(problem, prices)
    drawn = np.sort(np.random.RandomState(0).permutation(samples)[:CLIMBED])
    rough = _climbed(problem.take(drawn), prices)
    points = _judged(problem, rough.thresholds[_spread(len(rough.loss), _JUDGED)]).pareto()
    most_accurate = _climb(problem, points.thresholds[-1], float(_prices(problem, prices)[0]))  # whether a limit is met
    starts = [*(points.thresholds[i] for i in _spread(len(points.loss), _SWEPT)), most_accurate]
    return best_of(itertools.chain([points], (around(problem, start) for start in starts)))


def _prices(problem: SearchProblem, prices: int) -> Floats:
    """What a microsecond may cost in summed loss, from almost nothing on."""
    latency = problem.cost.latency_us([True] * problem.cost.num_exits)
    return np.geomspace(1e-4, 10, prices) * len(problem.scores) / max(float(latency[-1] - latency[0]), 1e-9)


def _spread(count: int, most: int) -> np.ndarray:
    """At most so many of `count` places, evenly spread, both ends among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))


def _judged(problem: SearchProblem, thresholds: Floats) -> SearchPoints:
    """What each of the threshold vectors `(P, N-1)` does."""
    samples, exits = problem.scores.shape
    losses, us, counts = [], [], []
    for row in thresholds:
        position = exit_positions(problem.scores, row)
        counts.append(np.bincount(position, minlength=exits).astype(np.float64))
        losses.append(problem.losses[np.arange(samples), position].sum())
        us.append(mean_cost(counts[-1], problem.cost.latency_us([*~np.isnan(row), True]), samples))
    return SearchPoints(thresholds, np.array(losses), np.array(us), np.array(counts))


def _climbed(problem: SearchProblem, prices: int) -> SearchPoints:
    """The Pareto set of what climbs at many prices find."""
    never = np.full(problem.scores.shape[1] - 1, np.nan, np.float32)
    halves = [thinned(scores, cuts(scores), 2) for scores in problem.scores[:, :-1].T]
    middle = np.array([half[0] if len(half) else np.nan for half in halves], np.float32)
    found, seen, previous = [], set(), never
    for price in _prices(problem, prices):
        for start in (previous, never, middle):
            point = _climb(problem, start, float(price))
            if point.tobytes() not in seen:
                seen.add(point.tobytes())
                found.append(around(problem, point))
            previous = point
    return join(found).pareto()


def _climb(problem: SearchProblem, start: Floats, price: float) -> Floats:
    """The thresholds where no single change lowers loss + price x time, reached from `start`."""
    point, best = start, np.inf
    while True:
        before = best
        for n in range(len(point)):
            points = sweep(problem, point, n)
            value = points.loss + price * points.us
            i = int(value.argmin())
            if value[i] < best:
                point, best = points.thresholds[i], float(value[i])
        if not best < before - 1e-9:
            return point
