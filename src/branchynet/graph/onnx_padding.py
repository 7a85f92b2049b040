"""Keep runtimes and simplifiers from moving zero padding into a max pooling.

A max pooling ignores its own padding, so a window that covers padding and only negative values has a negative maximum,
where explicit zeros give 0. ONNX Runtime before 1.32 fuses the two all the same, as do some simplifiers. They leave a
pooling alone that also has an output of indices.
"""

import onnx_ir as ir

from .subgraphs import nodes_of

_NOT_NEGATIVE = {"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Exp", "Softplus"}


def keep_zero_padding(model: ir.Model) -> None:
    """Add an output of indices to each max pooling of zero-padded values that may be negative, in place."""
    for pool in list(nodes_of(model.graph)):
        if pool.op_type == "MaxPool" and len(pool.outputs) == 1 and _may_be_fused(pool.inputs[0]):
            pool.resize_outputs(2)
            indices = pool.outputs[1]
            indices.name, indices.type = f"{pool.outputs[0].name}/indices", ir.TensorType(ir.DataType.INT64)
            indices.shape = pool.outputs[0].shape


def _may_be_fused(value: ir.Value | None) -> bool:
    """Whether a Pad computes the value from values that may be negative."""
    pad = None if value is None else value.producer()
    if pad is None or pad.op_type != "Pad" or pad.inputs[0] is None:
        return False
    if pad.attributes.get_string("mode", "constant") != "constant":
        return False
    source = pad.inputs[0].producer()
    return source is None or source.op_type not in _NOT_NEGATIVE
