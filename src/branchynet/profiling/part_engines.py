"""Graphs and engines of parts of a network, whose times give the costs of its stages."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..deploy.assembly import assemble
from ..deploy.engine import Engine
from ..deploy.loading import load
from ..deploy.model_file import save_model
from ..graph.macs import exit_macs
from ..graph.onnx_flat import FlatGraph, flatten
from ..graph.precision import converted
from ..graph.quantize import calibration_batches
from ..graph.torch_program import tensors_of
from ..nn.network import plain_network
from ..policy.scores import Score
from ..policy.values import Policy
from .target import Target

ALWAYS, NEVER = 3e38, -3e38  # thresholds that every score passes, and that none passes
Macs = tuple[tuple[float, ...], tuple[float, ...]]


def flat_graphs(
    net: nn.Module, example: Any, score: Score, precision: str, calibration: Any, dynamic: bool = True
) -> tuple[FlatGraph, FlatGraph | None, Macs]:
    """Return the network's graph, the plain network's if the last exit reads branches (averaged exits), and their MACs.

    The graphs are converted as by `export`; multiply-accumulates are those of `exit_macs` before that.
    """
    graphs = [flatten(net, example, score=score, dynamic=dynamic)]
    macs = exit_macs(graphs[0])
    if (alone := plain_network(net)) is not net:
        graphs.append(flatten(alone, example, dynamic=dynamic))
    batches = [[] if calibration is None else calibration_batches(calibration, graph) for graph in graphs]
    graphs = [converted(graph, precision, given) for graph, given in zip(graphs, batches, strict=True)]
    return graphs[0], (graphs[1] if len(graphs) > 1 else None), macs


def part_engines(
    flat: FlatGraph,
    folder: Path,
    target: Target,
    *,
    plain: FlatGraph | None = None,
    enabled: Sequence[int] | None = None,
    alone: bool = True,
) -> dict[str, Engine]:
    """Return engines of graphs without decisions, by name.

    ``plain`` is the last exit of the graph `plain`, or else of `flat`, without its score. ``upto_n`` is all enabled
    exits up to n with their scores, and ``alone_n`` exit n with its score. ``last`` is the last exit of `flat` without
    its score, if `plain` is given.
    """
    exits = enabled or range(1, flat.num_exits + 1)
    last = [f"output_{flat.num_exits}"]
    wanted = {"last": last} if alone and plain else {}
    for n in exits:
        wanted[f"upto_{n}"] = [f"output_{n}", *(f"score_{k}" for k in exits if k <= n)]
        if alone and n > 1:
            wanted[f"alone_{n}"] = [f"output_{n}", f"score_{n}"]
    first = {"plain": [f"output_{plain.num_exits}"] if plain else last}
    return opened(plain or flat, folder, target, first) | opened(flat, folder, target, wanted)


def leaving_engines(flat: FlatGraph, folder: Path, target: Target) -> dict[str, Engine]:
    """Return engines ``leave_n`` of the exported network, with thresholds by which every sample leaves at exit n."""
    exits = range(1, flat.num_exits + 1)
    policies = {f"leave_{n}": Policy(thresholds=tuple(ALWAYS if k == n else NEVER for k in exits[:-1])) for n in exits}
    return opened(flat, folder, target, policies)


def opened(
    flat: FlatGraph, folder: Path, target: Target, graphs: Mapping[str, Policy | list[str]]
) -> dict[str, Engine]:
    """Return an engine for each policy, and for each list of outputs to compute without decisions."""
    engines = {}
    for name, what in graphs.items():
        policy, outputs = (what, ()) if isinstance(what, Policy) else (None, what)
        save_model(assemble(flat, policy, outputs=outputs), folder / f"{name}.onnx")
        engines[name] = load(folder / f"{name}.onnx", threads=target.threads, runtime=target.runtime)
    return engines


def calls_of_sizes(calls: Iterable[Callable[..., Any]], example: Any, sizes: Sequence[int]) -> list[Callable[[], Any]]:
    """Return every call with the example's inputs, repeated or cut to the first batch size, then to the next."""
    inputs = [tensor.numpy() for tensor in tensors_of(example)]
    batches = [[np.resize(array, (rows, *array.shape[1:])) for array in inputs] for rows in sizes]
    return [partial(call, *batch) for batch in batches for call in calls]
