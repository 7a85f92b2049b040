"""Search threshold vectors for any number of exits by coordinate ascent.

Shape letters: S samples, N exits.
"""

import itertools

import numpy as np

from .search import SearchPoints, SearchProblem, around, best_of, cuts, evenly, join, points_at, sweep, thinned
from .values import Floats

CLIMBED = 30_000
"""Larger records are searched on a random sample of this size; its results are then evaluated on all samples."""

_EVALUATED = 64  # points found on the random sample that are evaluated on all samples
_SWEPT = 12  # of these, the points from which one threshold at a time is swept over all samples


def ascend(problem: SearchProblem, prices: int = 24) -> SearchPoints:
    """Return a Pareto set for any number of exits: minimize loss + price x time for many prices and starts.

    Each step sets one threshold to its best value, and keeps the others. The sweeps around the final points fill the
    gaps between the prices. The set need not be optimal; tests compare it with `grid`.
    """
    samples = len(problem.scores)
    if samples <= CLIMBED:
        return _climbed(problem, prices)
    drawn = np.sort(np.random.RandomState(0).permutation(samples)[:CLIMBED])
    rough = _climbed(problem.take(drawn), prices)
    points = points_at(problem, rough.thresholds[evenly(len(rough.loss), _EVALUATED)]).pareto()
    # The most accurate point decides whether a limit on accuracy can be met.
    most_accurate = _climb(problem, points.thresholds[-1], float(_prices(problem, prices)[0]))
    starts = [*(points.thresholds[i] for i in evenly(len(points.loss), _SWEPT)), most_accurate]
    return best_of(itertools.chain([points], (around(problem, start) for start in starts)))


def _prices(problem: SearchProblem, prices: int) -> Floats:
    """Return prices of a microsecond in summed loss, from almost 0 on."""
    latency = problem.cost.latency_us([True] * problem.cost.num_exits)
    return np.geomspace(1e-4, 10, prices) * len(problem.scores) / max(float(latency[-1] - latency[0]), 1e-9)


def _climbed(problem: SearchProblem, prices: int) -> SearchPoints:
    """Return the Pareto set of the points that climbs at many prices reach."""
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
    """Change one threshold at a time, from `start` on, until no change lowers loss + price x time."""
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
