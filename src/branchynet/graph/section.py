"""A graph under construction, into which parts of a flat graph are copied."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

BATCH = "batch"  # the symbol for how many samples the network is given
BOOL, INT64, FLOAT = ir.TensorType(ir.DataType.BOOL), ir.TensorType(ir.DataType.INT64), ir.TensorType(ir.DataType.FLOAT)


def reserved(name: str) -> bool:
    """Whether the finished graph calls one of its own inputs or outputs so."""
    return re.fullmatch(r"label|exit|score|output|threshold_\d+", name) is not None


class Section:
    """Nodes and initializers of one graph, with the names of its level, so that names stay unique when graphs nest.

    Level 1 sees the whole batch; level n + 1 the samples that stay at the n-th exit. Its symbol for how many: `batch`.
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
        """Append a node of our own with one output and return that output."""
        name = self.own(name)
        node = ir.node(op_type, inputs, attributes or {}, num_outputs=1, name=name)
        output = node.outputs[0]
        output.name, output.type = name, type
        output.shape = shape if shape is None or isinstance(shape, ir.Shape) else ir.Shape(shape)
        self.nodes.append(node)
        return output

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        """An initializer of our own in this graph."""
        name = self.own(name)
        if name not in self.initializers:
            self.initializers[name] = ir.val(name, const_value=ir.tensor(array, name=name))
        return self.initializers[name]

    def copy_initializer(self, value: ir.Value) -> ir.Value:
        """The initializer `value` of the flat graph, as one of this graph."""
        name = self._named(value.name or "constant")
        copy = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
        self.initializers[name] = copy
        return copy

    def copy_node(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> None:
        """A copy of a flat graph's node that reads `inputs`; its outputs are registered in `values`."""
        copy = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            node.attributes.values(),
            overload=node.overload,
            num_outputs=len(node.outputs),
            name=self._named(node.name or node.op_type),
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type = self._named(old.name or copy.name or ""), old.type
            new.shape = None if old.shape is None else ir.Shape([self.dim(d) for d in old.shape])
            self.values[old] = new
        self.nodes.append(copy)

    def graph(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], name: str, **more: Any) -> ir.Graph:
        """The finished graph."""
        return ir.Graph(
            inputs, outputs, nodes=self.nodes, initializers=tuple(self.initializers.values()), name=name, **more
        )

    def dim(self, dim: int | ir.SymbolicDim) -> int | str | None:
        """A dimension of the flat graph as this level sees it."""
        value = dim.value if isinstance(dim, ir.SymbolicDim) else dim
        return re.sub(rf"\b{BATCH}\b", self.batch, value) if isinstance(value, str) else value

    def own(self, name: str) -> str:
        """A name that no value of the network has, since the exporter writes no slashes."""
        return f"exits/{name}/{self.level}"

    def _named(self, name: str) -> str:
        return name if self.level == 1 and not reserved(name) else f"{name}/{self.level}"
