"""StagedEngine: run an exported folder of stages."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..argument_checks import whole
from ..errors import InputError
from ..policy.prediction import Prediction
from ..policy.values import Ints
from .engine import Engine, Feeds, Graph
from .input_checks import Input
from .stage import Reached, Stage, collected, leaving, reached
from .staged_files import Manifest, StageValue

_OUTPUTS = 4  # label, exit, score, output


class StagedEngine(Engine):
    """A network whose stages are separate files. Made by `load` from a folder.

    It answers as an `Engine` of a nested file does. In addition, `stream` hands out the answers of each exit before the
    next stage runs, and `stage` gives a single stage to a scheduler.

    Attributes:
        stages: the `Stage` of each enabled exit, in order.

    Example:
        >>> import torch
        >>> from branchynet import BranchyNet, Policy, export, load
        >>> from torch import nn
        >>> net = BranchyNet(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), {"1": nn.Linear(8, 3)})
        >>> policy = Policy(thresholds=(0.5,))
        >>> engine = load(export(net, "net", policy=policy, example=torch.randn(2, 4), layout="stages"))
        >>> len(engine.stages), engine(torch.randn(5, 4)).output.shape
        (2, (5, 3))
        >>> sum(len(rows) for rows, answers in engine.stream(torch.randn(5, 4)))
        5
    """

    def __init__(
        self,
        runtime: str,
        manifest: Manifest,
        metadata: dict[str, Any],
        graphs: Sequence[Graph],
        reopen: tuple[Callable[..., Engine], tuple[Any, ...]],
    ) -> None:
        self.stages = tuple(_stage(manifest, n, graph, reopen) for n, graph in enumerate(graphs, 1))
        early = [stage.exit for stage in self.stages[:-1]]
        self._thresholds = [f"threshold_{n}" for n in early]
        inputs = (*map(_input, manifest.inputs), *(Input(name, np.float32, ()) for name in self._thresholds))
        whole_graph = Graph(
            self._run_all,
            inputs,
            frozenset(i.name for i in inputs),
            _OUTPUTS,
            metadata,
            float32=all(graph.float32 for graph in graphs),
        )
        super().__init__(runtime, whole_graph, reopen)

    def stage(self, number: int) -> Stage:
        """Return a stage, counted from 1. Raise `InputError` if there is none of that number."""
        number = whole("number", number, 1)
        if number > len(self.stages):
            raise InputError(f"there is no stage {number}; the network has {len(self.stages)}")
        return self.stages[number - 1]

    def stream(
        self, /, *inputs: Any, thresholds: Sequence[Any] | None = None, **named: Any
    ) -> Iterator[tuple[Ints, Prediction]]:
        """Answer each sample as soon as it leaves: yield ``(rows, answers)`` per exit at which samples leave.

        The answers of an exit are yielded before the next stage runs.

        Args:
            inputs: as in a call.
            thresholds: as in a call.
            named: as in a call.

        Yields:
            ``rows``, the positions in the batch of the samples that leave at this exit, and their `Prediction`.

        Raises:
            InputError: as in a call.
        """
        feeds, samples = self._feeds(inputs, named, thresholds)
        return leaving(self._parts(feeds, samples)) if samples else iter(())

    def _run_all(self, feeds: Feeds) -> Prediction:
        samples = len(feeds[self.inputs[0].name])
        return collected(self._parts(feeds, samples))

    def _parts(self, feeds: Feeds, samples: int) -> Iterator[Reached]:
        return reached(self.stages, feeds, samples, [feeds[name] for name in self._thresholds])


def _stage(manifest: Manifest, n: int, graph: Graph, reopen: tuple[Callable[..., Engine], tuple[Any, ...]]) -> Stage:
    entry = manifest.stages[n - 1]
    held = {v.name: v for v in (*manifest.inputs, *(v for s in manifest.stages[: n - 1] for v in s.outputs[3:]))}
    later = [value for stage in manifest.stages[n:] for value in stage.inputs]
    keeps = dict.fromkeys(v.name for v in later if v.source == "network" or v.source <= n)
    read = {value.name for value in entry.inputs}
    return Stage(
        entry.exit,
        entry.threshold,
        tuple(map(_input, entry.inputs)),
        tuple(keeps),
        entry.macs,
        graph.run,
        tuple(value.name for value in entry.outputs[3:]),
        tuple(_input(held[name]) for name in keeps if name in held and name not in read),
        (_reopened_stage, (*reopen, n)),
    )


def _reopened_stage(load: Callable[..., Any], arguments: tuple[Any, ...], n: int) -> Stage:
    return load(*arguments).stage(n)


def _input(value: StageValue) -> Input:
    return Input(value.name, np.dtype(value.dtype), value.shape)
