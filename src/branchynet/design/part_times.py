"""What every part of a forest takes in the deployment engine: trunk segments, branches, and deciding.

Times are of calls of a whole batch, with weights warm. Shape letters: K candidates, T taps.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..deploy.assembly import assemble
from ..deploy.loading import load
from ..errors import GraphError, as_graph_errors
from ..graph.onnx_flat import FlatGraph
from ..graph.torch_program import tensors_of
from ..policy.values import ExitCost, Floats, Policy
from ..profiling.clock import samples_of
from ..profiling.cost import each_row, two_sizes
from ..profiling.part_engines import ALWAYS, NEVER
from ..profiling.target import Target
from .candidates import CandidateNetwork


@dataclass(frozen=True, eq=False)
class Batch:
    """Microseconds a call at one batch size.

    Attributes:
        rows: samples a call.
        reach: `(T + 1,)` from the input to each tap, and to the trunk's output, its score included.
        plain: of the trunk alone.
        branch: `(K,)` of each branch with its score.
        leave, stay: `(T,)` what deciding adds at each tap where all samples leave, and where all stay.
    """

    rows: int
    reach: Floats
    plain: float
    branch: Floats
    leave: Floats
    stay: Floats


@dataclass(frozen=True, eq=False)
class StageTimes:
    """Times at a batch size and, for a batch of several, at a part of it, from which stages of fewer rows follow.

    Attributes:
        whole: at the batch size asked for.
        part: at the smaller of `two_sizes`; the same as `whole` for one sample a call.
        taps: `(K,)` the position of each candidate's tap.
        threads: threads within an operator.
        spread: relative spread of a median, as the turns differ.
    """

    whole: Batch
    part: Batch
    taps: tuple[int, ...]
    threads: int
    spread: float

    @property
    def plain_us(self) -> float:
        """The plain trunk's microseconds a sample."""
        return self.whole.plain / self.whole.rows

    def cost(self, chosen: Sequence[int]) -> ExitCost:
        """What a design costs: trunk segments and branches of the candidates at these positions, then the last exit.

        Of a batch, fixed parts are counted as in `each_row`. Without candidates it is the plain trunk, which needs no
        score.
        """
        if not len(chosen):
            return ExitCost((self.plain_us,), (0.0,), batch_size=self.whole.rows, threads=self.threads)
        taps = [self.taps[i] for i in chosen]
        whole, part = (self._parts(batch, chosen, taps) for batch in (self.whole, self.part))
        trunk, branch = each_row(whole, part, self.whole.rows, self.part.rows)
        return ExitCost(tuple(trunk), tuple(branch), batch_size=self.whole.rows, threads=self.threads)

    @staticmethod
    def _parts(batch: Batch, chosen: Sequence[int], taps: Sequence[int]) -> Floats:
        """`(2, N)` microseconds a call of trunk segments and of branches, all rows of the call there."""
        trunk = np.diff([0.0, *batch.reach[taps], batch.reach[-1]])
        branch = np.append(batch.branch[list(chosen)] + batch.leave[taps], 0.0)
        # Staying takes more than leaving: that belongs to what comes next.
        trunk[1:] += np.maximum(0.0, batch.stay[taps] - batch.leave[taps])
        return np.stack([np.maximum(0.0, trunk), branch])


def time_stages(
    forest: CandidateNetwork,
    flat: FlatGraph,
    example: Any,
    target: Target,
    seconds: float,
) -> StageTimes:
    """Time a forest's parts for a target.

    Args:
        forest: whose branches need not be trained.
        flat: its graph, with scores.
        example: real inputs if possible; repeated or cut to the rows of a call.
        target: the batch size, the threads and the runtime.
        seconds: about how long to measure.
    """
    sizes = two_sizes(target.batch_size)
    taps = [forest.net.taps.index(c.tap) for c in forest.candidates]
    with tempfile.TemporaryDirectory() as folder, as_graph_errors():
        parts = _Parts(flat, forest, Path(folder), target)
        found, spread = parts.timed(tensors_of(example), sizes, seconds)
    return StageTimes(found[0], found[-1], tuple(taps), target.threads, spread)


def uncuttable(forest: CandidateNetwork, flat: FlatGraph) -> dict[str, GraphError]:
    """The taps at which the network cannot be cut, each with what stands in the way."""
    faults = {}
    for tap in forest.net.taps:
        try:
            assemble(flat, _policy(forest, forest.at(tap)[0], 0.0))
        except GraphError as error:
            faults[tap] = error
    return faults


def _policy(forest: CandidateNetwork, position: int, threshold: float) -> Policy:
    return Policy(thresholds=tuple(threshold if i == position else None for i in range(len(forest.candidates))))


class _Parts:
    """Engines of the graphs whose times tell the parts'."""

    def __init__(self, flat: FlatGraph, forest: CandidateNetwork, folder: Path, target: Target) -> None:
        self.forest = forest
        how: Any = {"threads": target.threads, "runtime": target.runtime}
        last = len(forest.candidates) + 1
        outputs = {"plain": [f"output_{last}"], "last": [f"output_{last}", f"score_{last}"]}
        for i in range(len(forest.candidates)):
            outputs[f"alone {i}"] = [f"output_{i + 1}", f"score_{i + 1}"]
        policies: dict[str, Policy] = {}
        for t, tap in enumerate(forest.net.taps):
            here = forest.at(tap)
            if len(here) > 1:
                outputs[f"all {t}"] = [f"{kind}_{i + 1}" for i in here for kind in ("output", "score")]
            outputs[f"both {t}"] = [f"output_{last}", f"score_{last}", f"score_{here[0] + 1}"]
            policies[f"leave {t}"] = _policy(forest, here[0], ALWAYS)
            policies[f"stay {t}"] = _policy(forest, here[0], NEVER)
        self.calls = {}
        for k, (name, wanted) in enumerate(outputs.items()):
            ir.save(assemble(flat, None, outputs=wanted), folder / f"{k}.onnx")
            self.calls[name] = load(folder / f"{k}.onnx", **how).outputs
        for k, (name, policy) in enumerate(policies.items()):
            ir.save(assemble(flat, policy), folder / f"exits-{k}.onnx")
            self.calls[name] = load(folder / f"exits-{k}.onnx", **how)

    def timed(self, example: Sequence[Any], sizes: Sequence[int], seconds: float) -> tuple[list[Batch], float]:
        """Times at each batch size, all in turns, and the relative spread of a median."""
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
        forest = self.forest
        branch, reach = np.zeros(len(forest.candidates)), np.zeros(len(forest.net.taps) + 1)
        leave, stay = np.zeros(len(forest.net.taps)), np.zeros(len(forest.net.taps))
        for t, tap in enumerate(forest.net.taps):
            here = forest.at(tap)
            alone = np.array([us[f"alone {i}"] for i in here])
            # alone = reach + branch and all = reach + the sum of branches, so reach follows;
            # of one branch both = last + branch.
            if len(here) > 1:
                reach[t] = (alone.sum() - us[f"all {t}"]) / (len(here) - 1)
            else:
                reach[t] = us[f"alone {here[0]}"] - max(0.0, us[f"both {t}"] - us["last"])
            reach[t] = np.clip(reach[t], 0.0, alone.min())
            branch[here] = alone - reach[t]
            leave[t] = max(0.0, us[f"leave {t}"] - alone[0])
            stay[t] = max(0.0, us[f"stay {t}"] - us[f"both {t}"])
        reach[-1] = us["last"]
        reach = np.minimum(np.maximum.accumulate(reach), reach[-1])
        return Batch(rows, reach, us["plain"], branch, leave, stay)
