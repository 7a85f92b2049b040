"""Open parts of a network in PyTorch, on the CPU or on a GPU."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from ..deploy.recorded_part import RecordedPart
from ..deploy.recorder import Recorder
from ..deploy.torch_engine import TorchEngine
from ..deploy.torch_precision import Precision, in_precision
from ..errors import InputError, first_line
from ..graph.torch_flat import TorchGraph, torch_flatten
from ..graph.torch_macs import torch_exit_macs
from ..graph.torch_program import tensors_of
from ..graph.torch_stages import Stage, cut_graph, uncut
from ..nn.calls import arguments
from ..nn.checks import device_of, resolve_device
from ..nn.network import plain_network
from ..policy.scores import Score
from ..policy.values import Policy
from .parts import PLAIN, Call, Macs
from .target import Target

DEVICES = {"torch": "cpu", "torch-cuda": "cuda"}


@dataclass(frozen=True, eq=False)
class TorchParts:
    """A network as flat torch graphs; see `Parts`. What is timed is what `TorchEngine` runs.

    As in a `TorchEngine` with its defaults, parts are recorded as CUDA graphs on a GPU, and run operator by operator on
    the CPU.

    Attributes:
        net: the network, on the device.
        example: inputs on the device.
        score: the score of every exit.
        precision: as for `TorchEngine`.
        graph: the network's graph in that precision, with scores.
        plain: the plain network's graph if the last exit reads branches (averaged exits).
        given: the example's tensors as the graph reads them.
        macs: see `Parts`.
    """

    net: nn.Module
    example: Any
    score: Score
    precision: Precision
    graph: TorchGraph
    plain: TorchGraph | None
    given: tuple[Tensor, ...]
    macs: Macs

    @property
    def num_exits(self) -> int:
        """See `Parts`."""
        return len(self.graph.outputs)

    @property
    def averaged(self) -> bool:
        """See `Parts`."""
        return self.plain is not None

    @contextmanager
    def opened(self, graphs: Mapping[str, Policy | Sequence[str]], target: Target) -> Iterator[dict[str, Call]]:
        """See `Parts`. Networks with the same exits are one engine, which each call gives its thresholds."""
        engines: dict[tuple[bool, ...], TorchEngine] = {}
        calls: dict[str, Call] = {}
        recorder = Recorder(self.given[0].device)
        with _threads(target.threads):
            for name, what in graphs.items():
                if not isinstance(what, Policy):
                    calls[name] = self._part(what, recorder)
                    continue
                if what.enabled not in engines:
                    engines[what.enabled] = self._engine(what)
                calls[name] = partial(engines[what.enabled], thresholds=what.thresholds)
            yield calls

    @contextmanager
    def deployed(self, path: Any, policy: Policy, target: Target) -> Iterator[Call]:
        """See `Parts`."""
        with _threads(target.threads):
            yield self._engine(policy)

    def check_cut(self, policy: Policy) -> None:
        """See `Parts`."""
        cut_graph(self.graph, policy)

    def _engine(self, policy: Policy) -> TorchEngine:
        return TorchEngine(self.net, replace(policy, score=self.score), self.example, precision=self.precision)

    def _part(self, outputs: Sequence[str], recorder: Recorder) -> Call:
        graph = (self.plain or self.graph) if PLAIN in outputs else self.graph
        exits = [len(graph.outputs) if name == PLAIN else int(name.rpartition("_")[2]) for name in outputs]
        stage, names = uncut(graph, exits[0], exits[1:]), [node.name for node in graph.inputs]
        if self.given[0].is_cuda:
            return RecordedPart(stage, names, self.given, recorder)
        return partial(_answer, stage, names, [t.dtype for t in self.given])


def torch_parts(net: nn.Module, example: Any, score: Score, precision: str, target: Target) -> TorchParts:
    """Return a network as flat graphs on the device of a target. The network itself stays where it is.

    Raises:
        InputError: the machine does not have the device, or PyTorch does not have the precision.
        GraphError: the network cannot be exported, or computed in the precision.
    """
    if precision not in get_args(Precision):
        known = ", ".join(map(repr, get_args(Precision)))
        raise InputError(f"precision={precision!r} is for files; with runtime={target.runtime!r}, give one of {known}")
    precision = cast(Precision, precision)
    try:
        device = resolve_device(DEVICES[target.runtime])
    except InputError as error:
        raise InputError(
            f"runtime={target.runtime!r} needs an NVIDIA GPU that PyTorch can use "
            f"({first_line(error.__cause__ or error)}); "
            "give runtime='torch' for the CPU"
        ) from error
    if device_of(net).type != device.type:
        net = copy.deepcopy(net).to(device)
    tensors, kwargs = tuple(t.to(device) for t in tensors_of(example)), arguments(example)[1]
    moved = dict(zip(kwargs, tensors, strict=True)) if kwargs else tensors
    run, converted = in_precision(net, moved, precision)
    graph, given = torch_flatten(run, converted, score), tensors_of(converted)
    alone = plain_network(run)
    plain = None if alone is run else torch_flatten(alone, converted, score)
    macs = torch_exit_macs(graph, [t[:2] for t in given])
    return TorchParts(net, moved, score, precision, graph, plain, given, macs)


@torch.inference_mode()
def _answer(stage: Stage, names: Sequence[str], dtypes: Sequence[torch.dtype], *arrays: Any) -> tuple[Any, ...]:
    """Compute a part on the CPU: return label and output as arrays, and the scores."""
    given = {n: torch.from_numpy(array).to(dtype) for n, dtype, array in zip(names, dtypes, arrays, strict=True)}
    output, *scores = stage.module(len(arrays[0]), *(given[taken.name] for taken in stage.takes))
    return output.argmax(dim=1).numpy(), output.numpy(), *scores


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Use `count` threads within operators."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
