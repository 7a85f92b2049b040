"""Keep feature maps in the memory layout of ONNX Runtime's convolutions.

Between convolutions, ONNX Runtime stores maps in blocks of 8 or 16 channels, and it fuses an addition into the
convolution before it if both operands are in blocks. An operand from elsewhere (a slice, a padded shortcut, the graph
around an ``If``) is not, and neither is any sum that depends on it: every later addition in a chain of residual blocks
then runs unfused, between layout conversions. A pooling with a window of one position changes no value and puts that
operand into blocks.
"""

import onnx_ir as ir

_BLOCK = 16  # channels of the widest block
_POOLS = {"MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"}
_OF_ONE = {"Relu", "Sigmoid", "Tanh"}
_OF_TWO = {"Add", "Mul"}


def keep_blocks(model: ir.Model) -> None:
    """Put an operand of an addition into blocks if a convolution computes the other and a convolution reads the sum.

    The model and its subgraphs are changed in place. Plain graphs and graphs with exits are treated equally.
    """
    _keep_blocks(model.graph, 1)


def _keep_blocks(graph: ir.Graph, level: int) -> None:
    blocked: set[ir.Value] = set()
    pooled: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                _keep_blocks(attribute.as_graph(), level + 1)
        if node.op_type == "Add" and _reaches_convolution(node.outputs[0]):
            for position, (value, other) in enumerate((node.inputs, node.inputs[::-1])):
                if value is not None and value not in blocked and _fusable(other) and _fits(value, other):
                    if value not in pooled:
                        pooled[value] = _pool(graph, node, value, level)
                    blocked.add(pooled[value])
                    node.replace_input_with(position, pooled[value])
        if _in_blocks(node, blocked):
            blocked.add(node.outputs[0])


def _in_blocks(node: ir.Node, blocked: set[ir.Value]) -> bool:
    """Whether ONNX Runtime stores the node's output in blocks."""
    if node.op_type == "Conv" or node.op_type in _POOLS:
        return _maps(node.outputs[0])
    if node.op_type in _OF_ONE:
        return node.inputs[0] in blocked
    if node.op_type in _OF_TWO:
        one, other = node.inputs
        return one in blocked and other in blocked and one.shape == other.shape
    return node.op_type == "Concat" and node.attributes["axis"].as_int() == 1 and blocked.issuperset(node.inputs)


def _maps(value: ir.Value) -> bool:
    """Whether a value is a float32 map `(B, C, H, W)` of whole blocks."""
    if value.dtype != ir.DataType.FLOAT or value.shape is None or len(value.shape) != 4:
        return False
    channels = value.shape[1]
    return isinstance(channels, int) and channels % _BLOCK == 0


def _fusable(value: ir.Value | None) -> bool:
    """Whether an addition that reads the value can be fused into the convolution that computes it."""
    producer = None if value is None else value.producer()
    return producer is not None and producer.op_type == "Conv" and value is not None and len(value.uses()) == 1


def _fits(value: ir.Value, other: ir.Value | None) -> bool:
    return other is not None and _maps(value) and not value.is_initializer() and value.shape == other.shape


def _reaches_convolution(value: ir.Value) -> bool:
    """Whether a convolution reads the value, directly or through an activation."""
    readers = list(value.consumers())
    readers += [later for node in readers if node.op_type in _OF_ONE for later in node.outputs[0].consumers()]
    return any(node.op_type == "Conv" for node in readers)


def _pool(graph: ir.Graph, before: ir.Node, value: ir.Value, level: int) -> ir.Value:
    """Insert a pooling with a window of one position before a node, and return its output."""
    name = f"exits/blocked/{value.name}/{level}"
    pool = ir.node("AveragePool", [value], {"kernel_shape": [1, 1]}, name=name)
    output = pool.outputs[0]
    output.name, output.type, output.shape = name, value.type, value.shape
    graph.insert_before(before, pool)
    return output
