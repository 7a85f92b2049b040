"""Search for the fastest set of exits among many candidates.

Shape letters: S samples, K candidates, N exits of a design.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import counted
from ..policy.evaluation import best_points, policy_thresholds
from ..policy.exit_cost import ExitCost
from ..policy.exit_rule import route
from ..policy.limits import SLACK
from ..policy.risk_tests import halves
from ..policy.search import SearchProblem
from ..policy.values import Floats, Ints

_BEAM = 16  # number of designs that are extended by one exit
_COARSE = 10_000  # threshold vectors per design while designs are compared
_FINE = 1_000_000  # for the best designs


@dataclass(frozen=True)
class ExitSet:
    """A set of exits with its best threshold per candidate, and mean microseconds per sample in the search."""

    chosen: tuple[int, ...]  # positions of the candidates, in running order; () for the trunk alone
    thresholds: tuple[float, ...]
    us: float


@dataclass(frozen=True, eq=False)
class CandidateScores:
    """Scores and losses of all candidates on the recorded samples.

    Designs are selected on the half of the samples on which `choose` searches thresholds. The other half stays unused,
    so `choose` can give a promise for the design.
    """

    scores: Floats  # (S, K + 1), the trunk's exit last
    losses: Floats  # likewise
    taps: tuple[int, ...]  # (K,) the position of each candidate's tap
    cost: Callable[[Sequence[int]], ExitCost]  # of a design, given the positions of its candidates

    @functools.cached_property
    def tuning(self) -> Ints:
        """The samples that select the designs."""
        return halves(len(self.scores))[0]

    def replaced(self, some: Sequence[int], scores: Floats, losses: Floats) -> "CandidateScores":
        """Return a copy with new scores and losses `(S, len(some))` of the candidates at these positions."""
        every = self.scores.copy(), self.losses.copy()
        for whole, part in zip(every, (scores, losses), strict=True):
            whole[:, list(some)] = part
        return replace(self, scores=every[0], losses=every[1])

    def problem(self, chosen: Sequence[int]) -> SearchProblem:
        """Return the search over thresholds of one design."""
        columns = [*chosen, self.scores.shape[1] - 1]
        return SearchProblem(
            self.scores[:, columns][self.tuning], self.losses[:, columns][self.tuning], self.cost(chosen)
        )


def search_exit_sets(
    recorded: CandidateScores,
    most_loss: float,
    num_exits: int,
    report: Callable[[str], None],
    among: Sequence[int] | None = None,
) -> tuple[list[ExitSet], Floats]:
    """Return the best design per number of exits, and the time of the best design with each candidate.

    It tries all single candidates and all pairs at different taps with every threshold that matters, and larger sets
    that extend the best smaller ones by one exit. `most_loss`, the largest sum of losses over all S samples, is scaled
    down to the tuning half. `num_exits` includes the trunk's. `among` are the candidates to try; by default all.

    Returns:
        The designs, from the trunk alone to the most exits; and `(K,)` microseconds of the fastest set that contains
        each candidate, or infinity if there is none.
    """
    most_loss *= len(recorded.tuning) / len(recorded.scores)
    alone = ExitSet((), (), float(recorded.cost(()).latency_us([True])[-1]))
    best, beam = [alone], [alone]
    least = np.full(len(recorded.taps), np.inf)
    everyone = range(len(recorded.taps)) if among is None else sorted(among)
    for size in range(1, num_exits):
        if size <= 2:
            sets: Iterable[tuple[int, ...]] = itertools.combinations(everyone, size)
        else:
            sets = sorted({tuple(sorted((*f.chosen, i))) for f in beam for i in everyone if i not in f.chosen})
        sets = [s for s in sets if len({recorded.taps[i] for i in s}) == size]
        report(f"trying {len(sets)} sets of {counted(size, 'early exit')}")
        tried = [t for t in (_best(recorded, s, most_loss, _COARSE) for s in sets) if t is not None]
        for found in tried:
            least[list(found.chosen)] = np.minimum(least[list(found.chosen)], found.us)
        beam = sorted(tried, key=lambda found: found.us)[:_BEAM]
        fine = [t for t in (_best(recorded, f.chosen, most_loss, _FINE) for f in beam[:3]) if t is not None]
        if fine:
            best.append(min(fine, key=lambda found: found.us))
    return best, least


def _best(recorded: CandidateScores, chosen: tuple[int, ...], most_loss: float, vectors: int) -> ExitSet | None:
    """Return the fastest thresholds of a design within the loss; None if an exit stays unused."""
    points = best_points(recorded.problem(chosen), vectors)
    within = np.flatnonzero(points.loss <= most_loss + SLACK)
    if not len(within):
        return None
    at = within[points.us[within].argmin()]
    thresholds = policy_thresholds(points.thresholds[at])
    used = tuple(t for t in thresholds if t is not None)
    return ExitSet(chosen, used, float(points.us[at])) if len(used) == len(chosen) else None


def break_even(recorded: CandidateScores, found: ExitSet) -> tuple[float, ...]:
    """Return, per early exit, the share of all samples that must leave there for it to save time in this design.

    The design is compared with the design without that exit and its threshold. Fewer samples may leave at an exit that
    was chosen for its accuracy.
    """
    each, mean = _times(recorded, found)
    position = route(recorded.problem(found.chosen).scores, found.thresholds) - 1
    needed = []
    for n in range(len(found.chosen)):
        chosen, thresholds = (*found.chosen[:n], *found.chosen[n + 1 :]), found.thresholds
        rest = ExitSet(chosen, (*thresholds[:n], *thresholds[n + 1 :]), us=0.0)
        leave, later = position == n, each[position[position > n]]
        spared = max((later.mean() if len(later) else each[-1]) - each[n], 1e-9)
        saved = _times(recorded, rest)[1] - mean
        needed.append(float(np.clip(leave.mean() - saved / spared, 0.0, 1.0)))
    return tuple(needed)


def least_us(each: Floats, losses: Floats, most_loss: float) -> float:
    """Return the lower bound on mean microseconds per sample over all exit rules, with the exits of a design.

    A sample leaves at its first right exit. The `most_loss` wrong predictions that the limit allows are the samples
    without a right exit, and those that save most by leaving at a wrong one. `each` holds increasing microseconds to
    each exit; `losses` `(S, N)` are 0 or 1.
    """
    rightly, wrongly = (np.where(those, each, np.inf).min(axis=1) for those in (losses < 0.5, losses >= 0.5))
    saved = np.sort(rightly - wrongly)[::-1]  # infinite if no exit is right, negative if all are
    allowed = saved[: int(most_loss + SLACK)]
    must = np.isinf(rightly)
    finite = allowed[(allowed > 0) & np.isfinite(allowed)].sum()
    return float((np.where(must, wrongly, rightly).sum() - finite) / len(losses))


def _times(recorded: CandidateScores, found: ExitSet) -> tuple[Floats, float]:
    """Return microseconds to each exit of a design `(N,)`, and the mean over the samples."""
    problem = recorded.problem(found.chosen)
    each = problem.cost.latency_us([True] * problem.cost.num_exits)
    return each, float(each[route(problem.scores, found.thresholds) - 1].mean())
