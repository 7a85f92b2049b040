"""Normalizations.

Batch norms use the running statistics of the file, in training too; these do not change, scale and bias are trained.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import GraphError
from .operator import Operator


def _batch_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    outputs: int,
    epsilon: float = 1e-5,
    training_mode: int = 0,
    **of_training: Any,
) -> Tensor:
    if training_mode or outputs > 1:
        raise GraphError("BatchNormalization is in training mode in this file; export the network in eval mode")
    return F.batch_norm(x, mean, variance, scale, bias, eps=epsilon)


def _layer_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    outputs: int,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Any:
    shape = x.shape[axis % x.dim() :]
    if outputs > 1:
        raise GraphError("the mean and deviation that LayerNormalization returns cannot be imported")
    if scale.shape == shape and (bias is None or bias.shape == shape):
        return F.layer_norm(x, shape, scale, bias, epsilon)
    y = F.layer_norm(x, shape, eps=epsilon) * scale
    return y if bias is None else y + bias


def _rms_norm(x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    dims = list(range(axis % x.dim(), x.dim()))
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt((wide * wide).mean(dims, keepdim=True) + epsilon)).to(x.dtype) * scale


def _instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    return F.group_norm(x, x.shape[1], scale, bias, epsilon)


def _group_norm(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    if len(scale) != x.shape[1]:  # one number per group, before opset 21
        scale, bias = (one.repeat_interleave(x.shape[1] // num_groups) for one in (scale, bias))
    return F.group_norm(x, num_groups, scale, bias, epsilon)


def _lp_norm(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    size = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return torch.where(size == 0, torch.zeros_like(x), x / size)


def _mean_variance(x: Tensor, *, axes: Any = (0, 2, 3)) -> Tensor:
    mean = x.mean(list(axes), keepdim=True)
    deviation = ((x * x).mean(list(axes), keepdim=True) - mean * mean).sqrt()
    return (x - mean) / (deviation + 1e-9)


def _local_response(x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    before = (size - 1) // 2
    squares = F.pad(x * x, [0, 0] * (x.dim() - 2) + [before, size - 1 - before])
    total = sum(squares.narrow(1, start, x.shape[1]) for start in range(size))
    return x / (bias + alpha / size * total) ** beta


NORMALIZATIONS: dict[str, Operator] = {
    "BatchNormalization": Operator(_batch_norm, weights=(1, 2), fixed=(3, 4)),
    "GroupNormalization": Operator(_group_norm, weights=(1, 2)),
    "InstanceNormalization": Operator(_instance_norm, weights=(1, 2)),
    "LRN": Operator(_local_response),
    "LayerNormalization": Operator(_layer_norm, weights=(1, 2)),
    "LpNormalization": Operator(_lp_norm),
    "MeanVarianceNormalization": Operator(_mean_variance),
    "RMSNormalization": Operator(_rms_norm, weights=(1,)),
}
