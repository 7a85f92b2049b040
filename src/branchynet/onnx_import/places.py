"""Values of an ONNX file at which exits make sense."""

from collections import Counter
from collections.abc import Iterable, Sequence

from .steps import Step

SIZES_ONLY = ("Shape", "Size")  # their results depend on sizes, not on data
_VIEWS = {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
_RECURRENT = {"GRU", "LSTM", "RNN"}
_PRODUCTS = {"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul", *_RECURRENT}


def block_ends(
    steps: Sequence[Step], inputs: Iterable[str], outputs: Iterable[str], trained: Iterable[str]
) -> tuple[str, ...]:
    """Return the values at the ends of blocks, in the order in which they are computed.

    Of all values computed so far from inputs and weights, later nodes need only this one. It comes after a product with
    weights, and another such product or several nodes read it. In a chain, it is therefore the activation or pooling
    after a convolution, not the convolution. Views are left out, and so are products that only views read, because the
    batch may be merged with positions there, as in Keras's dense layers on sequences. Values of recurrent layers are
    left out until a transpose puts the batch first.
    """
    data, weighed, live = set(inputs), set(trained), set()
    left, last = Counter(name for step in steps for name in {*step.inputs}), set(outputs)
    readers = left.copy()
    viewed: dict[str, str] = {}  # for each view, the value that it shows
    turned: set[str] = set()  # values of recurrent layers, whose first dimension is not the batch
    ends, products = set[str](), set[str]()
    found: list[str] = []
    for step in steps:
        read = set(step.inputs)
        if step.operator in _PRODUCTS and read - data:
            ends |= {viewed.get(name, name) for name in read & live}
            products.update(step.outputs)
        if step.operator in _VIEWS:
            viewed[step.outputs[0]] = viewed.get(step.inputs[0], step.inputs[0])
        back = step.operator == "Transpose" and step.attributes.get("perm", [1])[0] != 0
        late = step.operator in _RECURRENT or (turned & read and not back)
        if weighed & read:
            weighed.update(step.outputs)
        if data & read and step.operator not in SIZES_ONLY:
            data.update(step.outputs)
            turned.update(step.outputs if late else ())
        left.subtract(read)
        live = {name for name in (*live, *step.outputs) if name in data & weighed and (left[name] or name in last)}
        if products and len(live) == 1 and not live & last and live <= set(step.outputs):
            found.extend(live)
    ends |= {viewed.get(name, name) for name in found if readers[name] > 1}
    whole = {name for step in steps if step.operator not in _VIEWS for name in step.inputs}
    return tuple(name for name in found if name in ends - viewed.keys() - turned - (products - whole))
