"""Count multiply-accumulates of a flat graph, and divide them between trunk and branches by the rule of the cut."""

import math
from collections.abc import Callable, Mapping

import onnx_ir as ir

from .cut import divided
from .onnx_builder import BATCH
from .onnx_cut import parents
from .onnx_flat import FlatGraph
from .subgraphs import graphs_of


def exit_macs(flat: FlatGraph) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return multiply-accumulates per sample as `(trunk, branch)`, with one number per exit each.

    Only the operators in `COUNTED` count; see `divided` for the rule.

    Both are empty if the size of a product depends on tensor values, because the count is then unknown.
    """
    ends = zip(flat.names(), flat.names("score"), strict=True)
    exits = [[v for v in flat.model.graph.outputs if v.name in names] for names in ends]
    trunk, branch = divided(exits, parents, ((node.outputs, _node_macs(node)) for node in flat.model.graph))
    return ((), ()) if math.isnan(sum(trunk) + sum(branch)) else (trunk, branch)


def graph_macs(graph: ir.Graph) -> float:
    """Return the multiply-accumulates per sample of a whole graph; NaN if they are unknown."""
    return sum((_node_macs(node) for node in graph), 0.0)


def _node_macs(node: ir.Node) -> float:
    """Multiply-accumulates of one node; NaN if a size is unknown."""
    inner = [sum(_node_macs(each) for each in graph) for graph in graphs_of(node)]
    if any(inner):  # the number of a loop's iterations is unknown; for an If, the more expensive side counts
        return max(inner) if node.op_type == "If" and not math.isnan(sum(inner)) else math.nan
    count = COUNTED.get(node.op_type)
    return 0.0 if count is None else count(node)


def sample_shape(value: ir.Value | None, lengths: Mapping[str, int] | None = None) -> list[float]:
    """Return the shape with a batch of one sample, NaN for unknown dimensions; ``[NaN]`` if the rank is unknown.

    Args:
        value: a value of the graph.
        lengths: sizes of free lengths.
    """
    if value is None or value.shape is None:
        return [math.nan]
    dims = [d if isinstance(d, int) else d.evaluate({BATCH: 1, **(lengths or {})}) for d in value.shape]
    return [d if isinstance(d, int) else math.nan for d in dims]


def _size(value: ir.Value | None, first: int = 0) -> float:
    """The number of entries, without the dimensions before `first`."""
    return math.prod(sample_shape(value)[first:])


def _conv(node: ir.Node) -> float:
    return _size(node.outputs[0]) * _size(node.inputs[1], 1)


def _conv_transpose(node: ir.Node) -> float:
    return _size(node.inputs[0]) * _size(node.inputs[1], 1)


def _product(node: ir.Node) -> float:
    attribute = node.attributes.get("transA")
    return _size(node.outputs[0]) * sample_shape(node.inputs[0])[0 if attribute and attribute.as_int() else -1]


def _recurrent(node: ir.Node) -> float:
    """Every step multiplies each sample by all weights of input and state, `(directions, gates x hidden, ...)`."""
    steps = math.prod(sample_shape(node.inputs[0])[:2])
    return steps * (_size(node.inputs[1]) + _size(node.inputs[2]))


def _einsum(node: ir.Node) -> float:
    """Operands are contracted from left to right, as ONNX Runtime does."""
    terms, _, result = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    operands = terms.split(",")
    shapes = [sample_shape(v) for v in node.inputs]
    sizes: dict[str, float] = {}
    labels = []
    for term, shape in zip(operands, shapes, strict=True):
        around = len(shape) - len(term.replace("...", ""))
        spread = "".join(chr(0x100 + k) for k in range(around, 0, -1)) if "..." in term else ""  # from the right
        labels.append(term.replace("...", spread))
        if len(labels[-1]) != len(shape):
            return math.nan
        for label, size in zip(labels[-1], shape, strict=True):
            sizes[label] = size if sizes.get(label, 1) == 1 else sizes[label]
    macs, held = 0.0, set(labels[0])
    for k, term in enumerate(labels[1:], 2):
        macs += math.prod(sizes[label] for label in held | set(term))
        later = set(result).union(*labels[k:]) | {label for label in sizes if ord(label) >= 0x100}
        held = (held | set(term)) & later
    return macs


COUNTED: dict[str, Callable[[ir.Node], float]] = {
    "Conv": _conv,
    "DeformConv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _product,
    "MatMul": _product,
    "Einsum": _einsum,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
}
