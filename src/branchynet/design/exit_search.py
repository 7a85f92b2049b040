"""Which exits together take the least time, among very many candidates.

Shape letters: S samples, K candidates, N exits of a design.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import counted
from ..policy.evaluation import best_points, policy_thresholds
from ..policy.exit_rule import route
from ..policy.limits import SLACK
from ..policy.risk_tests import halves
from ..policy.search import SearchProblem
from ..policy.values import ExitCost, Floats, Ints

_BEAM = 16  # designs that are carried on with one exit more
_COARSE = 10_000  # threshold vectors tried for a design while designs are compared; a hundred times as many for two
_FINE = 1_000_000


@dataclass(frozen=True)
class ExitSet:
    """One set of exits with its best thresholds.

    Attributes:
        chosen: positions of the candidates, in running order; none where the trunk alone is best.
        thresholds: one a candidate.
        us: mean microseconds a sample, as the search saw it.
    """

    chosen: tuple[int, ...]
    thresholds: tuple[float, ...]
    us: float


@dataclass(frozen=True, eq=False)
class CandidateScores:
    """What all candidates do on the recorded samples, and where they stand.

    Attributes:
        scores, losses: `(S, K + 1)`, the trunk's own exit last.
        taps: `(K,)` the position of each candidate's tap.
        cost: the microseconds of a design, given the positions of its candidates.

    Designs are selected on the half of the samples that `choose` finds candidates with; the half that tests a promise
    is left alone, so that a promise can be made of the design.
    """

    scores: Floats
    losses: Floats
    taps: tuple[int, ...]
    cost: Callable[[Sequence[int]], ExitCost]

    @functools.cached_property
    def tuning(self) -> Ints:
        """The samples that designs are selected on."""
        return halves(len(self.scores))[0]

    def replaced(self, some: Sequence[int], scores: Floats, losses: Floats) -> "CandidateScores":
        """With new scores and losses `(S, len(some))` of the candidates at these positions."""
        every = self.scores.copy(), self.losses.copy()
        for whole, part in zip(every, (scores, losses), strict=True):
            whole[:, list(some)] = part
        return replace(self, scores=every[0], losses=every[1])

    def problem(self, chosen: Sequence[int]) -> SearchProblem:
        """The search over thresholds of one design."""
        columns = [*chosen, self.scores.shape[1] - 1]
        return SearchProblem(
            self.scores[:, columns][self.tuning], self.losses[:, columns][self.tuning], self.cost(chosen)
        )


def search_exit_sets(
    judged: CandidateScores,
    most_loss: float,
    num_exits: int,
    report: Callable[[str], None],
    among: Sequence[int] | None = None,
) -> tuple[list[ExitSet], Floats]:
    """The best design of each number of exits, fewest first; the first is the trunk alone. And each candidate's best.

    All single candidates and all pairs at different taps are tried with every threshold that matters; of three and more
    those that add one to the best smaller designs.

    Args:
        judged: the candidates.
        most_loss: summed loss that is allowed over all S samples; of the tuning half so much of it as that has samples.
        num_exits: the most a design may have, the trunk's own included.
        report: called with a line now and then.
        among: the positions of the candidates to try; by default all.

    Returns:
        The designs; and `(K,)` for each candidate the microseconds of the best set tried that has it, else infinity.
    """
    most_loss *= len(judged.tuning) / len(judged.scores)
    alone = ExitSet((), (), float(judged.cost(()).latency_us([True])[-1]))
    best, here = [alone], [alone]
    least = np.full(len(judged.taps), np.inf)
    everyone = range(len(judged.taps)) if among is None else sorted(among)
    for size in range(1, num_exits):
        if size <= 2:
            sets: Iterable[tuple[int, ...]] = itertools.combinations(everyone, size)
        else:
            sets = sorted({tuple(sorted((*f.chosen, i))) for f in here for i in everyone if i not in f.chosen})
        sets = [s for s in sets if len({judged.taps[i] for i in s}) == size]
        report(f"trying {len(sets)} sets of {counted(size, 'early exit')}")
        tried = [t for t in (_best(judged, s, most_loss, _COARSE) for s in sets) if t is not None]
        for found in tried:
            least[list(found.chosen)] = np.minimum(least[list(found.chosen)], found.us)
        here = sorted(tried, key=lambda found: found.us)[:_BEAM]
        fine = [t for t in (_best(judged, f.chosen, most_loss, _FINE) for f in here[:3]) if t is not None]
        if fine:
            best.append(min(fine, key=lambda found: found.us))
    return best, least


def _best(judged: CandidateScores, chosen: tuple[int, ...], most_loss: float, vectors: int) -> ExitSet | None:
    """The cheapest thresholds of a design within the loss, or None where some of its exits stay unused."""
    points = best_points(judged.problem(chosen), vectors)
    within = np.flatnonzero(points.loss <= most_loss + SLACK)
    if not len(within):
        return None
    at = within[points.us[within].argmin()]
    thresholds = policy_thresholds(points.thresholds[at])
    used = tuple(t for t in thresholds if t is not None)
    return ExitSet(chosen, used, float(points.us[at])) if len(used) == len(chosen) else None


def break_even(judged: CandidateScores, found: ExitSet) -> tuple[float, ...]:
    """For each early exit the share of all samples that must leave there for it to save time in this design.

    What it saves is counted beside the same design without it, other thresholds unchanged, where those that would have
    left there leave as those do that stay. Fewer may leave at an exit that is there because it is more often right.
    """
    each, mean = _times(judged, found)
    position = route(judged.problem(found.chosen).scores, found.thresholds) - 1
    needed = []
    for n in range(len(found.chosen)):
        chosen, thresholds = (*found.chosen[:n], *found.chosen[n + 1 :]), found.thresholds
        rest = ExitSet(chosen, (*thresholds[:n], *thresholds[n + 1 :]), us=0.0)
        here, later = position == n, each[position[position > n]]
        spared = max((later.mean() if len(later) else each[-1]) - each[n], 1e-9)
        saved = _times(judged, rest)[1] - mean
        needed.append(float(np.clip(here.mean() - saved / spared, 0.0, 1.0)))
    return tuple(needed)


def least_us(each: Floats, losses: Floats, most_loss: float) -> float:
    """The lower bound on mean microseconds per sample, over all exit rules, with the exits of a design.

    It knows which answers are right: samples leave at the first exit that is, but for as many as the limit lets be
    wrong. Those are the ones that no exit answers rightly, and those that save most by leaving wrongly.

    Args:
        each: `(N,)` microseconds to each exit, rising.
        losses: `(S, N)` of 0 and 1.
        most_loss: how many of the samples may be answered wrongly.
    """
    rightly, wrongly = (np.where(those, each, np.inf).min(axis=1) for those in (losses < 0.5, losses >= 0.5))
    saved = np.sort(rightly - wrongly)[::-1]  # infinite where none is right, and less than nothing where all are
    allowed = saved[: int(most_loss + SLACK)]
    must = np.isinf(rightly)
    finite = allowed[(allowed > 0) & np.isfinite(allowed)].sum()
    return float((np.where(must, wrongly, rightly).sum() - finite) / len(losses))


def _times(judged: CandidateScores, found: ExitSet) -> tuple[Floats, float]:
    """Microseconds to each exit of a design `(N,)`, and the mean over the samples."""
    problem = judged.problem(found.chosen)
    each = problem.cost.latency_us([True] * problem.cost.num_exits)
    return each, float(each[route(problem.scores, found.thresholds) - 1].mean())
