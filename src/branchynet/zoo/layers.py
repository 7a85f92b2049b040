"""Layers that the networks for CIFAR-10 share.

Shape letters: B images, C channels, H rows, W columns.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError

Net = TypeVar("Net", bound=nn.Module)


def initialize(net: Net) -> Net:
    """Initialize convolutions and linear layers in place as in He et al. (arXiv:1502.01852), with biases of 0.

    With PyTorch's smaller default weights, an AlexNet without batch normalization does not learn in its first epoch.
    """
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return net


class Normalize(nn.Module):
    """Normalize pixels in [0, 1] to zero mean and unit deviation per channel: `(B, 3, H, W)` float32 -> the same shape.

    The constants are those of CIFAR-10's training images. They are neither parameters nor part of the state dict.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        mean, deviation = torch.tensor([[0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]]).view(2, 1, 3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("scale", 1 / deviation, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, 3, H, W)` normalized pixels."""
        return (x - self.mean) * self.scale


class LocalResponseNorm(nn.Module):
    """Local response normalization over channels: `(B, C, H, W)` float32 -> the same shape.

    Computes x / (k + alpha * sum)^0.75 with the sum of the squares of `size` neighboring channels. The result equals
    ``torch.nn.LocalResponseNorm(size, alpha=size * alpha, beta=0.75, k=k)``, which divides alpha by `size`, but takes a
    fraction of the time in training and in ONNX Runtime: with r = sqrt(k + alpha * sum) the power is r * sqrt(r), which
    needs no logarithm, and the sum is a 1x1 convolution, which keeps the memory format of its neighbors.

    Alpha is not divided by `size`, as in Chainer and in Krizhevsky et al., 2012, section 3.3. Raises `InputError` if
    `size` is even or below 1.
    """

    band: Tensor
    offset: Tensor

    def __init__(self, channels: int, size: int = 3, alpha: float = 5e-5, k: float = 2.0) -> None:
        super().__init__()
        if size < 1 or size % 2 == 0:
            raise InputError(f"size={size} has no middle channel; give an odd number, such as 3")
        index = torch.arange(channels)
        near = (index[:, None] - index).abs() <= size // 2
        self.register_buffer("band", alpha * near.float()[:, :, None, None], persistent=False)
        self.register_buffer("offset", torch.full((channels,), k), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` normalized features."""
        root = torch.sqrt(F.conv2d(x * x, self.band, self.offset))
        return x / (root * torch.sqrt(root))
