"""Reductions, the largest elements, and cumulative sums."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..numbers import Numbers
from .operator import Operator


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor], identity: bool = True) -> Callable[..., Tensor]:
    """Return an operator from a function of a tensor, dimensions, and whether these are kept with size 1.

    With ``noop_with_empty_axes`` and no axes, nothing is reduced: the operator returns the tensor itself or, if
    `function` is not the `identity` on single elements, `function` of each element.
    """

    def run(
        x: Tensor, axes: Sequence[int] | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> Tensor:
        if not axes and noop_with_empty_axes:
            return x if identity else function(x.unsqueeze(-1), [x.dim()], False)
        dims = list(axes) if axes else list(range(x.dim()))
        return function(x, dims, bool(keepdims)) if dims else function(x.unsqueeze(0), [0], False)

    return run


def _product(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    for dim in sorted((d % x.dim() for d in dims), reverse=True):
        x = x.prod(dim, keepdim=keep)
    return x


def _mean(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(dims, keepdim=keep)
    count = functools.reduce(operator.mul, (x.shape[d] for d in dims), 1)
    return torch.div(x.sum(dims, keepdim=keep), count, rounding_mode="trunc").to(x.dtype)


def _sum(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return x.sum(dims, keepdim=keep).to(x.dtype)


def _absolute(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return _sum(x.abs(), dims, keep)


def _largest(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return x.amax(dims, keepdim=keep)


def _smallest(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return x.amin(dims, keepdim=keep)


def _squares(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return _sum(x * x, dims, keep)


def _reduce_numbers(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def run(x: Numbers, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
        axes = axes.flat() if isinstance(axes, Numbers) else axes
        if not axes and noop_with_empty_axes:
            return x
        if x.array.ndim > 1 or not x.array.size:
            return NotImplemented
        found = functools.reduce(function, x.flat())
        kept = (1,) * (x.array.ndim if keepdims else 0)
        return x.made(np.array([found], dtype=object).reshape(kept))

    return run


def _place(find: Callable[..., Tensor], x: Tensor, axis: int, keepdims: int, select_last_index: int) -> Tensor:
    if not select_last_index:
        return find(x, axis, keepdim=bool(keepdims))
    return x.shape[axis] - 1 - find(x.flip(axis), axis, keepdim=bool(keepdims))


def _argmax(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _place(torch.argmax, x, axis, keepdims, select_last_index)


def _argmin(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _place(torch.argmin, x, axis, keepdims, select_last_index)


def _top(
    x: Tensor, k: Sequence[int], *, outputs: int, axis: int = -1, largest: int = 1, sorted: int = 1
) -> tuple[Tensor, Tensor]:
    values, places = torch.topk(x, k[0], axis, bool(largest), bool(sorted))
    return values, places


def _cumulate(x: Tensor, axis: Sequence[int], *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    dim = axis[0]
    total = (x.flip(dim) if reverse else x).cumsum(dim, dtype=x.dtype)
    if exclusive:
        total = total - (x.flip(dim) if reverse else x)
    return total.flip(dim) if reverse else total


_AXES = (1,)
REDUCTIONS: dict[str, Operator] = {
    "ArgMax": Operator(_argmax),
    "ArgMin": Operator(_argmin),
    "CumSum": Operator(_cumulate, numbers=(1,)),
    "ReduceL1": Operator(_reduce(_absolute, identity=False), numbers=_AXES),
    "ReduceL2": Operator(_reduce(lambda x, d, k: _squares(x, d, k).sqrt(), identity=False), numbers=_AXES),
    "ReduceLogSum": Operator(_reduce(lambda x, d, k: _sum(x, d, k).log(), identity=False), numbers=_AXES),
    "ReduceLogSumExp": Operator(_reduce(lambda x, d, k: torch.logsumexp(x, d, k), identity=False), numbers=_AXES),
    "ReduceMax": Operator(_reduce(_largest), _reduce_numbers(torch.sym_max), numbers=_AXES),
    "ReduceMean": Operator(_reduce(_mean), numbers=_AXES),
    "ReduceMin": Operator(_reduce(_smallest), _reduce_numbers(torch.sym_min), numbers=_AXES),
    "ReduceProd": Operator(_reduce(_product), _reduce_numbers(operator.mul), numbers=_AXES),
    "ReduceSum": Operator(_reduce(_sum), _reduce_numbers(operator.add), numbers=_AXES),
    "ReduceSumSquare": Operator(_reduce(_squares, identity=False), numbers=_AXES),
    "TopK": Operator(_top, numbers=(1,)),
}
