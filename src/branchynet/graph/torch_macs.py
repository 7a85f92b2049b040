"""Count multiply-accumulates of a flat torch graph, and divide them between trunk and branches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from ..nn.trace import Trace
from .cut import divided
from .torch_flat import TorchGraph


@torch.no_grad()
def torch_exit_macs(graph: TorchGraph, inputs: Sequence[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return multiply-accumulates per sample as `(trunk, branch)`, with one number per exit each.

    They are counted while the graph computes the `inputs`, as `attach` counts them, and divided as by `exit_macs`.
    """
    counts: dict[fx.Node, float] = {}
    values: dict[fx.Node, Any] = dict(zip(graph.inputs, inputs, strict=True))
    last = {read: node for node in graph.nodes for read in node.all_input_nodes}
    values |= {node: graph.constants[node] for node in graph.nodes if node in graph.constants}
    for node in (node for node in graph.nodes if node.op == "call_function"):
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        assert callable(node.target)
        with Trace((), ()) as survey:
            values[node] = node.target(*args, **kwargs)
        counts[node] = survey.operations[-1].macs / len(inputs[0]) if survey.operations else 0.0
        for read in node.all_input_nodes:
            if last[read] is node:  # frees its memory
                del values[read]
    exits = list(zip(graph.outputs, graph.scores, strict=True))
    return divided(exits, lambda node: node.all_input_nodes, (((node,), count) for node, count in counts.items()))
