"""ResNet-20 to ResNet-110 for 32 x 32 colour images, and the paper's branches on them.

Both take pixels in [0, 1], `(B, 3, 32, 32)` float32, normalize them inside, and give logits `(B, 10)`. The plain
network is that of He et al. (arXiv:1512.03385, section 4.2), with shortcuts that have no parameters.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..nn.network import BranchyNet
from .designs import check_branches, designed
from .layers import LocalResponseNorm, Normalize, initialize
from .weights import load_shipped


def _conv(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: `(B, C, H, W)` -> `(B, channels_out, H / stride, W / stride)`.

    Where the shape changes, the shortcut takes every `stride`-th position and fills the new channels with 0.
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
    """A residual network of three stages with 16, 32 and 64 channels; 253 M multiply-accumulates for 18 blocks each.

    (The 255 M that are published for ResNet-110 count batch normalization, which `export` folds away.)

    Args:
        blocks: basic blocks a stage.
        num_classes: outputs.
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
    """ResNet-n, untrained or with the weights shipped for CIFAR-10.

    Args:
        n: layers, 6m + 2 for m basic blocks a stage: 20, 32, 44, 56, 110.
        num_classes: outputs.
        pretrained: with the weights shipped for CIFAR-10.

    Raises:
        InputError: another `n`, pretrained weights for other than 10 classes, or none ship.
    """
    net = ResNet(_blocks(n), num_classes)
    return load_shipped(net, f"resnet{n}-cifar10", num_classes, 10) if pretrained else net


# Where `advise` put exits on ResNet-110, the same for both targets; see benchmarks/experiments/design.py.
_DESIGN = {"input": "conv-64-64-128", "stage1.4": "conv-64x2-128x2-128", "stage1.10": "conv-64x2-128x2-128"}


def b_resnet(
    n: int, num_classes: int = 10, *, branches: str = "designed", target: str = "latency", pretrained: bool = False
) -> BranchyNet:
    """B-ResNet-n: ResNet-n with early exits, where `advise` put them (4 exits) or as in the paper (3 exits).

    The paper's branches stand after the stem and after the 16-channel stage. The first of them alone costs 55 M
    multiply-accumulates, as published; more than the whole of ResNet-20.

    Args:
        n: layers, as `resnet` takes them; of designs there is one for 110.
        num_classes: outputs.
        branches: ``"designed"`` or ``"published"``.
        target: what the design is for: ``"latency"``, one sample a call, or ``"batch"``, 64; for 110 it is the same.
        pretrained: with the weights shipped for CIFAR-10.

    Raises:
        InputError: another `n`, `branches` or `target`, no design for this `n`, pretrained weights for other than 10
            classes, or none ship.
    """
    check_branches(branches, ("designed", "published"))
    backbone = ResNet(_blocks(n), num_classes)
    if branches == "designed":
        if n != 110:
            raise InputError(
                f"no exits have been designed for n={n}, only for 110: take branches='published', or let advise(...) "
                "place them on your trained network"
            )
        net = designed(backbone, {"latency": _DESIGN, "batch": _DESIGN}, target, (3, 32, 32))
        return load_shipped(net, f"b_resnet{n}-latency-cifar10", num_classes, 10) if pretrained else net
    first = nn.Sequential(
        nn.Conv2d(16, 64, 5, padding=2),
        nn.ReLU(),
        LocalResponseNorm(64),
        nn.Conv2d(64, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 32 * 32, num_classes),
    )
    second = nn.Sequential(BasicBlock(16, 16), nn.Flatten(), nn.Linear(16 * 32 * 32, num_classes))
    net = BranchyNet(backbone, {"stem": initialize(first), "stage1": initialize(second)})
    return load_shipped(net, f"b_resnet{n}-cifar10", num_classes, 10) if pretrained else net


def _blocks(n: int) -> int:
    if n < 8 or (n - 2) % 6:
        lower = max(8, n - (n - 2) % 6)
        raise InputError(f"n={n} is not 6m + 2 layers (m blocks in each of 3 stages); use {lower} or {lower + 6}")
    return (n - 2) // 6
