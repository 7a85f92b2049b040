"""StagedEngine: run an exported folder of stages."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..argument_checks import whole
from ..errors import InputError
from ..policy.prediction import Prediction
from ..policy.values import Ints
from .engine import Engine, Feeds, Graph
from .input_checks import Input
from .on_device import DeviceGraph, DeviceInput
from .stage import Reached, Stage, collected, leaving, reached
from .staged_files import Manifest, StageEntry, StageValue

_OUTPUTS = 4  # label, exit, score, output
_ANSWERS = 3  # of a stage: label, score, output


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
        # What `stream` and calls run: on a device, carried values stay there.
        self._streamed = self._called = tuple(map(_on_device, self.stages, graphs))
        self._device = graphs[0].device
        if self._device is not None and self._device.device.recorded:
            self._called = tuple(map(_recorded, self.stages, graphs, manifest.stages))
        self._one_call = threading.Lock()  # recorded stages work on fixed memory
        early = [stage.exit for stage in self.stages[:-1]]
        self._thresholds = [f"threshold_{n}" for n in early]
        inputs = (
            *(_input(value, self._device) for value in manifest.inputs),
            *(Input(name, np.float32, ()) for name in self._thresholds),
        )
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
        return leaving(self._parts(self._streamed, feeds)) if samples else iter(())

    def _run_all(self, feeds: Feeds) -> Prediction:
        if self._called is self._streamed:
            return collected(self._parts(self._called, feeds))
        with self._one_call:
            return collected(self._parts(self._called, feeds))

    def _parts(self, stages: Sequence[Stage], feeds: Feeds) -> Iterator[Reached]:
        thresholds = [feeds[name] for name in self._thresholds]
        return reached(stages, feeds if self._device is None else self._placed(feeds), thresholds)

    def _placed(self, feeds: Feeds) -> dict[str, Any]:
        """Return the inputs of the network; those that later stages read are on the device."""
        assert self._device is not None
        kept = self.stages[0].keeps
        given = {i.name: feeds[i.name] for i in self.inputs}
        return {name: self._device.placed(value, keep=name in kept) for name, value in given.items()}


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
        entry.lengths,
        graph.run,
        tuple(value.name for value in entry.inputs),
        tuple(value.name for value in entry.outputs[3:]),
        tuple(_input(held[name]) for name in keeps if name in held and name not in read),
        (_reopened_stage, (*reopen, n)),
    )


def _on_device(stage: Stage, graph: Graph) -> Stage:
    """Return a stage that leaves on the device what later stages read; on the host, the stage itself."""
    return stage if graph.device is None else replace(stage, _run=partial(graph.device.bound, host=_ANSWERS))


def _recorded(stage: Stage, graph: Graph, entry: StageEntry) -> Stage:
    """Return a stage that the provider records once per batch size."""
    assert graph.device is not None
    inputs, outputs = (tuple(map(_input, values)) for values in (entry.inputs, entry.outputs))
    return replace(stage, _run=graph.device.recording(inputs, outputs, _ANSWERS))


def _reopened_stage(load: Callable[..., Any], arguments: tuple[Any, ...], n: int) -> Stage:
    """Open the stage of a pickled or copied stage."""
    return load(*arguments).stage(n)


def _input(value: StageValue, device: DeviceGraph | None = None) -> Input:
    described = value.name, np.dtype(value.dtype), value.shape
    return Input(*described) if device is None else DeviceInput(*described, device.device.kind)
