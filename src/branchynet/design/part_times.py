"""Time the parts of a network with candidates in the target's runtime: trunk segments, branches, and deciding.

Times are per call of a whole batch, with warm weights. Shape letters: K candidates, T taps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import GraphError
from ..policy.exit_cost import ExitCost
from ..policy.values import Floats, Policy
from ..profiling.clock import samples_of
from ..profiling.cost import each_row, two_sizes
from ..profiling.parts import ALWAYS, NEVER, PLAIN, Parts, calls_of_sizes
from ..profiling.target import Target
from .candidates import CandidateNetwork


@dataclass(frozen=True, eq=False)
class Batch:
    """Microseconds per call of `rows` samples; `plain` is the trunk alone."""

    rows: int
    reach: Floats  # (T + 1,) from the input to each tap, and to the trunk's output with its score
    plain: float
    branch: Floats  # (K,) each branch with its score
    leave: Floats  # (T,) the cost of deciding at each tap if all samples leave
    stay: Floats  # (T,) and if all stay

    def stages(self, chosen: Sequence[int], taps: Sequence[int]) -> Floats:
        """Return microseconds per call of trunk segments and of branches, `(2, N)`, if all rows reach them."""
        trunk = np.diff([0.0, *self.reach[taps], self.reach[-1]])
        branch = np.append(self.branch[list(chosen)] + self.leave[taps], 0.0)
        # Staying costs more than leaving: count the difference with the next segment.
        trunk[1:] += np.maximum(0.0, self.stay[taps] - self.leave[taps])
        return np.stack([np.maximum(0.0, trunk), branch])


@dataclass(frozen=True, eq=False)
class StageTimes:
    """Times at the target's batch size and at a smaller one, which give the fixed costs of stages."""

    whole: Batch
    part: Batch  # at the smaller of `two_sizes`; the same as `whole` for batch size 1
    taps: tuple[int, ...]  # (K,) the position of each candidate's tap
    threads: int
    spread: float  # relative spread of a median over the turns

    @property
    def plain_us(self) -> float:
        """Microseconds per sample of the plain trunk."""
        return self.whole.plain / self.whole.rows

    def cost(self, chosen: Sequence[int]) -> ExitCost:
        """Return the costs of a design with the candidates at these positions, and of the last exit.

        Fixed parts are counted as in `each_row`. Without candidates it is the plain trunk, which needs no score.
        """
        trunk, branch = [self.plain_us], [0.0]
        if len(chosen):
            taps = [self.taps[i] for i in chosen]
            whole, part = (batch.stages(chosen, taps) for batch in (self.whole, self.part))
            trunk, branch = each_row(whole, part, self.whole.rows, self.part.rows)
        return ExitCost(tuple(trunk), tuple(branch), batch_size=self.whole.rows, threads=self.threads)


def time_stages(pool: CandidateNetwork, parts: Parts, example: Any, target: Target, seconds: float) -> StageTimes:
    """Time the `parts` of a network with candidates, trained or not, for about `seconds` in the target's runtime.

    The example's inputs are repeated or cut to the rows of a call.
    """
    sizes = two_sizes(target.batch_size)
    with parts.opened(_part_graphs(pool), target) as calls:
        taken = samples_of(calls_of_sizes(calls.values(), example, sizes), seconds)
    us = np.median(taken, axis=1)
    between = np.subtract(*np.quantile(taken, (0.75, 0.25), axis=1)) / us / np.sqrt(taken.shape[1])
    found = [
        _batch(pool, rows, dict(zip(calls, part.tolist(), strict=True)))
        for rows, part in zip(sizes, np.split(us, len(sizes)), strict=True)
    ]
    taps = tuple(pool.net.taps.index(c.tap) for c in pool.candidates)
    return StageTimes(found[0], found[-1], taps, target.threads, float(np.median(between)))


def uncuttable(pool: CandidateNetwork, parts: Parts) -> dict[str, GraphError]:
    """Return the taps at which the network cannot be cut, with the reasons."""
    faults = {}
    for tap in pool.net.taps:
        try:
            parts.check_cut(_policy(pool, pool.at(tap)[0], 0.0))
        except GraphError as error:
            faults[tap] = error
    return faults


def _policy(pool: CandidateNetwork, position: int, threshold: float) -> Policy:
    return Policy(thresholds=tuple(threshold if i == position else None for i in range(len(pool.candidates))))


def _part_graphs(pool: CandidateNetwork) -> dict[str, Policy | list[str]]:
    """Return the graphs whose times give the times of the parts, by name."""
    last = len(pool.candidates) + 1
    outputs = {"plain": [PLAIN], "last": [f"output_{last}", f"score_{last}"]}
    outputs |= {f"alone {i}": [f"output_{i + 1}", f"score_{i + 1}"] for i in range(len(pool.candidates))}
    policies = {}
    for t, tap in enumerate(pool.net.taps):
        positions = pool.at(tap)
        if len(positions) > 1:
            outputs[f"all {t}"] = [f"{kind}_{i + 1}" for i in positions for kind in ("output", "score")]
        outputs[f"both {t}"] = [*outputs["last"], f"score_{positions[0] + 1}"]
        policies[f"leave {t}"] = _policy(pool, positions[0], ALWAYS)
        policies[f"stay {t}"] = _policy(pool, positions[0], NEVER)
    return {**outputs, **policies}


def _batch(pool: CandidateNetwork, rows: int, us: dict[str, float]) -> Batch:
    """Return the times of the parts, from microseconds per call of each graph of `_part_graphs`."""
    branch, reach = np.zeros(len(pool.candidates)), np.zeros(len(pool.net.taps) + 1)
    leave, stay = np.zeros((2, len(pool.net.taps)))
    for t, tap in enumerate(pool.net.taps):
        positions = pool.at(tap)
        alone = np.array([us[f"alone {i}"] for i in positions])
        # alone = reach + branch and all = reach + the sum of branches, so reach follows;
        # for a single branch, both = last + branch.
        if len(positions) > 1:
            reach[t] = (alone.sum() - us[f"all {t}"]) / (len(positions) - 1)
        else:
            reach[t] = alone[0] - max(0.0, us[f"both {t}"] - us["last"])
        reach[t] = np.clip(reach[t], 0.0, alone.min())
        branch[positions] = alone - reach[t]
        leave[t] = max(0.0, us[f"leave {t}"] - alone[0])
        stay[t] = max(0.0, us[f"stay {t}"] - us[f"both {t}"])
    reach[-1] = us["last"]
    reach = np.minimum(np.maximum.accumulate(reach), reach[-1])
    return Batch(rows, reach, us["plain"], branch, leave, stay)
