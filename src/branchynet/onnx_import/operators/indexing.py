"""Operators that select or write elements by position."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import GraphError
from ..dtypes import dtype_of
from ..numbers import Numbers
from .operator import Operator

_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _gather(data: Tensor, indices: Tensor | Numbers, *, axis: int = 0) -> Tensor:
    if isinstance(indices, Numbers) and indices.array.ndim == 0:
        return data.select(axis, indices.array.item())
    axis = axis % data.dim()
    if isinstance(indices, Tensor) and axis == 0 and data.dim() == 2 and data.is_floating_point():
        return F.embedding(indices, data)  # ids are not negative
    places = indices.as_tensor() if isinstance(indices, Numbers) else indices
    chosen = data.index_select(axis, _forward(places, data.shape[axis]).reshape(-1))
    return chosen.reshape(*data.shape[:axis], *places.shape, *data.shape[axis + 1 :])


def _gather_numbers(data: Numbers, indices: Numbers, *, axis: int = 0) -> Any:
    if not indices.fixed():
        return NotImplemented
    return data.made(data.array.take(indices.array.astype(int), axis))


def _forward(places: Tensor, size: Any) -> Tensor:
    """Return positions from the start; those from the end are negative."""
    return torch.where(places < 0, places + size, places)


def _gather_elements(data: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    axis = axis % data.dim()
    indices = _forward(indices, data.shape[axis])
    for dim in range(data.dim()):
        if dim != axis and data.shape[dim] != indices.shape[dim]:
            data = data.narrow(dim, 0, indices.shape[dim])
    return data.gather(axis, indices)


def _gather_nd(data: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    index = [_forward(one, data.shape[batch_dims + d]) for d, one in enumerate(indices.unbind(-1))]
    rank = indices.dim() - 1
    for dim in range(batch_dims):
        shape = [-1 if d == dim else 1 for d in range(rank)]
        index.insert(dim, torch.arange(data.shape[dim], device=data.device).reshape(shape))
    return data[tuple(index)]


def _scatter_elements(
    data: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    indices = _forward(indices, data.shape[axis])
    if reduction == "none":
        return data.scatter(axis, indices, updates)
    return data.scatter_reduce(axis, indices, updates, _REDUCTIONS[reduction])


def _scatter_nd(data: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    if reduction not in ("none", "add"):
        raise GraphError(f"ScatterND with reduction {reduction!r} cannot be imported, only 'none' and 'add'")
    index = tuple(_forward(one, data.shape[d]) for d, one in enumerate(indices.unbind(-1)))
    return data.index_put(index, updates, accumulate=reduction == "add")


def _one_hot(indices: Tensor, depth: Sequence[int], values: Tensor, *, axis: int = -1) -> Tensor:
    size = int(depth[0])
    places = _forward(indices.long(), size).unsqueeze(axis)
    shape = [1] * places.dim()
    shape[axis] = size
    hit = places == torch.arange(size, device=indices.device).reshape(shape)
    return torch.where(hit, values[1], values[0])


def _eye_like(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    columns = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
    return (columns - rows == k).to(x.dtype if dtype is None else dtype_of(dtype))


def _nonzero(x: Tensor) -> Tensor:
    return x.nonzero().t()


INDEXING: dict[str, Operator] = {
    "EyeLike": Operator(_eye_like),
    "Gather": Operator(_gather, _gather_numbers, either=(1,), weights=(0,)),
    "GatherElements": Operator(_gather_elements),
    "GatherND": Operator(_gather_nd),
    "NonZero": Operator(_nonzero, constant=True),
    "OneHot": Operator(_one_hot, numbers=(1,), fixed=(2,)),
    "Scatter": Operator(_scatter_elements),
    "ScatterElements": Operator(_scatter_elements),
    "ScatterND": Operator(_scatter_nd),
}
