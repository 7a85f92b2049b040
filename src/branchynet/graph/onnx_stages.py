"""Write each stage of a network with early exits as an ONNX graph of its own.

Stage n reads inputs of the network and values that earlier stages computed, for the samples that stay. It returns the
answer of its exit and the values that later stages read. The batch is the first dimension of every input and output.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import onnx_ir as ir

from ..policy.values import Policy
from .onnx_builder import BATCH, INT64, GraphBuilder, reserved
from .onnx_cut import OnnxCut, cut_graph, static_shape
from .onnx_flat import IR_VERSION, OPSET, FlatGraph
from .subgraphs import reads

ANSWERS = ("label", "score", "output")


@dataclass(frozen=True)
class StageGraph:
    """One stage.

    Attributes:
        exit: the number of its exit.
        model: its outputs are ``label`` int64, ``score`` float32, ``output`` and the values that later stages read.
        sources: for every input of the model, the number of the stage that computes it; 0 for inputs of the network.
    """

    exit: int
    model: ir.Model
    sources: dict[str, int]


def write_stages(flat: FlatGraph, policy: Policy) -> list[StageGraph]:
    """Return the stages of the exits that `policy` enables, in order.

    Args:
        flat: a flat graph with scores and a free batch size.
        policy: an exit with the threshold None is left out together with its branch.

    Raises:
        GraphError: a value that must cross a cut has no batch dimension and is too costly to recompute.
    """
    cut = cut_graph(flat, policy, apart=True)
    return [_Stage(flat, cut, i).graph() for i in range(len(cut.exits))]


class _Stage:
    """The state of one stage while it is written, counted from 0."""

    def __init__(self, flat: FlatGraph, cut: OnnxCut, i: int) -> None:
        self.flat, self.cut, self.i = flat, cut, i
        self.section = GraphBuilder(1)
        self.inputs: list[ir.Value] = []
        self.sources: dict[str, int] = {}

    def graph(self) -> StageGraph:
        plan, section = self.cut.plans[self.i], self.section
        for value, axis in plan.takes.items():
            self._take(value, axis or 0)
        if not plan.takes:  # the answer depends on the number of samples alone
            self._take(self.flat.model.graph.inputs[0], 0)
        for node in self.flat.model.graph:
            if any(self.cut.stage.get(v) == self.i + 1 for v in node.outputs):
                self._emit(node)
        output, score = (self._local(v) for v in self.cut.needs[self.i])
        shape = None if output.shape is None else ir.Shape([output.shape[0], *list(output.shape)[2:]])
        label = section.op("ArgMax", [output], {"axis": 1, "keepdims": 0}, name="label", type=INT64, shape=shape)
        given = [self._give(value) for value in plan.gives]
        answers = []
        for name, value in zip(ANSWERS, (label, score, output), strict=True):
            if value in self.inputs or value in given or value in answers or value.is_initializer():
                value = section.op("Identity", [value], name=name, type=value.type, shape=value.shape)
            value.name = name
            answers.append(value)
        graph = section.graph(self.inputs, [*answers, *given], f"stage_{self.i + 1}", opset_imports={"": OPSET})
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="branchynet")
        return StageGraph(self.cut.exits[self.i], model, self.sources)

    def _take(self, value: ir.Value, axis: int) -> None:
        """Add an input for a value that crosses, and move its batch dimension back to `axis`."""
        dims = [self.section.dim(d) for d in value.shape or ()]
        given = ir.Value(name=_carried_name(value, axis), type=value.type, shape=ir.Shape(_batch_first(dims, axis)))
        self.inputs.append(given)
        self.sources[str(given.name)] = self.cut.stage[value]
        if axis:
            order = [*range(1, axis + 1), 0, *range(axis + 1, len(dims))]
            given = self.section.op(
                "Transpose", [given], {"perm": order}, name=str(value.name), type=value.type, shape=dims
            )
        self.section.values[value] = given

    def _give(self, value: ir.Value) -> ir.Value:
        """Return a value that later stages read, with its batch dimension first."""
        local, axis = self.section.values[value], self._axis(value)
        if axis:
            dims = list(local.shape or ())
            order = _batch_first(list(range(len(dims))), axis)
            local = self.section.op(
                "Transpose",
                [local],
                {"perm": order},
                name=f"{value.name}/given",
                type=local.type,
                shape=_batch_first(dims, axis),
            )
        local.name = _carried_name(value, axis)
        return local

    def _axis(self, value: ir.Value) -> int:
        later = self.cut.plans[self.i + 1 :]
        return next(plan.takes[value] for plan in later if value in plan.takes) or 0

    def _local(self, value: ir.Value) -> ir.Value:
        """Return the value in this stage for a value of the flat graph: taken, copied or computed again."""
        if value not in self.section.values:
            if value.is_initializer():
                self.section.values[value] = self.section.copy_initializer(value)
            else:
                node = value.producer()
                assert node is not None, f"stage {self.i + 1} needs {value.name!r}, which it does not take"
                self._emit(node)
        return self.section.values[value]

    def _emit(self, node: ir.Node) -> None:
        if node.op_type != "Shape" or not self._shape(node):
            self.section.copy_node(node, self._local)

    def _shape(self, node: ir.Node) -> bool:
        """Whether the node is written as the shape of an input, because this stage does not have the value itself."""
        (source,), result = reads(node), node.outputs[0]
        here = source in self.section.values or self.cut.stage.get(source) == self.i + 1
        if here or (known := static_shape(node, self.cut.holders)) is None:
            return False
        parts: list[ir.Value] = []
        for numbers, dims in groupby(known, lambda dim: isinstance(dim, int)):
            own = list(dims)
            if numbers:
                parts.append(self.section.constant(f"{result.name}/rest_{len(parts)}", np.array(own, np.int64)))
            else:
                parts += [self._size(dim, f"{result.name}/{dim}_{len(parts)}") for dim in own]
        if len(parts) > 1:
            parts = [self.section.op("Concat", parts, {"axis": 0}, name=str(result.name), type=INT64)]
        self.section.values[result] = parts[0]
        return True

    def _size(self, dim: str, name: str) -> ir.Value:
        """Return the batch size or a free length, as a vector of one number."""
        source, axis = (None, 0) if dim == BATCH else self.cut.holders[dim]
        value = self.inputs[0] if source is None else self.section.values[source]
        return self.section.op("Shape", [value], {"start": axis, "end": axis + 1}, name=name, type=INT64, shape=[1])


def _carried_name(value: ir.Value, axis: int) -> str:
    name = f"{value.name}/carried" if reserved(str(value.name)) else str(value.name)
    return f"{name}/batch_first" if axis else name


def _batch_first(dims: list[Any], axis: int) -> list[Any]:
    return [dims[axis], *dims[:axis], *dims[axis + 1 :]] if dims else []
