"""Activations and dropout."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import GraphError
from .operator import Operator


def _softmax(x: Tensor, *, opset: int, axis: int | None = None) -> Tensor:
    if opset >= 13:
        return torch.softmax(x, -1 if axis is None else axis)
    return _flattened(torch.softmax, x, axis)


def _log_softmax(x: Tensor, *, opset: int, axis: int | None = None) -> Tensor:
    if opset >= 13:
        return torch.log_softmax(x, -1 if axis is None else axis)
    return _flattened(torch.log_softmax, x, axis)


def _flattened(function: Any, x: Tensor, axis: int | None) -> Tensor:
    """Before opset 13, all dimensions from `axis` on were one."""
    axis = (1 if axis is None else axis) % x.dim()
    return function(x.flatten(axis), -1).reshape(x.shape)


def _hardmax(x: Tensor, *, axis: int = -1, opset: int) -> Tensor:
    if opset < 13 and axis % x.dim() != x.dim() - 1:
        raise GraphError("Hardmax before opset 13 is imported for the last dimension only")
    largest = x.argmax(axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, largest, 1.0)


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def _hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(alpha * x + beta, 0, 1)


def _selu(x: Tensor, *, alpha: float = 1.6732632, gamma: float = 1.0507010) -> Tensor:
    return gamma * F.elu(x, alpha)


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x >= 0, x, x * slope)


def _shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, torch.zeros_like(x)))


def _thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return torch.where(x > alpha, x, torch.zeros_like(x))


def _swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return x * torch.sigmoid(alpha * x)


def _dropout(
    x: Tensor,
    ratio: Any = 0.5,
    training_mode: list[bool] | None = None,
    *,
    training: bool,
    outputs: int,
    seed: int | None = None,
) -> Any:
    """Drop in training, as the network of the file did; in evaluation it changes nothing."""
    if training_mode and training_mode[0]:
        raise GraphError("Dropout is in training mode in this file; export the network in eval mode, net.eval()")
    ratio = 0.5 if ratio is None else ratio[0] if isinstance(ratio, list) else ratio
    dropped = F.dropout(x, ratio, training)
    return (dropped, torch.ones_like(x, dtype=torch.bool)) if outputs == 2 else dropped


ACTIVATIONS: dict[str, Operator] = {
    "Celu": Operator(lambda x, *, alpha=1.0: F.celu(x, alpha)),
    "Dropout": Operator(_dropout, numbers=(1, 2)),
    "Elu": Operator(lambda x, *, alpha=1.0: F.elu(x, alpha)),
    "Gelu": Operator(_gelu),
    "HardSigmoid": Operator(_hard_sigmoid),
    "HardSwish": Operator(F.hardswish),
    "Hardmax": Operator(_hardmax),
    "LeakyRelu": Operator(lambda x, *, alpha=0.01: F.leaky_relu(x, alpha)),
    "LogSoftmax": Operator(_log_softmax),
    "Mish": Operator(F.mish),
    "PRelu": Operator(_prelu, weights=(1,)),
    "Relu": Operator(torch.relu),
    "Selu": Operator(_selu),
    "Shrink": Operator(_shrink),
    "Sigmoid": Operator(torch.sigmoid),
    "Softmax": Operator(_softmax),
    "Softplus": Operator(F.softplus),
    "Softsign": Operator(F.softsign),
    "Swish": Operator(_swish),
    "Tanh": Operator(torch.tanh),
    "ThresholdedRelu": Operator(_thresholded_relu),
}
