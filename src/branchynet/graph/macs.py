"""Multiply-accumulates of a flat graph, divided among the trunk and the branches by the rule of the cut."""

import math

import onnx_ir as ir

from .cut import cut
from .flat import FlatGraph
from .onnx_exits import parents
from .section import BATCH


def exit_macs(flat: FlatGraph) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """`(trunk, branch)`, one figure an exit each: multiply-accumulates a sample of convolutions and matrix products.

    What only exit n needs is its branch; what a later exit, or its score, needs as well is the trunk's segment up to
    exit n.
    """
    named = {value.name: value for value in flat.model.graph.outputs}
    exits = [[named[name] for name in (f"output_{n}", f"score_{n}") if name in named] for n in range(1, flat.exits + 1)]
    first = cut(exits, parents)
    last = cut(exits[::-1], parents)  # the last exit that needs it, counted from the end
    trunk, branch = [0.0] * flat.exits, [0.0] * flat.exits
    for node in flat.model.graph:
        value = node.outputs[0]
        if value in first:
            n = first[value]
            own = flat.exits + 1 - last[value] == n and n < flat.exits
            (branch if own else trunk)[n - 1] += _node_macs(node)
    return tuple(trunk), tuple(branch)


def _node_macs(node: ir.Node) -> float:
    shapes = [
        None if v is None or v.shape is None else [_dim(d) for d in v.shape] for v in (*node.inputs, node.outputs[0])
    ]
    first, second, output = shapes[0] if shapes else None, shapes[1] if len(shapes) > 2 else None, shapes[-1]
    if node.op_type == "Conv" and second and output:
        return math.prod(output) * math.prod(second[1:])
    if node.op_type == "ConvTranspose" and first and second:
        return math.prod(first) * math.prod(second[1:])
    if node.op_type in ("Gemm", "MatMul") and first and output:
        transposed = node.op_type == "Gemm" and "transA" in node.attributes and node.attributes["transA"].as_int()
        return math.prod(output) * (first[0] if transposed else first[-1])
    return 0.0


def _dim(dim: int | ir.SymbolicDim) -> int:
    if isinstance(dim, int):
        return dim
    value = dim.evaluate({BATCH: 1})
    return value if isinstance(value, int) else 1
