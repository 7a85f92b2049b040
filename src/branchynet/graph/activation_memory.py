"""Memory that a graph needs per sample while it runs."""

import math
from collections.abc import Mapping

import onnx_ir as ir

from .macs import sample_shape
from .onnx_flat import FlatGraph


def sample_bytes(flat: FlatGraph) -> int:
    """Return the peak of activation bytes per sample when the nodes run in the order of the graph.

    A value is in use from the node that computes it to the last node that reads it; outputs of the network are in use
    to the end. Memory that a runtime needs inside an operator is not included. Free lengths are those of the example;
    unknown dimensions count as 1.
    """
    nodes = list(flat.model.graph)
    last = {v: i for i, node in enumerate(nodes) for v in (*node.outputs, *node.inputs) if v is not None}
    outputs = set(flat.model.graph.outputs)
    sizes = {length.name: length.example for length in flat.lengths}
    used = most = sum(_bytes(v, sizes) for v in flat.model.graph.inputs)
    for i, node in enumerate(nodes):
        used += sum(_bytes(v, sizes) for v in node.outputs)
        most = max(most, used)
        done = {v for v in (*node.inputs, *node.outputs) if v is not None and last[v] == i and not v.is_initializer()}
        used -= sum(_bytes(v, sizes) for v in done - outputs)
    return most


def _bytes(value: ir.Value, sizes: Mapping[str, int]) -> int:
    if value.dtype is None or value.shape is None:
        return 0
    return math.ceil(value.dtype.itemsize * math.prod(1 if math.isnan(d) else d for d in sample_shape(value, sizes)))
