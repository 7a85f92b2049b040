"""Operators that change shapes, or compute with them. `on_numbers` computes the same on sizes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import GraphError
from ..numbers import Numbers, sizes_of
from .operator import Operator

_FEW = 64  # numbers; more are computed as tensors


def _shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Numbers:
    return sizes_of(x.shape[slice(start, end)], x.device)


def _shape_of_numbers(x: Numbers, *, start: int = 0, end: int | None = None) -> Numbers:
    return sizes_of(x.array.shape[slice(start, end)], x.device)


def _size(x: Tensor) -> Numbers:
    return Numbers(np.array(math.prod(x.shape), dtype=object), torch.int64, x.device)


def _reshape(x: Tensor, shape: Sequence[Any], *, allowzero: int = 0) -> Tensor:
    sizes = [x.shape[d] if not allowzero and _is(size, 0) else size for d, size in enumerate(shape)]
    return x.reshape(sizes)


def _reshape_numbers(x: Numbers, shape: Numbers, *, allowzero: int = 0) -> Any:
    return x.made(x.array.reshape(shape.flat())) if shape.fixed() else NotImplemented


def _flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 0:
        return x.reshape(1, -1)
    x = x if axis == 1 else x.flatten(0, axis - 1)
    return x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)


def _transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    return x.permute(tuple(perm) if perm is not None else tuple(reversed(range(x.dim()))))


def _transpose_numbers(x: Numbers, *, perm: Sequence[int] | None = None) -> Numbers:
    return x.made(x.array.transpose(perm))


def _squeeze(x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _squeeze_numbers(x: Numbers, axes: Any = None) -> Numbers:
    axes = axes.flat() if isinstance(axes, Numbers) else axes
    return x.made(x.array.squeeze(None if axes is None else tuple(axes)))


def _unsqueeze(x: Tensor, axes: Sequence[int]) -> Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


def _unsqueeze_numbers(x: Numbers, axes: Any) -> Numbers:
    return x.made(np.expand_dims(x.array, tuple(axes.flat() if isinstance(axes, Numbers) else axes)))


def _concat(*tensors: Tensor, axis: int, broadcast: int = 0) -> Tensor:
    if broadcast:  # see `branchynet.onnx_import.fixed_batch`
        batch = next(t.shape[0] for t in tensors if not _is(t.shape[0], 1)) if _several(tensors) else 1
        tensors = tuple(t.expand(batch, *t.shape[1:]) if _is(t.shape[0], 1) else t for t in tensors)
    return torch.cat(tensors, axis)


def _several(tensors: Sequence[Tensor]) -> bool:
    return any(not _is(t.shape[0], 1) for t in tensors)


def _concat_numbers(*parts: Numbers, axis: int, broadcast: int = 0) -> Numbers:
    return parts[0].made(np.concatenate([part.array for part in parts], axis))


def _split(
    x: Tensor, sizes: Sequence[int] | None = None, *, outputs: int, axis: int = 0, num_outputs: int = 0, split: Any = ()
) -> tuple[Tensor, ...]:
    sizes = list(sizes or split)
    if not sizes:
        each = -(-x.shape[axis] // (num_outputs or outputs))
        return x.split(each, axis)
    return x.split(sizes, axis)


def _split_numbers(
    x: Numbers, sizes: Numbers | None = None, *, outputs: int, axis: int = 0, num_outputs: int = 0, split: Any = ()
) -> tuple[Numbers, ...]:
    ends = np.cumsum(sizes.flat() if sizes is not None else list(split))[:-1] if sizes is not None or split else outputs
    return tuple(x.made(part) for part in np.array_split(x.array, ends, axis))  # type: ignore[arg-type]


def _slice(
    x: Tensor, starts: Sequence[Any], ends: Sequence[Any], axes: Sequence[int] | None = None, steps: Any = None
) -> Tensor:
    for start, end, axis, step in _slices(x.dim(), starts, ends, axes, steps):
        if step > 0:
            x = x[(slice(None),) * axis + (slice(start, end, step),)]
        else:
            chosen = list(range(*slice(start, end, step).indices(_fixed(x.shape[axis], "Slice with a negative step"))))
            x = x.index_select(axis, torch.tensor(chosen, device=x.device))
    return x


def _slice_numbers(x: Numbers, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
    given = [one.flat() if isinstance(one, Numbers) else one for one in (starts, ends, axes, steps)]
    array = x.array
    for start, end, axis, step in _slices(array.ndim, *given):
        if not isinstance(start, int) or not isinstance(end, int):
            return NotImplemented
        array = array[(slice(None),) * axis + (slice(start, end, step),)]
    return x.made(array)


def _slices(rank: int, starts: Any, ends: Any, axes: Any, steps: Any) -> list[tuple[Any, Any, int, int]]:
    axes = [a % rank for a in (axes or range(len(starts)))]
    steps = list(steps or [1] * len(starts))
    # an end before the first element, for negative steps, is None in Python
    ends = [None if s < 0 and isinstance(e, int) and e < -(2**31) else e for e, s in zip(ends, steps, strict=True)]
    return list(zip(starts, ends, axes, steps, strict=True))


def _expand(x: Tensor, shape: Sequence[Any]) -> Tensor:
    x = x.reshape((1,) * (len(shape) - x.dim()) + tuple(x.shape))
    shape = (1,) * (x.dim() - len(shape)) + tuple(shape)
    return x.expand([old if _is(new, 1) else new for old, new in zip(x.shape, shape, strict=True)])


def _expand_numbers(x: Numbers, shape: Numbers) -> Any:
    if not shape.fixed() or math.prod(shape.flat()) > _FEW:
        return NotImplemented
    return x.made(np.broadcast_to(x.array, np.broadcast_shapes(x.array.shape, tuple(shape.flat()))))


def _tile(x: Tensor, repeats: Sequence[Any]) -> Tensor:
    return x.repeat(*repeats)


def _tile_numbers(x: Numbers, repeats: Numbers) -> Any:
    return x.made(np.tile(x.array, repeats.flat())) if repeats.fixed() else NotImplemented


def _pad(
    x: Tensor,
    pads: Sequence[Any],
    value: Any = None,
    axes: Sequence[int] | None = None,
    *,
    mode: str = "constant",
    **old: float,
) -> Tensor:
    count = len(pads) // 2
    axes = [a % x.dim() for a in (range(count) if axes is None else axes)]
    before, after = dict(zip(axes, pads[:count], strict=True)), dict(zip(axes, pads[count:], strict=True))
    if mode == "constant":
        widths = [width.get(d, 0) for d in reversed(range(x.dim())) for width in (before, after)]
        return F.pad(x, widths, value=value[0] if value else old.get("value", 0.0))
    for axis in axes:
        if _is(before[axis], 0) and _is(after[axis], 0):
            continue
        places = np.arange(_fixed(x.shape[axis], f"Pad in mode {mode!r}"))
        places = np.pad(places, (before[axis], after[axis]), mode=mode)  # type: ignore[arg-type]
        x = x.index_select(axis, torch.tensor(places.tolist(), device=x.device))
    return x


def _filled(shape: Numbers, *, value: Tensor | None = None) -> Tensor:
    zero = torch.zeros(1) if value is None else value
    return torch.full(shape.flat(), zero.item(), dtype=zero.dtype, device=shape.device)


def _filled_numbers(shape: Numbers, *, value: Tensor | None = None) -> Any:
    zero = torch.zeros(1) if value is None else value
    if not shape.fixed() or math.prod(shape.flat()) > _FEW:
        return _filled(shape, value=value)
    return shape.made(np.full(tuple(shape.flat()), zero.item(), dtype=object), zero.dtype)


def _range(start: Numbers, limit: Numbers, delta: Numbers) -> Any:
    first, last, step = (one.flat()[0] for one in (start, limit, delta))
    if start.fixed() and limit.fixed() and delta.fixed() and (last - first) / step <= _FEW:
        values = torch.arange(first, last, step, dtype=start.dtype).tolist()
        return start.made(np.array(values, dtype=object))
    return torch.arange(first, last, step, dtype=start.dtype, device=start.device)


def _by_data(*_: Any, **__: Any) -> Any:
    raise GraphError(
        "the size of the result depends on values of the inputs; the graph must be the same for all samples: export "
        "the network without that"
    )


def _triangle(x: Tensor, k: list[int] | None = None, *, upper: int = 1) -> Tensor:
    return (torch.triu if upper else torch.tril)(x, k[0] if k else 0)


def _is(size: Any, number: int) -> bool:
    """Whether a size is a number; a symbol is not, without a guard."""
    return isinstance(size, int) and size == number


def _fixed(size: Any, what: str) -> int:
    if not isinstance(size, int):
        raise GraphError(f"{what} along a dimension of free size cannot be imported; leave that dimension fixed")
    return size


SHAPES: dict[str, Operator] = {
    "Concat": Operator(_concat, _concat_numbers),
    "ConstantOfShape": Operator(_by_data, _filled_numbers),
    "Expand": Operator(_expand, _expand_numbers, numbers=(1,)),
    "Flatten": Operator(_flatten),
    "Pad": Operator(_pad, numbers=(1, 2, 3)),
    "Range": Operator(_by_data, _range),
    "Reshape": Operator(_reshape, _reshape_numbers, numbers=(1,)),
    "Shape": Operator(_shape, _shape_of_numbers),
    "Size": Operator(_size),
    "Slice": Operator(_slice, _slice_numbers, numbers=(1, 2, 3, 4)),
    "Split": Operator(_split, _split_numbers, numbers=(1,)),
    "Squeeze": Operator(_squeeze, _squeeze_numbers, numbers=(1,)),
    "Tile": Operator(_tile, _tile_numbers, numbers=(1,)),
    "Transpose": Operator(_transpose, _transpose_numbers),
    "Trilu": Operator(_triangle, numbers=(1,)),
    "Unsqueeze": Operator(_unsqueeze, _unsqueeze_numbers, numbers=(1,)),
}
