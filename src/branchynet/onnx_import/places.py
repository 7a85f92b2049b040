"""Values of an ONNX file at which exits make sense."""

from collections import Counter
from collections.abc import Iterable, Sequence

from .steps import Step

SIZES_ONLY = ("Shape", "Size")  # their results depend on sizes, not on data
_PRODUCTS = {"Conv", "ConvTranspose", "Einsum", "GRU", "Gemm", "LSTM", "MatMul", "RNN"}


def block_ends(
    steps: Sequence[Step], inputs: Iterable[str], outputs: Iterable[str], trained: Iterable[str]
) -> tuple[str, ...]:
    """Return the values at the ends of blocks, in the order in which they are computed.

    Of all values computed so far from inputs and weights, only this one is needed later. Further, it comes after a
    product with weights, and another such product or several nodes read it: in a chain, it is the activation or pooling
    after a convolution, not the convolution.
    """
    data, weighed, live = set(inputs), set(trained), set()
    left = Counter(name for step in steps for name in {*step.inputs})
    readers, last = left.copy(), set(outputs)
    ends, found, products = set[str](), [], 0
    for step in steps:
        read = set(step.inputs)
        if step.operator in _PRODUCTS and read - data:
            ends |= read & live
            products += 1
        if weighed & read:
            weighed.update(step.outputs)
        if data & read and step.operator not in SIZES_ONLY:
            data.update(step.outputs)
        left.subtract(read)
        live = {name for name in (*live, *step.outputs) if name in data & weighed and (left[name] or name in last)}
        if products and len(live) == 1 and not live & last and live <= set(step.outputs):
            found.extend(live)
    return tuple(name for name in found if name in ends or readers[name] > 1)
