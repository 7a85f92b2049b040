"""Check networks, devices, loaders and inputs. Messages say what to give instead."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..argument_checks import described, dtype_name, instance
from ..errors import BranchyNetError, InputError, first_line

_IMAGE_CHANNELS = (1, 3, 4)
# Errors that torch and networks raise for inputs that do not fit. Other errors have other causes.
MISFITS = (RuntimeError, TypeError, ValueError, IndexError)


def check_network(net: Any) -> None:
    """Raise `InputError` unless `net` is an `nn.Module`."""
    if isinstance(net, type):
        raise InputError(f"the network must be an nn.Module; got the class {net.__name__}: give {net.__name__}()")
    instance("the network", net, nn.Module, "give the PyTorch network itself")


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device of that name. Raises `InputError` if it is unknown or not available on this machine."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        names = "'cpu', 'cuda', 'cuda:1' or 'mps'"
        raise InputError(f"device={device!r} is no device of PyTorch; give {names}, or leave it out") from error
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, torch.cuda.DeferredCudaCallError) as error:
        raise InputError(
            f"device={str(device)!r} is not available on this machine ({first_line(error)}); leave device out, or give "
            "'cpu'"
        ) from error
    return found


READ_ONCE = "a generator is empty after one pass: give a list of batches or a DataLoader"


def device_of(net: nn.Module, default: str | torch.device = "cpu") -> torch.device:
    """Return the device of a network's first parameter or buffer; `default` if it has none."""
    return next((t.device for t in (*net.parameters(), *net.buffers())), torch.device(default))


def check_loader(name: str, value: Any, *, again: bool = False) -> None:
    """Raise `InputError` unless `value` is a loader of batches; with `again`, one that can be read several times."""
    if not hasattr(value, "__iter__") and (hasattr(value, "images") or hasattr(value, "train")):  # of branchynet.data
        raise InputError(f"{name} is {described(value)}, not a loader: give branchynet.data.loader(data.train, 64)")
    remedy = "wrap it, such as torch.utils.data.DataLoader(data, batch_size=64, shuffle=True)"
    if isinstance(value, torch.utils.data.Dataset):
        raise InputError(f"{name} is a data set, {described(value)}, which gives single samples: {remedy}")
    if not hasattr(value, "__iter__") and not hasattr(value, "__getitem__"):
        raise InputError(f"{name} must yield batches (inputs, target); got {described(value)}: {remedy}")
    if again and isinstance(value, Iterator):
        raise InputError(f"{name} is {described(value)}, which has no length and is read several times; {READ_ONCE}")


def check_train_loader(loader: Any) -> None:
    """Raise `InputError` unless `loader` can be read in every epoch, has a length, and has batches."""
    check_loader("train_loader", loader, again=True)
    try:
        empty = len(loader) == 0
    except TypeError as error:
        raise InputError(f"train_loader must have a length, which the schedule needs: {error}") from error
    if empty:
        raise InputError("train_loader has no batches; give it data, or drop_last=False")


def written(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[Tensor, int]]:
    """Return each tensor by name with torch's count of writes; -1 for a lazy tensor, which has no size yet."""
    return {name: (t, -1 if is_lazy(t) else 0 if t.is_inference() else t._version) for name, t in tensors}


def changed(before: Mapping[str, tuple[Tensor, int]], after: Mapping[str, tuple[Tensor, int]]) -> str | None:
    """Return the name of the first tensor that was replaced or written to between two calls of `written`, or None."""
    for name, (tensor, writes) in after.items():
        then = before.get(name, (None, 0))
        if then[0] is not tensor or then[1] not in (writes, -1):
            return name
    return None


KEEP_PARAMETERS = (
    "change parameters only under `if self.training:`, and leave max_norm= out of embeddings (set emb.max_norm = None "
    "once emb.weight is renormalized)"
)
"""The remedy for a network that changes its parameters in a forward pass."""


def misfit(what: str, features: Tensor, error: Exception) -> str:
    """The error message for a branch that cannot read its features."""
    return (
        f"{what} cannot read features of shape {tuple(features.shape)}, {dtype_name(features.dtype)} "
        f"({first_line(error)}): give a branch made for that shape, or inputs of the size that it was made for"
    )


@contextlib.contextmanager
def calling(net: nn.Module, inputs: Any) -> Iterator[None]:
    """Convert errors of `net` in the block to `InputError`, with a hint at what is wrong with the inputs.

    Args:
        net: the network that the block calls.
        inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
    """
    try:
        yield
    except MISFITS as error:
        if isinstance(error, (BranchyNetError, torch.OutOfMemoryError)):
            raise
        given, cause = ", ".join(described(value) for value in _values(inputs)) or "nothing", first_line(error)
        raise InputError(f"{type(net).__name__} cannot process {given} ({cause}){_hint(net, inputs, cause)}") from error


def _hint(net: nn.Module, inputs: Any, error: str) -> str:
    """Say what is most likely wrong with the inputs; empty if unknown."""
    values = _values(inputs)
    if "is invalid for input of size" in error:
        return (
            ": it was called with two rows, and its forward may contain a fixed batch size, such as view(64, -1); "
            "write x.shape[0]"
        )
    inner = getattr(net, "module", net)
    dtypes = {p.dtype for p in inner.parameters() if p.is_floating_point()}
    if any(isinstance(v, np.ndarray) for v in values):
        return ": give tensors, torch.from_numpy(array)"
    if any(isinstance(v, torch.utils.data.DataLoader) for v in values):
        return ": give one batch of inputs, such as next(iter(loader))[0]"
    tensors = [v for v in values if isinstance(v, Tensor)]
    second = tensors[-1] if len(tensors) == len(values) == 2 and not isinstance(inputs, Mapping) else None
    if second is not None and second.dim() and second.shape == tensors[0].shape[:1] and not second.is_floating_point():
        return ": the second looks like the labels of the first; give the inputs alone"
    for value in tensors:
        if value.dtype == torch.uint8 and dtypes:
            return ": pixels must be floats, x.float() / 255, as the network was trained"
        if value.is_floating_point() and len(dtypes) == 1 and value.dtype not in dtypes:
            return f": the network computes in {dtype_name(next(iter(dtypes)))}; give x.to({next(iter(dtypes))})"
        if value.dim() == 4 and value.shape[3] in _IMAGE_CHANNELS and value.shape[1] not in _IMAGE_CHANNELS:
            return ": images come channels first, (B, C, H, W); give x.permute(0, 3, 1, 2)"
        if value.dim() == 3 and value.shape[0] in _IMAGE_CHANNELS:
            return ": the batch dimension comes first, (B, C, H, W); give x[None]"
    return ""


def _values(inputs: Any) -> list[Any]:
    if isinstance(inputs, Mapping):
        return list(inputs.values())
    return list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
