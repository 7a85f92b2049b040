"""Open parts of a network in PyTorch, on the CPU or on a GPU."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..deploy.torch_engine import TorchEngine
from ..errors import InputError
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

    Attributes:
        net: the network, on the device.
        example: inputs on the device.
        score: the score of every exit.
        graph: the network's graph, with scores.
        plain: the plain network's graph if the last exit reads branches (averaged exits).
        macs: see `Parts`.
    """

    net: nn.Module
    example: Any
    score: Score
    graph: TorchGraph
    plain: TorchGraph | None
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
        with _threads(target.threads):
            for name, what in graphs.items():
                if isinstance(what, Policy):
                    if what.enabled not in engines:
                        engines[what.enabled] = self._engine(what)
                    calls[name] = partial(engines[what.enabled], thresholds=what.thresholds)
                else:
                    calls[name] = partial(_answer, self._part(what), self.device)
            yield calls

    @contextmanager
    def deployed(self, path: Any, policy: Policy, target: Target) -> Iterator[Call]:
        """See `Parts`."""
        with _threads(target.threads):
            yield self._engine(policy)

    def check_cut(self, policy: Policy) -> None:
        """See `Parts`."""
        cut_graph(self.graph, policy)

    @property
    def device(self) -> torch.device:
        """Where the parts run."""
        return tensors_of(self.example)[0].device

    def _engine(self, policy: Policy) -> TorchEngine:
        return TorchEngine(self.net, replace(policy, score=self.score), self.example, device=self.device)

    def _part(self, outputs: Sequence[str]) -> tuple[Stage, tuple[str, ...]]:
        graph = (self.plain or self.graph) if PLAIN in outputs else self.graph
        exits = [len(graph.outputs) if name == PLAIN else int(name.rpartition("_")[2]) for name in outputs]
        return uncut(graph, exits[0], exits[1:]), tuple(node.name for node in graph.inputs)


def torch_parts(net: nn.Module, example: Any, score: Score, precision: str, target: Target) -> TorchParts:
    """Return a network as flat graphs on the device of a target. The network itself stays where it is.

    Raises:
        InputError: the machine does not have the device, or the precision is not float32.
        GraphError: the network cannot be exported.
    """
    if precision != "float32":
        raise InputError(f"precision={precision!r} is for files; in PyTorch, give the network in that type, net.half()")
    device = resolve_device(DEVICES[target.runtime])
    if device_of(net).type != device.type:
        net = copy.deepcopy(net).to(device)
    tensors, kwargs = tuple(t.to(device) for t in tensors_of(example)), arguments(example)[1]
    moved = dict(zip(kwargs, tensors, strict=True)) if kwargs else tensors
    graph = torch_flatten(net, moved, score)
    alone = plain_network(net)
    plain = None if alone is net else torch_flatten(alone, moved, score)
    macs = torch_exit_macs(graph, [t[:2] for t in tensors])
    return TorchParts(net, moved, score, graph, plain, macs)


@torch.inference_mode()
def _answer(part: tuple[Stage, tuple[str, ...]], device: torch.device, *arrays: Any) -> tuple[Any, ...]:
    """Compute a part: return label and output as arrays, and the scores where they are."""
    stage, names = part
    given = {name: torch.from_numpy(array).to(device) for name, array in zip(names, arrays, strict=True)}
    output, *scores = stage.module(len(arrays[0]), *(given[taken.name] for taken in stage.takes))
    return output.argmax(dim=1).cpu().numpy(), output.cpu().numpy(), *scores


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Use `count` threads within operators."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
