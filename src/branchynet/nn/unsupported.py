"""Detect weights and submodules that cannot be read, before any slow step."""

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import GraphError


def check_weights(net: nn.Module) -> None:
    """Check that all weights are plain tensors with values.

    Raises:
        GraphError: a weight is on the meta device, quantized (torchao, torch.ao), or another tensor subclass.
    """
    for name, module in net.named_modules():
        if ".ao.nn." in type(module).__module__ and "quantized" in type(module).__module__:
            raise GraphError(
                f"the submodule {name!r} ({type(module).__name__}) is quantized by torch.ao; {_FLOAT_FIRST}"
            )
    for name, value in (*net.named_parameters(), *net.named_buffers()):
        if is_traceable_wrapper_subclass(value):
            kind = type(value)
            raise GraphError(
                f"the weight {name!r} is a {kind.__module__.partition('.')[0]} {kind.__name__}, not a plain tensor; "
                f"{_FLOAT_FIRST}"
            )
        if value.is_meta:
            raise GraphError(
                f"the weight {name!r} is on the meta device and has no values: load values first, such as with "
                "net.to_empty(device='cpu') and load_state_dict"
            )


def scripted_submodule(net: nn.Module, path: str) -> str | None:
    """Return the first TorchScript module on the way to `path`, or None. TorchScript runs no hooks inside."""
    modules, parts = dict(net.named_modules()), path.split(".")
    names = ("", *(".".join(parts[:end]) for end in range(1, len(parts) + 1)))
    return next((name for name in names if isinstance(modules.get(name), torch.jit.ScriptModule)), None)


_FLOAT_FIRST = (
    "use the network before quantization (full-size weights), and quantize the file instead: "
    "export(..., precision='int8', calibration=batches)"
)
