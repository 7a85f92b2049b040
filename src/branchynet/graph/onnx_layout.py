"""Keep feature maps in the memory layout in which ONNX Runtime convolves.

Between convolutions ONNX Runtime holds maps in blocks of 8 or 16 channels, and it fuses an addition into the
convolution before it where both sides lie so. A side that comes from elsewhere (a slice, a padded shortcut, the graph
around an ``If``) does not, and what follows from one such addition is never in blocks again: every later addition of a
chain of residual blocks runs by itself, between copies to and fro. One pooling of single positions, which changes no
value, brings that side into blocks.
"""

import onnx_ir as ir

_BLOCK = 16  # channels of the widest block there is
_POOLS = {"MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"}
_OF_ONE = {"Relu", "Sigmoid", "Tanh"}
_OF_TWO = {"Add", "Mul"}


def keep_blocks(model: ir.Model) -> None:
    """Bring the side of an addition into blocks where a convolution made the other, and another reads the sum.

    In place, in all graphs of the model. Static graphs and those with exits get it alike.
    """
    _keep_blocks(model.graph, 1)


def _keep_blocks(graph: ir.Graph, level: int) -> None:
    blocked: set[ir.Value] = set()
    pooled: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                _keep_blocks(attribute.as_graph(), level + 1)
        if node.op_type == "Add" and _read_on(node.outputs[0]):
            for position, (here, there) in enumerate((node.inputs, node.inputs[::-1])):
                if here is not None and here not in blocked and _fusable(there) and _fits(here, there):
                    if here not in pooled:
                        pooled[here] = _pool(graph, node, here, level)
                    blocked.add(pooled[here])
                    node.replace_input_with(position, pooled[here])
        if _in_blocks(node, blocked):
            blocked.add(node.outputs[0])


def _in_blocks(node: ir.Node, blocked: set[ir.Value]) -> bool:
    """Whether ONNX Runtime will hold the node's output in blocks."""
    if node.op_type == "Conv" or node.op_type in _POOLS:
        return _maps(node.outputs[0])
    if node.op_type in _OF_ONE:
        return node.inputs[0] in blocked
    if node.op_type in _OF_TWO:
        one, other = node.inputs
        return one in blocked and other in blocked and one.shape == other.shape
    return node.op_type == "Concat" and node.attributes["axis"].as_int() == 1 and blocked.issuperset(node.inputs)


def _maps(value: ir.Value) -> bool:
    """Whether a value is float32 maps `(B, C, H, W)` of full blocks."""
    if value.dtype != ir.DataType.FLOAT or value.shape is None or len(value.shape) != 4:
        return False
    channels = value.shape[1]
    return isinstance(channels, int) and channels % _BLOCK == 0


def _fusable(value: ir.Value | None) -> bool:
    """Whether an addition that reads the value can become part of the convolution that made it."""
    producer = None if value is None else value.producer()
    return producer is not None and producer.op_type == "Conv" and value is not None and len(value.uses()) == 1


def _fits(here: ir.Value, there: ir.Value | None) -> bool:
    return there is not None and _maps(here) and not here.is_initializer() and here.shape == there.shape


def _read_on(value: ir.Value) -> bool:
    """Whether a convolution reads the value, or what an activation makes of it."""
    readers = list(value.consumers())
    readers += [later for node in readers if node.op_type in _OF_ONE for later in node.outputs[0].consumers()]
    return any(node.op_type == "Conv" for node in readers)


def _pool(graph: ir.Graph, before: ir.Node, value: ir.Value, level: int) -> ir.Value:
    """The same values, from a pooling of single positions before a node."""
    name = f"exits/blocked/{value.name}/{level}"
    pool = ir.node("AveragePool", [value], {"kernel_shape": [1, 1]}, name=name)
    output = pool.outputs[0]
    output.name, output.type, output.shape = name, value.type, value.shape
    graph.insert_before(before, pool)
    return output
