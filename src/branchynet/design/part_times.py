"""Time the parts of a network with candidates in the target's runtime: trunk segments, branches, and deciding.

Times are per call of a whole batch, with warm weights. Shape letters: K candidates, T taps.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..deploy.assembly import assemble
from ..errors import GraphError, as_graph_errors
from ..graph.onnx_flat import FlatGraph
from ..graph.torch_program import tensors_of
from ..policy.exit_cost import ExitCost
from ..policy.values import Floats, Policy
from ..profiling.clock import samples_of
from ..profiling.cost import each_row, two_sizes
from ..profiling.part_engines import ALWAYS, NEVER, opened
from ..profiling.target import Target
from .candidates import CandidateNetwork


@dataclass(frozen=True, eq=False)
class Batch:
    """Microseconds per call at one batch size.

    Attributes:
        rows: samples per call.
        reach: `(T + 1,)` from the input to each tap, and to the trunk's output with its score.
        plain: the trunk alone.
        branch: `(K,)` each branch with its score.
        leave, stay: `(T,)` the cost of deciding at each tap if all samples leave, and if all stay.
    """

    rows: int
    reach: Floats
    plain: float
    branch: Floats
    leave: Floats
    stay: Floats


@dataclass(frozen=True, eq=False)
class StageTimes:
    """Times at the target's batch size and at a smaller one, which give the fixed costs of stages.

    Attributes:
        whole: times at the target's batch size.
        part: times at the smaller of `two_sizes`; the same as `whole` for batch size 1.
        taps: `(K,)` the position of each candidate's tap.
        threads: threads within an operator.
        spread: relative spread of a median over the turns.
    """

    whole: Batch
    part: Batch
    taps: tuple[int, ...]
    threads: int
    spread: float

    @property
    def plain_us(self) -> float:
        """Microseconds per sample of the plain trunk."""
        return self.whole.plain / self.whole.rows

    def cost(self, chosen: Sequence[int]) -> ExitCost:
        """Return the costs of a design with the candidates at these positions, and of the last exit.

        Fixed parts are counted as in `each_row`. Without candidates it is the plain trunk, which needs no score.
        """
        if not len(chosen):
            return ExitCost((self.plain_us,), (0.0,), batch_size=self.whole.rows, threads=self.threads)
        taps = [self.taps[i] for i in chosen]
        whole, part = (self._parts(batch, chosen, taps) for batch in (self.whole, self.part))
        trunk, branch = each_row(whole, part, self.whole.rows, self.part.rows)
        return ExitCost(tuple(trunk), tuple(branch), batch_size=self.whole.rows, threads=self.threads)

    @staticmethod
    def _parts(batch: Batch, chosen: Sequence[int], taps: Sequence[int]) -> Floats:
        """Return microseconds per call of trunk segments and of branches, `(2, N)`, if all rows reach them."""
        trunk = np.diff([0.0, *batch.reach[taps], batch.reach[-1]])
        branch = np.append(batch.branch[list(chosen)] + batch.leave[taps], 0.0)
        # Staying costs more than leaving: count the difference with the next segment.
        trunk[1:] += np.maximum(0.0, batch.stay[taps] - batch.leave[taps])
        return np.stack([np.maximum(0.0, trunk), branch])


def time_stages(
    pool: CandidateNetwork,
    flat: FlatGraph,
    example: Any,
    target: Target,
    seconds: float,
) -> StageTimes:
    """Time the parts of a network with candidates for a target.

    Args:
        pool: the network; its branches may be untrained.
        flat: its graph, with scores.
        example: inputs, real ones if possible; repeated or cut to the rows of a call.
        target: the batch size, the threads and the runtime.
        seconds: approximate duration.
    """
    sizes = two_sizes(target.batch_size)
    taps = [pool.net.taps.index(c.tap) for c in pool.candidates]
    with tempfile.TemporaryDirectory() as folder, as_graph_errors():
        parts = _Parts(flat, pool, Path(folder), target)
        found, spread = parts.timed(tensors_of(example), sizes, seconds)
    return StageTimes(found[0], found[-1], tuple(taps), target.threads, spread)


def uncuttable(pool: CandidateNetwork, flat: FlatGraph) -> dict[str, GraphError]:
    """Return the taps at which the network cannot be cut, with the reasons."""
    faults = {}
    for tap in pool.net.taps:
        try:
            assemble(flat, _policy(pool, pool.at(tap)[0], 0.0))
        except GraphError as error:
            faults[tap] = error
    return faults


def _policy(pool: CandidateNetwork, position: int, threshold: float) -> Policy:
    return Policy(thresholds=tuple(threshold if i == position else None for i in range(len(pool.candidates))))


class _Parts:
    """Engines of graphs whose times give the times of the parts."""

    def __init__(self, flat: FlatGraph, pool: CandidateNetwork, folder: Path, target: Target) -> None:
        self.pool = pool
        last = len(pool.candidates) + 1
        outputs = {"plain": [f"output_{last}"], "last": [f"output_{last}", f"score_{last}"]}
        for i in range(len(pool.candidates)):
            outputs[f"alone {i}"] = [f"output_{i + 1}", f"score_{i + 1}"]
        policies: dict[str, Policy] = {}
        for t, tap in enumerate(pool.net.taps):
            positions = pool.at(tap)
            if len(positions) > 1:
                outputs[f"all {t}"] = [f"{kind}_{i + 1}" for i in positions for kind in ("output", "score")]
            outputs[f"both {t}"] = [f"output_{last}", f"score_{last}", f"score_{positions[0] + 1}"]
            policies[f"leave {t}"] = _policy(pool, positions[0], ALWAYS)
            policies[f"stay {t}"] = _policy(pool, positions[0], NEVER)
        self.calls = {}
        for k, (name, wanted) in enumerate(outputs.items()):
            self.calls[name] = opened(assemble(flat, None, outputs=wanted), folder / f"{k}.onnx", target).outputs
        for k, (name, policy) in enumerate(policies.items()):
            self.calls[name] = opened(assemble(flat, policy), folder / f"exits-{k}.onnx", target)

    def timed(self, example: Sequence[Any], sizes: Sequence[int], seconds: float) -> tuple[list[Batch], float]:
        """Return times at each batch size, all taken in turns, and the relative spread of a median."""
        batches = [[np.resize(t.numpy(), (rows, *t.shape[1:])) for t in example] for rows in sizes]
        taken = samples_of(
            [lambda c=call, b=batch: c(*b) for batch in batches for call in self.calls.values()], seconds
        )
        us = np.median(taken, axis=1)
        between = np.subtract(*np.quantile(taken, (0.75, 0.25), axis=1)) / us / np.sqrt(taken.shape[1])
        found = [
            self._batch(rows, {name: float(t) for name, t in zip(self.calls, part, strict=True)})
            for rows, part in zip(sizes, np.split(us, len(sizes)), strict=True)
        ]
        return found, float(np.median(between))

    def _batch(self, rows: int, us: dict[str, float]) -> Batch:
        pool = self.pool
        branch, reach = np.zeros(len(pool.candidates)), np.zeros(len(pool.net.taps) + 1)
        leave, stay = np.zeros(len(pool.net.taps)), np.zeros(len(pool.net.taps))
        for t, tap in enumerate(pool.net.taps):
            positions = pool.at(tap)
            alone = np.array([us[f"alone {i}"] for i in positions])
            # alone = reach + branch and all = reach + the sum of branches, so reach follows;
            # of one branch both = last + branch.
            if len(positions) > 1:
                reach[t] = (alone.sum() - us[f"all {t}"]) / (len(positions) - 1)
            else:
                reach[t] = us[f"alone {positions[0]}"] - max(0.0, us[f"both {t}"] - us["last"])
            reach[t] = np.clip(reach[t], 0.0, alone.min())
            branch[positions] = alone - reach[t]
            leave[t] = max(0.0, us[f"leave {t}"] - alone[0])
            stay[t] = max(0.0, us[f"stay {t}"] - us[f"both {t}"])
        reach[-1] = us["last"]
        reach = np.minimum(np.maximum.accumulate(reach), reach[-1])
        return Batch(rows, reach, us["plain"], branch, leave, stay)
