"""Draw an example of inputs in the shapes that an ONNX file declares."""

import torch
from torch import Tensor

from ..errors import InputError
from .network import OnnxNetwork

_ROWS = 2  # as many as `attach` uses


def drawn_example(network: OnnxNetwork) -> dict[str, Tensor]:
    """Return two samples of random inputs by name, normally distributed, and the same in every call.

    Raises:
        InputError: the file leaves a dimension free other than the batch, or an input holds no floats, so that its
            range is unknown.
    """
    generator, drawn = torch.Generator().manual_seed(0), {}
    for name, shape in network.input_shapes.items():
        dtype = network.input_dtypes[name]
        if not dtype.is_floating_point:
            why = f"the file does not say which numbers the input {name!r} ({dtype}) may hold"
        elif not shape or not all(shape[1:]):
            shown = "no shape" if not shape else f"the shape ({', '.join('?' if d is None else str(d) for d in shape)})"
            why = f"the file gives the input {name!r} {shown}"
        else:
            drawn[name] = torch.randn(_ROWS, *(size or 0 for size in shape[1:]), generator=generator).to(dtype)
            continue
        raise InputError(f"give example=, one batch of inputs: {why}")
    return drawn
