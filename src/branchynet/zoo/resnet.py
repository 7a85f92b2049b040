"""ResNet and B-ResNet for 32 x 32 color images.

Inputs are pixels in [0, 1], `(B, 3, 32, 32)` float32, which the networks normalize; outputs are logits `(B, 10)`. The
plain network is that of He et al. (arXiv:1512.03385, section 4.2), with shortcuts without parameters.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..nn.network import BranchyNet
from .designs import check_known, designed
from .layers import LocalResponseNorm, Normalize, initialize
from .weights import load_shipped


def _conv(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: `(B, C, H, W)` -> `(B, channels_out, H / stride, W / stride)`.

    If the shape changes, the shortcut takes every `stride`-th position and fills the new channels with 0.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv(channels_in, channels_out, stride)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = _conv(channels_out, channels_out)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.stride = stride
        self.added = channels_out - channels_in

    def forward(self, x: Tensor) -> Tensor:
        """`(B, channels_out, H / stride, W / stride)` features."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.added:
            x = F.pad(x, (0, 0, 0, 0, 0, self.added))
        return torch.relu(x + y)


class ResNet(nn.Module):
    """A residual network of three stages with 16, 32 and 64 channels, and `blocks` basic blocks per stage.

    With 18 blocks, it takes 253 M multiply-accumulates. The published 255 M include batch normalization, which `export`
    folds into the convolutions.
    """

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.normalize = Normalize()
        self.stem = nn.Sequential(_conv(3, 16), nn.BatchNorm2d(16), nn.ReLU())
        self.stage1 = _stage(blocks, 16, 16)
        self.stage2 = _stage(blocks, 16, 32, stride=2)
        self.stage3 = _stage(blocks, 32, 64, stride=2)
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, num_classes)`."""
        x = self.stem(self.normalize(x))
        return self.classifier(self.stage3(self.stage2(self.stage1(x))))


def _stage(blocks: int, channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    first = BasicBlock(channels_in, channels_out, stride)
    return nn.Sequential(first, *(BasicBlock(channels_out, channels_out) for _ in range(blocks - 1)))


def resnet(n: int, num_classes: int = 10, *, pretrained: bool = False) -> ResNet:
    """Return ResNet-n, untrained or with the weights shipped for CIFAR-10.

    Args:
        n: number of layers, 6m + 2 for m basic blocks per stage: 20, 32, 44, 56, 110.
        num_classes: number of classes.
        pretrained: whether to load the weights shipped for CIFAR-10.

    Raises:
        InputError: another `n`, or pretrained weights that do not ship or for a number of classes other than 10.
    """
    net = ResNet(_blocks(n), num_classes)
    return load_shipped(net, f"resnet{n}-cifar10", num_classes) if pretrained else net


# Exits designed by `advise` for ResNet-110, the same for both targets; see benchmarks/experiments/design.py.
_DESIGN = {"input": "conv-64-64-128", "stage1.4": "conv-64x2-128x2-128", "stage1.10": "conv-64x2-128x2-128"}


def b_resnet(
    n: int, num_classes: int = 10, *, branches: str = "designed", target: str = "latency", pretrained: bool = False
) -> BranchyNet:
    """Return B-ResNet-n: ResNet-n with early exits, designed by `advise` (4 exits) or from the paper (3 exits).

    The paper's branches follow the stem and the 16-channel stage. The first one costs 55 M multiply-accumulates, as
    published, which is more than all of ResNet-20.

    Args:
        n: number of layers, as in `resnet`; designed exits exist for 110 only.
        num_classes: number of classes.
        branches: ``"designed"`` or ``"published"``.
        target: ``"latency"`` or ``"batch"``; the design for 110 is the same for both.
        pretrained: whether to load the weights shipped for CIFAR-10.

    Raises:
        InputError: unknown `n`, `branches` or `target`, no design for this `n`, or pretrained weights that do not ship
            or for a number of classes other than 10.
    """
    check_known("branches", branches, ("designed", "published"))
    backbone = ResNet(_blocks(n), num_classes)
    if branches == "designed":
        if n != 110:
            raise InputError(
                f"no exits are designed for n={n}, only for 110: use branches='published', or find exits for your "
                "trained network with advise(...)"
            )
        net = designed(backbone, {"latency": _DESIGN, "batch": _DESIGN}, target, (3, 32, 32))
        return load_shipped(net, f"b_resnet{n}-latency-cifar10", num_classes) if pretrained else net
    first = nn.Sequential(
        *(nn.Conv2d(16, 64, 5, padding=2), nn.ReLU(), LocalResponseNorm(64)),
        *(nn.Conv2d(64, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 32 * 32, num_classes)),
    )
    second = nn.Sequential(BasicBlock(16, 16), nn.Flatten(), nn.Linear(16 * 32 * 32, num_classes))
    net = BranchyNet(backbone, {"stem": initialize(first), "stage1": initialize(second)})
    return load_shipped(net, f"b_resnet{n}-cifar10", num_classes) if pretrained else net


def _blocks(n: int) -> int:
    if n < 8 or (n - 2) % 6:
        lower = max(8, n - (n - 2) % 6)
        raise InputError(f"n={n} is not 6m + 2 layers (m blocks in each of 3 stages); use {lower} or {lower + 6}")
    return (n - 2) // 6
