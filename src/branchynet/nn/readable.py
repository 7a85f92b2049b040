"""Networks whose weights or submodules cannot be read, told before any long work."""

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import GraphError


def check_weights(net: nn.Module) -> None:
    """Refuse weights that are no plain tensors with values.

    Raises:
        GraphError: a weight on the meta device, a quantised one (torchao, torch.ao), or another tensor of tensors.
    """
    for name, module in net.named_modules():
        if ".ao.nn." in type(module).__module__ and "quantized" in type(module).__module__:
            raise GraphError(
                f"the submodule {name!r} ({type(module).__name__}) is quantised by torch.ao; {_FLOAT_FIRST}"
            )
    for name, value in (*net.named_parameters(), *net.named_buffers()):
        if is_traceable_wrapper_subclass(value):
            kind = type(value)
            raise GraphError(
                f"the weight {name!r} is a {kind.__module__.partition('.')[0]} {kind.__name__}, no plain tensor; "
                f"{_FLOAT_FIRST}"
            )
        if value.is_meta:
            raise GraphError(
                f"the weight {name!r} lies on the meta device and has no values: give it some first, such as with "
                "net.to_empty(device='cpu') and load_state_dict"
            )


def scripted_submodule(net: nn.Module, path: str) -> str | None:
    """Which submodule on the way to `path`, itself included, is TorchScript, whose insides run no hooks; or None."""
    modules, parts = dict(net.named_modules()), path.split(".")
    names = ("", *(".".join(parts[:end]) for end in range(1, len(parts) + 1)))
    return next((name for name in names if isinstance(modules.get(name), torch.jit.ScriptModule)), None)


_FLOAT_FIRST = (
    "use the network as it was before (full-size weights), and quantise the file instead: "
    "export(..., quantize='int8', calibration=batches)"
)
