"""Convert a flat graph to half precision before the cut, so that the values that cross the cut are half as large.

The last product of every exit and all that follows it compute in float32: its output, its score, the thresholds. So do
nodes with subgraphs, and operators that ONNX does not define for the type (in opset 20, convolutions in bfloat16).
Their weights are stored in half precision all the same, and cast to float32 where they are read.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from ..errors import GraphError
from .onnx_builder import FLOAT
from .onnx_flat import OPSET, FlatGraph
from .quantize import last_products
from .subgraphs import graphs_of

HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
LARGEST = {"fp16": 65504.0, "bf16": (2 - 2**-7) * 2.0**127}  # largest finite values
MAGNITUDE = "magnitude/"  # before the name of a value: its largest finite magnitude
_SHRINK = "shrink"  # the name of a constant
_FLOAT_LIMIT = float(np.finfo(np.float32).max)
_LIMITING = {"Clip", "Min", "Max"}
Reader = tuple[ir.Node, int]  # a node, and which of its inputs
_LARGE = 256  # elements from which a weight is stored in half precision although float32 is computed with it


def in_half(flat: FlatGraph, precision: str) -> FlatGraph:
    """Return a copy of the graph that computes in half precision. Inputs, outputs and scores stay float32.

    A constant at the limit of float32, such as a mask, becomes half of the limit of the type.

    Args:
        flat: the graph.
        precision: a key of `HALF`.

    Raises:
        GraphError: a weight is too large for the type, or there is nothing to convert.
    """
    return _Conversion(flat, precision).graph()


class _Conversion:
    """The state of one conversion."""

    def __init__(self, flat: FlatGraph, precision: str) -> None:
        self.flat = replace(flat, model=flat.model.clone())
        self.nodes = self.flat.model.graph
        self.precision, self.kind = precision, HALF[precision]
        products, after = last_products(self.flat)
        self.after = set(after)
        self.halved = {n for n in self.nodes if n not in self.after and n not in products and _takes(n, self.kind)}
        self.made: list[ir.Value] = []  # values that become half

    def graph(self) -> FlatGraph:
        values = [*self.nodes.inputs, *self.nodes.initializers.values(), *(v for n in self.nodes for v in n.outputs)]
        if own := [v.name for v in values if v.dtype == self.kind]:
            raise GraphError(
                f"the network already computes in {self.kind.name.lower()} ({own[0]!r}): export it with "
                "precision='float32', which keeps its types, or convert it first: copy.deepcopy(net).float()"
            )
        for value in list(self.nodes.initializers.values()):
            self._convert_weight(value)
        for node in self.nodes:
            if node in self.halved:
                _set_type(node, self.kind)
                for value in node.outputs:
                    if value.dtype == ir.DataType.FLOAT:
                        value.type = ir.TensorType(self.kind)
                        self.made.append(value)
        if not self.made:
            raise GraphError(
                f"the network has no float32 convolution or matrix product to convert to {self.precision}; export it "
                "in float32"
            )
        half = set(self.made)
        for value in [v for v in values if v.dtype == ir.DataType.FLOAT]:
            _insert_cast(self.nodes, value, self.kind, [use for use in value.uses() if self._wants_half(use)])
        for value in self.made:
            _insert_cast(
                self.nodes, value, ir.DataType.FLOAT, [use for use in value.uses() if not self._wants_half(use)]
            )
        for place, value in enumerate(self.nodes.outputs):
            if value in half:
                name, value.name = value.name, f"{value.name}/half"
                self.nodes.outputs[place] = _cast(self.nodes, value, ir.DataType.FLOAT, str(name))
        passes.TopologicalSortPass()(self.flat.model)
        return self.flat

    def _wants_half(self, use: Reader) -> bool:
        return use[0] in self.halved and not _is_fixed(*use)

    def _convert_weight(self, value: ir.Value) -> None:
        """Store a weight in half precision for the nodes that may read it so."""
        tensor = value.const_value
        if value.dtype != ir.DataType.FLOAT or tensor is None:
            return
        large = tensor.size >= _LARGE
        uses = [u for u in value.uses() if self._wants_half(u) or (large and self._is_weight(u))]
        if not uses:
            return
        array, most = tensor.numpy(), LARGEST[self.precision]
        at_limit = np.abs(array) == _FLOAT_LIMIT
        if at_limit.any():
            limiting = all(use[0].op_type in _LIMITING for use in uses)
            array = np.where(at_limit, np.sign(array) * np.float32(most if limiting else most / 2), array)
        magnitudes = np.abs(array, where=np.isfinite(array), out=np.zeros_like(array))
        if (largest := float(magnitudes.max(initial=0.0))) > most:
            raise GraphError(too_large(f"the weight {value.name!r}", largest, self.precision))
        half = ir.Value(name=value.name, shape=value.shape, type=ir.TensorType(self.kind))
        half.const_value = ir.tensor(array.astype(self.kind.numpy()), dtype=self.kind, name=value.name)
        for use in uses:
            use[0].replace_input_with(use[1], half)
        del self.nodes.initializers[str(value.name)]
        if value.uses():
            value.name = f"{value.name}/float"
            self.nodes.initializers.add(value)
        self.nodes.initializers.add(half)
        self.made.append(half)

    def _is_weight(self, use: Reader) -> bool:
        """Whether a node outside the exits' ends reads the value as more than a size."""
        return use[0] not in self.after and use[0].graph is self.nodes and not _is_fixed(*use)


def rounded(flat: FlatGraph, precision: str, *, toward_zero: bool = False) -> FlatGraph:
    """Return a float32 graph that rounds every half value of a graph from `in_half`, for runtimes without the type.

    For every rounding there is a further output, `MAGNITUDE` and the name of the value.

    Args:
        flat: the graph from `in_half`.
        precision: a key of `HALF`.
        toward_zero: drop the bits that do not fit, instead of rounding to the nearest value.
    """
    kind = HALF[precision]
    copy = replace(flat, model=flat.model.clone())
    graph = copy.model.graph
    for value in graph.initializers.values():
        if value.dtype == kind and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.type = FLOAT
    for node in list(graph):
        _set_type(node, ir.DataType.FLOAT, of=kind)
        for value in [v for v in node.outputs if v.dtype == kind]:
            value.type, uses = FLOAT, list(value.uses())
            half = _insert_cast(graph, value, kind, uses)
            single = _insert_cast(graph, half, ir.DataType.FLOAT, uses)
            if toward_zero and uses:
                _decrease(graph, value, single, kind, uses)
            source = node.inputs[0] if node.op_type == "Cast" else None
            _add_magnitude(graph, value, value if source is None or source.dtype != ir.DataType.FLOAT else source)
    passes.TopologicalSortPass()(copy.model)
    return copy


def too_large(what: str, largest: float, precision: str) -> str:
    """Return the message for a value that does not fit."""
    remedy = "use precision='bf16', or scale it" if precision == "fp16" else "export in float32"
    return f"{what} reaches {largest:.6g}, and {precision} holds at most {LARGEST[precision]:.6g}: {remedy}"


def _takes(node: ir.Node, kind: ir.DataType) -> bool:
    """Whether ONNX defines the operator for the type, and the node reads or gives float32."""
    values = [*(v for v in node.inputs if v is not None), *node.outputs]
    if node.domain or any(graphs_of(node)) or any(not isinstance(v.type, ir.TensorType) for v in values):
        return False
    schema = onnx.defs.get_schema(node.op_type, OPSET)
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    name, floats = f"tensor({kind.name.lower()})", ir.DataType.FLOAT
    read = [i for i, v in enumerate(node.inputs) if v is not None and v.dtype == floats and not _is_fixed(node, i)]
    given = [i for i, v in enumerate(node.outputs) if v.dtype == floats]
    reads = {_parameter(schema.inputs, i).type_str for i in read}
    gives = {_parameter(schema.outputs, i).type_str for i in given}
    if node.op_type not in ("Cast", "ConstantOfShape") and not gives <= reads:
        return False
    return bool(reads | gives) and all(name in allowed[parameter] for parameter in reads | gives)


def _is_fixed(node: ir.Node, index: int) -> bool:
    """Whether the operator reads this input in one type only, as a Resize its scales."""
    if node.domain:
        return True
    schema = onnx.defs.get_schema(node.op_type, OPSET)
    return _parameter(schema.inputs, index).type_str.startswith("tensor(")


def _parameter(
    parameters: Iterable[onnx.defs.OpSchema.FormalParameter], index: int
) -> onnx.defs.OpSchema.FormalParameter:
    """Return the parameter at a position; the last one may be variadic."""
    known = list(parameters)
    return known[min(index, len(known) - 1)]


def _set_type(node: ir.Node, kind: ir.DataType, of: ir.DataType = ir.DataType.FLOAT) -> None:
    """Change the type that an attribute of the node gives to its output, if that is `of`."""
    if node.op_type == "Cast" and node.attributes["to"].as_int() == of:
        node.attributes["to"] = ir.AttrInt64("to", kind)
    if node.op_type == "ConstantOfShape" and node.outputs[0].dtype == of:
        value = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1)
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(value.astype(kind.numpy()), dtype=kind))


def _insert_cast(graph: ir.Graph, value: ir.Value, kind: ir.DataType, uses: Iterable[Reader]) -> ir.Value:
    """Give some of the readers of a value its cast."""
    if not (uses := list(uses)):
        return value
    output = _cast(graph, value, kind, f"{value.name}/{kind.name.lower()}")
    for use in uses:
        use[0].replace_input_with(use[1], output)
    return output


def _decrease(graph: ir.Graph, value: ir.Value, nearest: ir.Value, kind: ir.DataType, uses: Sequence[Reader]) -> None:
    """Give the readers the next smaller number of the type, in magnitude, where `nearest` is larger than the value.

    That number is `nearest` times 1 - 2^-B, rounded to the B bits of the type: the product is at least half a step and
    less than a step away, or exactly a step if `nearest` is a power of 2.
    """
    name, bits = f"{value.name}/{kind.name.lower()}", {"FLOAT16": 11, "BFLOAT16": 8}[kind.name]
    factor = graph.initializers.get(_SHRINK)
    if factor is None:
        factor = ir.val(_SHRINK, const_value=ir.tensor(np.array(1 - 2.0**-bits, np.float32), name=_SHRINK))
        graph.initializers.add(factor)

    def add(operator: str, what: str, *read: ir.Value, bool_: bool = False) -> ir.Value:
        node = ir.node(operator, list(read), name=f"{name}/{what}")
        made = node.outputs[0]
        made.name, made.shape, made.type = node.name, value.shape, ir.TensorType(ir.DataType.BOOL) if bool_ else FLOAT
        graph.append(node)
        return made

    sizes = add("Abs", "nearest_size", nearest), add("Abs", "size", value)
    less = _cast(graph, add("Mul", "times", nearest, factor), kind, f"{name}/less")
    smaller = _cast(graph, less, ir.DataType.FLOAT, f"{name}/smaller")
    kept = add("Where", "kept", add("Greater", "beyond", *sizes, bool_=True), smaller, nearest)
    for use in uses:
        use[0].replace_input_with(use[1], kept)


def _cast(graph: ir.Graph, value: ir.Value, kind: ir.DataType, name: str) -> ir.Value:
    node = ir.node("Cast", [value], {"to": kind}, name=name)
    output = node.outputs[0]
    output.name, output.shape, output.type = name, value.shape, ir.TensorType(kind)
    graph.append(node)
    return output


def _add_magnitude(graph: ir.Graph, value: ir.Value, source: ir.Value) -> None:
    """Add an output for the largest finite magnitude of a value, named after its source."""
    zero = graph.initializers.get(MAGNITUDE)
    if zero is None:
        zero = ir.val(MAGNITUDE, const_value=ir.tensor(np.zeros((), np.float32), name=MAGNITUDE))
        graph.initializers.add(zero)
    name = f"{MAGNITUDE}{source.name}"
    infinite = ir.node("IsInf", [value], name=f"{name}/infinite")
    finite = ir.node("Where", [infinite.outputs[0], zero, value], name=f"{name}/finite")
    sizes = ir.node("Abs", finite.outputs, name=f"{name}/sizes")
    most = ir.node("ReduceMax", sizes.outputs, {"keepdims": 0}, name=name)
    for node in (infinite, finite, sizes, most):
        node.outputs[0].name = node.name
        node.outputs[0].type = ir.TensorType(ir.DataType.BOOL) if node is infinite else FLOAT
        node.outputs[0].shape = value.shape if node is not most else ir.Shape([])
        graph.append(node)
    graph.outputs.append(most.outputs[0])
