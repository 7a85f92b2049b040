"""A network in half precision for PyTorch: its copy, and the check that its values fit."""

import copy
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import GraphError, InputError, first_line
from ..graph.half import LARGEST, too_large
from ..nn.calls import arguments, evaluating
from .reference_outputs import answers_alone

Precision = Literal["float32", "fp16", "bf16"]
_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_ROWS = 4  # of the example, whose values are checked


def check_precision(precision: Any) -> None:
    """Raise `InputError` for an unknown precision."""
    if precision not in get_args(Precision):
        raise InputError(f"precision must be one of {', '.join(map(repr, get_args(Precision)))}; got {precision!r}")


def in_precision(net: nn.Module, example: Any, precision: Precision) -> tuple[nn.Module, Any]:
    """Return a network and its example in a precision: copies with half of the bits, or for float32, both as they are.

    Batch norms keep float32 weights and statistics; they read and write half precision.

    Raises:
        GraphError: the network has other types than float32, or cannot be copied or computed in half precision; or a
            weight, or a value for the first rows of the example, is too large for the type.
    """
    if precision == "float32":
        return net, example
    kind = _TYPES[precision]
    weights = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    for name, weight in weights.items():
        if weight.is_floating_point() and weight.dtype != torch.float32:
            raise GraphError(
                f"the network already computes in {str(weight.dtype).removeprefix('torch.')} ({name!r}): give "
                "precision='float32', which keeps its types, or convert it first: copy.deepcopy(net).float()"
            )
        _check_size(f"the weight {name!r}", weight, precision)
    args, kwargs = arguments(example)
    for place, value in enumerate((*args, *kwargs.values()), 1):
        _check_size(f"input {place} of the example", value[:_ROWS], precision)
    _check_modules(net, example, precision)
    try:
        half = copy.deepcopy(net).to(kind)
        for module in half.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.float()
        converted = (tuple(_to(t, kind) for t in args), {name: _to(t, kind) for name, t in kwargs.items()})
        given = converted[1] or converted[0]
        found = answers_alone(half, given, _ROWS)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the network's code
        raise GraphError(
            f"the network cannot be computed in {precision} ({first_line(error)}); use precision='float32'"
        ) from error
    for n, (exact, coarse) in enumerate(zip(answers_alone(net, example, _ROWS), found, strict=True), 1):
        if (exact.isfinite() & ~coarse.isfinite()).any():
            raise GraphError(
                f"outputs of exit {n} are not finite in {precision}, because a value is too large for the type: "
                + ("use precision='bf16', or scale the value" if precision == "fp16" else "use precision='float32'")
            )
    return half, given


def _to(value: Tensor, kind: torch.dtype) -> Tensor:
    return value.to(kind) if value.dtype == torch.float32 else value


@torch.no_grad()
def _check_modules(net: nn.Module, example: Any, precision: str) -> None:
    """Raise `GraphError` if a module returns a value that is too large for the type."""

    def check(name: str, returned: Any) -> None:
        for value in tree_leaves(returned):
            if isinstance(value, Tensor):
                _check_size(f"the output of {name!r}", value, precision)

    handles = [
        module.register_forward_hook(lambda _module, _args, returned, name=name: check(name, returned))
        for name, module in net.named_modules()
        if name
    ]
    try:
        with evaluating(net):
            args, kwargs = arguments(example)
            net(*(t[:_ROWS] for t in args), **{name: t[:_ROWS] for name, t in kwargs.items()})
    finally:
        for handle in handles:
            handle.remove()


def _check_size(what: str, value: Tensor, precision: str) -> None:
    if not value.is_floating_point() or not value.numel():
        return
    largest = float(torch.where(value.isfinite(), value, 0).abs().max().detach())
    if largest > LARGEST[precision]:
        raise GraphError(too_large(what, largest, precision))
