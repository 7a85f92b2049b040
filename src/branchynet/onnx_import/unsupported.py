"""Refuse operators that cannot be imported, with what to do instead."""

import onnx

from ..errors import GraphError
from .operators import OPERATORS

_CONTROL = {"If", "Loop", "Scan", "SequenceMap"}
_RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
_KEEP = "export the network again without that operator, or give the PyTorch network itself"


def check_operator(node: onnx.NodeProto) -> None:
    """Raise `GraphError` if a node cannot be imported."""
    name = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
    where = f"the operator {name} (node {node.name or 'without a name'!r}, which computes {node.output[0]!r})"
    if _quantized(node.op_type):
        raise GraphError(
            f"{where} belongs to a quantized network, whose weights cannot be trained: use the float file that it was "
            "made of, and quantize at the end with export(..., precision='int8', calibration=batches)"
        )
    if node.op_type in _CONTROL:
        raise GraphError(
            f"{where} is control flow; the graph must be the same for all samples: {_KEEP} (torch.where instead of if; "
            "for fixed conditions, onnxsim or onnxruntime's offline optimization can remove it)"
        )
    if node.op_type in _RANDOM:
        raise GraphError(f"{where} draws random numbers; export the network in eval mode, net.eval()")
    if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
        raise GraphError(f"{where} cannot be imported: {_KEEP}")


def _quantized(operator: str) -> bool:
    return operator.startswith(("QLinear", "QAttention", "QGemm", "DynamicQuantize", "MatMulNBits")) or operator in (
        "QuantizeLinear",
        "DequantizeLinear",
        "ConvInteger",
        "MatMulInteger",
    )
