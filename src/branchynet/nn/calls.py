"""Call any network: arguments, modes, and the tensors in its output."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import GraphError, InputError
from .output_warnings import warn_of_further

INPUT = "input"  # the name of the tap at the network's first argument


Reader = Callable[[Any], Tensor]


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return `(args, kwargs)` for forward from a tensor, a tuple of arguments, or a dict of keyword arguments."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}


def first_rows(example: Any, rows: int = 2) -> Any:
    """Return the first rows of an example; the example itself unless it holds only tensors with one batch size."""
    args, kwargs = arguments(example)
    values = (*args, *kwargs.values())
    if not all(isinstance(v, Tensor) and v.dim() for v in values) or len({len(v) for v in values}) != 1:
        return example
    return {k: v[:rows] for k, v in kwargs.items()} if kwargs else tuple(v[:rows] for v in args)


class _SlowPath:
    """A context manager that disables torch's fast path for transformers while any thread is in its block.

    The fast path computes `nn.TransformerEncoder` in nested tensors, which neither branches nor graphs support.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._before = True

    def __enter__(self) -> None:
        with self._lock:
            if not self._blocks:
                self._before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self._blocks += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._blocks -= 1
            if not self._blocks:
                torch.backends.mha.set_fastpath_enabled(self._before)


slow_path = _SlowPath()


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Put every module of `net` into eval mode for the block, then restore modes and buffers.

    Parameters that a forward pass replaces are restored too. Writes into parameters stay, because parameters may be too
    large to copy. Torch's fast path for transformers is off in the block.
    """
    modes = [(module, module.training) for module in net.modules()]
    buffers = [
        (module, name, tensor, None if tensor is None else tensor.detach().clone())
        for module in net.modules()
        for name, tensor in module._buffers.items()
        if tensor is None or not is_lazy(tensor)  # lazy buffers have no size yet
    ]
    parameters = [(module, *named) for module in net.modules() for named in module._parameters.items()]
    net.eval()
    try:
        with slow_path:
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, name, parameter in parameters:
            module._parameters[name] = parameter
        with torch.no_grad():
            for module, name, tensor, copy in buffers:
                module._buffers[name] = tensor
                if tensor is not None and copy is not None and not tensor.is_meta and not tensor.equal(copy):
                    tensor.copy_(copy)


def single_output(returned: Any, where: str = "the backbone's output") -> Tensor:
    """Return the output tensor of a network with a single exit. Raises `GraphError` for several exits, or none."""
    if found := several_exits(returned):
        raise GraphError(
            f"{where} is {len(found)} tensors of one shape {tuple(found[0].shape)}, which are exits of its own: "
            "use such a network without attaching branches, or select one tensor with output="
        )
    answer = output_tensor(returned, where)
    warn_of_further(returned, answer, where, "select the right tensor with output=")
    return answer


def output_tensor(value: Any, where: str) -> Tensor:
    """Return the tensor in a module's output: itself, ``.logits``, or the first entry. Raises `GraphError` for none."""
    tensor = find_tensor(value)
    if tensor is None:
        raise GraphError(
            f"{where!r} gives a {type(value).__name__}, which holds no tensor to use; tap another submodule"
        )
    return tensor


def find_tensor(value: Any) -> Tensor | None:
    """Like `output_tensor`, but return None if there is none."""
    if isinstance(value, Tensor):
        return value
    if isinstance(getattr(value, "logits", None), Tensor):
        return value.logits
    entries = list(value.values()) if isinstance(value, Mapping) else value
    return entries[0] if isinstance(entries, (tuple, list)) and entries and isinstance(entries[0], Tensor) else None


def several_exits(value: Any) -> tuple[Tensor, ...]:
    """Return the exits in the output of a network that has several of its own; empty for any other."""
    if not isinstance(value, (tuple, list)) or isinstance(getattr(value, "logits", None), Tensor) or len(value) < 2:
        return ()
    # Not compared as a set: the shapes of an export contain symbols, which cannot be hashed.
    exits = all(isinstance(v, Tensor) and v.dim() > 1 and v.shape == value[0].shape for v in value)
    return tuple(value) if exits else ()


def read_tensor(reader: Reader | None, value: Any, where: str) -> Tensor:
    """Return the tensor that `reader`, or by default `output_tensor`, finds. Raises `GraphError` if it finds none."""
    tensor = output_tensor(value, where) if reader is None else reader(value)
    if not isinstance(tensor, Tensor):
        raise GraphError(
            f"the function for {where!r} returns a {type(tensor).__name__}; output= and tap= must return a tensor"
        )
    return tensor


def first_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the first argument of a call, positional or by keyword."""
    for value in (*args, *kwargs.values()):
        return value
    raise InputError("the network was called without inputs")
