"""Build an ONNX graph from copies of parts of a flat graph."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

BATCH = "batch"  # the symbol of the batch size
BOOL, INT64, FLOAT = ir.TensorType(ir.DataType.BOOL), ir.TensorType(ir.DataType.INT64), ir.TensorType(ir.DataType.FLOAT)


def reserved(name: str) -> bool:
    """Whether the finished graph uses this name for an input or output of its own."""
    return re.fullmatch(r"label|exit|score|output|threshold_\d+", name) is not None


class GraphBuilder:
    """Nodes and initializers of one graph. Names contain the level, so that they are unique in nested graphs.

    Level 1 reads the whole batch; level n + 1 reads the samples that stay at the n-th exit. `batch` is their number.
    """

    def __init__(self, level: int) -> None:
        self.level = level
        self.batch = BATCH if level == 1 else f"stay_{level - 1}"
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.values: dict[ir.Value, ir.Value] = {}  # value of the flat graph -> its value at this level

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        *,
        name: str,
        type: ir.TypeProtocol | None = None,
        shape: Sequence[int | str | None] | ir.Shape | None = None,
    ) -> ir.Value:
        """Append a node with one output and return the output."""
        name = self.own(name)
        node = ir.node(op_type, inputs, attributes or {}, num_outputs=1, name=name)
        output = node.outputs[0]
        output.name, output.type = name, type
        output.shape = shape if shape is None or isinstance(shape, ir.Shape) else ir.Shape(shape)
        self.nodes.append(node)
        return output

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        """Add a constant and return its value."""
        name = self.own(name)
        if name not in self.initializers:
            self.initializers[name] = ir.val(name, const_value=ir.tensor(array, name=name))
        return self.initializers[name]

    def copy_initializer(self, value: ir.Value) -> ir.Value:
        """Copy an initializer of the flat graph and return the copy."""
        name = self._named(value.name or "constant")
        copy = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
        self.initializers[name] = copy
        return copy

    def copy_node(self, node: ir.Node, local: Callable[[ir.Value], ir.Value]) -> None:
        """Append a copy of a node of the flat graph; its outputs are added to `values`.

        Args:
            node: the node; subgraphs that it contains are copied too.
            local: returns the value in this graph for a value of the flat graph that the node reads.
        """
        self.nodes.append(self._copy(node, local, self.values))

    def _copy(self, node: ir.Node, local: Callable[[ir.Value], ir.Value], made: dict[ir.Value, ir.Value]) -> ir.Node:
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if v is None else local(v) for v in node.inputs],
            [self._copy_attribute(attribute, local) for attribute in node.attributes.values()],
            overload=node.overload,
            num_outputs=len(node.outputs),
            name=self._named(node.name or node.op_type),
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name = self._named(old.name or copy.name or "")
            made[old] = self._described(new, old)
        return copy

    def _copy_attribute(self, attribute: ir.Attr, local: Callable[[ir.Value], ir.Value]) -> ir.Attr:
        if attribute.type == ir.AttributeType.GRAPH:
            return ir.AttrGraph(attribute.name, self._copy_graph(attribute.as_graph(), local))
        if attribute.type == ir.AttributeType.GRAPHS:
            return ir.AttrGraphs(attribute.name, [self._copy_graph(graph, local) for graph in attribute.as_graphs()])
        return attribute

    def _copy_graph(self, graph: ir.Graph, around: Callable[[ir.Value], ir.Value]) -> ir.Graph:
        made: dict[ir.Value, ir.Value] = {}
        for value in (*graph.inputs, *graph.initializers.values()):
            copy = ir.Value(name=self._named(value.name or ""), const_value=value.const_value)
            made[value] = self._described(copy, value)

        def local(value: ir.Value) -> ir.Value:
            return made[value] if value in made else around(value)

        nodes = [self._copy(node, local, made) for node in graph]
        return ir.Graph(
            [made[v] for v in graph.inputs],
            [local(v) for v in graph.outputs],
            nodes=nodes,
            initializers=[made[v] for v in graph.initializers.values()],
            name=self._named(graph.name or "graph"),
        )

    def _described(self, new: ir.Value, old: ir.Value) -> ir.Value:
        new.type = old.type
        new.shape = None if old.shape is None else ir.Shape([self.dim(d) for d in old.shape])
        return new

    def graph(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], name: str, **more: Any) -> ir.Graph:
        """Return the finished graph."""
        return ir.Graph(
            inputs, outputs, nodes=self.nodes, initializers=tuple(self.initializers.values()), name=name, **more
        )

    def dim(self, dim: int | ir.SymbolicDim) -> int | str | None:
        """Convert a dimension of the flat graph to this level."""
        value = dim.value if isinstance(dim, ir.SymbolicDim) else dim
        return re.sub(rf"\b{BATCH}\b", self.batch, value) if isinstance(value, str) else value

    def own(self, name: str) -> str:
        """Return a name that no value of the network has, because the exporter writes no slashes."""
        return f"exits/{name}/{self.level}"

    def _named(self, name: str) -> str:
        return name if self.level == 1 and not reserved(name) else f"{name}/{self.level}"
