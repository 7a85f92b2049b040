"""Cut a flat ONNX graph into one stage per enabled exit."""

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from ..policy.values import Policy
from .cut import Dependence, StagePlan, cut, plan_stages
from .onnx_builder import BATCH
from .onnx_flat import FlatGraph
from .subgraphs import reads, within

_HEAVY = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN"}
# The inputs of these after the first are indices or sizes.
_OF_FIRST = {"Reshape", "Expand", "Slice", "Tile", "Pad", "Squeeze", "Unsqueeze", "Split"}


@dataclass(frozen=True)
class OnnxCut:
    """The stages of the enabled exits of a flat graph.

    Attributes:
        exits: the numbers of the enabled exits.
        needs: the output and the score of each enabled exit.
        stage: the stage of every value that some exit needs, from 1; 0 for the inputs of the network.
        plans: what each stage takes, recomputes and gives.
        holders: an input with each free length, and the dimension of the input that has it.
    """

    exits: list[int]
    needs: list[tuple[ir.Value, ir.Value]]
    stage: dict[ir.Value, int]
    plans: list[StagePlan[ir.Value]]
    holders: dict[str, tuple[ir.Value, int]]


def parents(value: ir.Value) -> list[ir.Value]:
    """Return the values that the producer of `value` reads."""
    node = value.producer()
    return [] if node is None else reads(node)


def cut_graph(flat: FlatGraph, policy: Policy, *, apart: bool = False) -> OnnxCut:
    """Cut a flat graph with scores into the stages of the exits that `policy` enables.

    Args:
        flat: the graph.
        policy: an exit with the threshold None is left out together with its branch.
        apart: whether the stages are separate graphs, for a graph with a free batch size. They then compute values
            that are the same for every batch themselves, and need no value only for its shape.

    Raises:
        GraphError: a value that must cross has no batch dimension and is too costly to recompute.
    """
    exits = [n for n, enabled in enumerate(policy.enabled, 1) if enabled]
    needs = [(flat.value(f"output_{n}"), flat.value(f"score_{n}")) for n in exits]
    stage = cut(needs, parents)
    for node in flat.model.graph:  # the first stage that needs an output computes all outputs
        made = [v for v in node.outputs if v in stage]
        stage |= dict.fromkeys(made, min((stage[v] for v in made), default=0))
    stage |= dict.fromkeys(flat.model.graph.inputs, 0)
    dependence = _dependence(flat)
    if apart:
        constant = {value for value in stage if not dependence.varies(value)}
        dependence.recomputed |= constant
        dependence.costly -= constant

    inputs = {value.name: value for value in flat.model.graph.inputs}
    holders = {length.name: (inputs[length.at[0][0]], length.at[0][1]) for length in flat.lengths}

    def taken(value: ir.Value) -> list[ir.Value]:
        node = value.producer()
        known = static_shape(node, holders) if apart and node is not None else None
        if known is not None:  # an input has the length and is small
            return list(dict.fromkeys(holders[d][0] for d in known if d in holders))
        return [v for v in parents(value) if not v.is_initializer()]

    plans = plan_stages(
        needs,
        stage,
        taken,
        batch_axis,
        dependence,
        lambda value: f"{value.name!r} {value.shape}",
    )
    return OnnxCut(exits, needs, stage, plans, holders)


def batch_axis(value: ir.Value) -> int | None:
    """Which dimension of a tensor is the batch; None if none or two are, or only a multiple of it is."""
    if not isinstance(value.type, ir.TensorType | None):  # the shape of a sequence is that of its tensors
        return None
    axes = [axis for axis, dim in enumerate(value.shape or ()) if dim == BATCH]
    return axes[0] if len(axes) == 1 else None


def _dependence(flat: FlatGraph) -> Dependence[ir.Value]:
    """How the values of a flat graph depend on the batch; a fixed batch never becomes smaller."""
    inputs = flat.model.graph.inputs if flat.dynamic else []
    dependence = Dependence(inputs, [v for v in inputs if v.dtype is not None and v.dtype.is_integer()])
    for node in flat.model.graph:
        read, lookup = reads(node), node.op_type.startswith(("Gather", "Scatter"))
        measures = node.op_type in ("Shape", "Size")
        start = node.attributes["start"].as_int() if "start" in node.attributes else 0
        if measures and start >= 1 and batch_axis(read[0]) == 0:  # all dimensions except the batch
            continue
        data = read[:1] if lookup or node.op_type in _OF_FIRST else read
        costly = _costly(node)
        for value in node.outputs:
            integer = value.dtype is not None and value.dtype.is_integer()
            number = True if integer else False if lookup or value.dtype == ir.DataType.BOOL else None
            dependence.add(value, read, data, number=number, costly=costly, measures=measures)
    return dependence


def _costly(node: ir.Node) -> bool:
    """Whether a node, or a node inside it, is too expensive to recompute."""
    return any(inner.op_type in _HEAVY for inner in within(node))


def static_shape(node: ir.Node, lengths: Container[Any]) -> list[Any] | None:
    """The result of a Shape node as numbers, names of `lengths`, and ``"batch"`` for a leading batch; else None."""
    if node.op_type != "Shape" or (source := reads(node)[0]).shape is None:
        return None
    assert source.shape is not None
    dims = [d if isinstance(d, int) else d.value for d in source.shape]
    if BATCH in dims and batch_axis(source) != 0:
        return None
    start, end = (node.attributes[k].as_int() if k in node.attributes else None for k in ("start", "end"))
    known = [d for d in dims[start:end] if isinstance(d, int) or d == BATCH or d in lengths]
    return known if len(known) == len(dims[start:end]) else None
