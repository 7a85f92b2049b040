"""Ready-made branches: small classifiers that read features of the backbone.

Shape letters: B batch, C channels or classes, H height, W width, L tokens, D features.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError

_LINEAR, _HIDDEN = 256, 1024  # approximate number of features for a classifier without convolutions
_FINE = 16  # positions per side after the first convolution
_CONVOLUTIONS = ("8", "16-32", "32-64", "32-64-64", "64-64-128", "64x2-128x2-128")
DEEP_BRANCHES = frozenset({"conv-64x2-128x2-128"})
"""Names of branches with several convolutions between two poolings."""


class ConvBranch(nn.Sequential):
    """Convolutions with ReLU and max-pooling, mean over positions, linear: `(B, C, H, W)` -> `(B, num_classes)`.

    Args:
        in_channels: C of the feature map.
        num_classes: number of outputs.
        channels: output channels of each 3x3 convolution (the paper advises more layers early, fewer late).
    """

    def __init__(self, in_channels: int, num_classes: int, channels: Sequence[int] = (32,)) -> None:
        layers: list[nn.Module] = [nn.ReLU()]
        for width in channels:
            layers += [nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
            in_channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes))


class PooledLinear(nn.Sequential):
    """The cheapest branch: ReLU, average-pooling to a small grid, linear. `(B, C, H, W)` -> `(B, num_classes)`."""

    def __init__(self, in_channels: int, num_classes: int, grid: int = 4) -> None:
        super().__init__(
            nn.ReLU(), nn.AdaptiveAvgPool2d(grid), nn.Flatten(), nn.Linear(in_channels * grid * grid, num_classes)
        )


class TokenLinear(nn.Module):
    """Mean over all positions, layer norm, linear: `(B, L, D)`, `(B, H, W, D)` or `(B, D)` -> `(B, num_classes)`.

    Args:
        features: D.
        num_classes: number of outputs.
        feature_dim: the dimension of size D; 1 for `(B, D, L)` or `(B, D, H, W)`.
    """

    def __init__(self, features: int, num_classes: int, feature_dim: int = -1) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.norm = nn.LayerNorm(features)
        self.classifier = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(B, num_classes)`."""
        positions = [d for d in range(1, x.dim()) if d != self.feature_dim % x.dim()]
        return self.classifier(self.norm(x.mean(dim=positions) if positions else x))


class DenseBranch(nn.Module):
    """Classify every position, then resize: `(B, C, H, W)` -> `(B, num_classes, *size)`.

    The layers are ReLU, a 3x3 convolution, ReLU, and a 1x1 convolution.

    Args:
        in_channels: C of the feature map.
        num_classes: number of outputs per position.
        size: height and width of the backbone's output.
        channels: output channels of the 3x3 convolution.
    """

    def __init__(self, in_channels: int, num_classes: int, size: tuple[int, int], channels: int = 32) -> None:
        super().__init__()
        self.size = size
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(B, num_classes, *size)`."""
        x = self.classifier(torch.relu(self.conv(torch.relu(x))))
        return nn.functional.interpolate(x, size=self.size, mode="bilinear", align_corners=False)


class InputMLP(nn.Sequential):
    """A small classifier of raw inputs, with optional pooling and a hidden layer: `(B, ...)` -> `(B, num_classes)`.

    Args:
        shape: `(C, H, W)` of one input, or `(D,)`.
        num_classes: number of outputs.
        hidden: width of the hidden layer; 0 for a linear classifier.
        pool: side of the max-pooling window over pixels; 1 for none.
    """

    def __init__(self, shape: Sequence[int], num_classes: int, hidden: int = 32, pool: int = 2) -> None:
        super().__init__(*_flat(shape, num_classes, (pool, pool), hidden))


def default_branch(features: Tensor, num_classes: int, feature_dim: int | None = None) -> nn.Module:
    """Return a branch with outputs `(B, num_classes)` that suits the shape of the features.

    Args:
        features: an example of the branch's input, `(B, ...)`.
        num_classes: number of outputs.
        feature_dim: the dimension of `features` that holds channels or features; the shape does not show it. The
            default is 1 for `(B, C, H, W)` and `(B, C, T, H, W)`, and the last for `(B, D)` and `(B, L, D)`. Use -1 for
            `(B, H, W, C)` and 1 for `(B, C, L)`.

    Returns:
        `ConvBranch` for `(B, C, H, W)`, else `TokenLinear`.

    Raises:
        InputError: the features have no second dimension, or are integers (tap a later submodule).
    """
    if not torch.is_floating_point(features):
        raise InputError(f"no default branch reads {features.dtype} features; tap a later submodule or bring a branch")
    if features.dim() < 2:
        raise InputError(
            f"no default branch for features of shape {tuple(features.shape)}; use (B, C, H, W), (B, H, W, C), "
            "(B, L, D) or (B, D), or pass branch="
        )
    dim = _feature_dim(features, feature_dim)
    width = features.shape[dim]
    if features.dim() == 4 and dim == 1:
        return ConvBranch(width, num_classes, (max(8, min(64, width)),))
    return TokenLinear(width, num_classes, dim)


def named_branches(features: Tensor, num_classes: int, feature_dim: int | None = None) -> dict[str, nn.Module]:
    """Return branches of several sizes by name, roughly the cheapest first; empty for integer or scalar features.

    Args:
        features: an example of the branches' input, `(B, ...)`.
        num_classes: number of outputs of each branch.
        feature_dim: the dimension of `features` that holds channels or features, if known; by default 1 for maps
            `(B, C, H, W)`, else the last.
    """
    if not features.is_floating_point() or features.dim() < 2:
        return {}
    dim = _feature_dim(features, feature_dim)
    if features.dim() == 4 and dim == 1:
        return _on_maps(features.shape[1:], num_classes)
    width = features.shape[dim]
    return {
        "linear": TokenLinear(width, num_classes, dim),
        "hidden-64": nn.Sequential(TokenLinear(width, 64, dim), nn.ReLU(), nn.Linear(64, num_classes)),
    }


def _feature_dim(features: Tensor, given: int | None) -> int:
    """The dimension that holds channels or features: as given, or by the number of dimensions; -1 for the last."""
    dim = ((1 if features.dim() > 3 else -1) if given is None else given) % features.dim()
    return -1 if dim == features.dim() - 1 else dim


def _on_maps(shape: tuple[int, ...], classes: int) -> dict[str, nn.Module]:
    channels, *sides = shape
    found: dict[str, nn.Module] = {}
    for name, most, hidden in (("linear", _LINEAR, 0), ("hidden-64", _HIDDEN, 64)):
        grid = max(1, math.isqrt(most // channels))  # at most `most` features, or one position
        found[name] = nn.Sequential(*_flat(shape, classes, [math.ceil(side / grid) for side in sides], hidden))
    for widths in _CONVOLUTIONS:
        if min(sides) >= 2 ** len(widths.split("-")):
            found[f"conv-{widths}"] = _convolutions(channels, sides, classes, widths)
    return found


def _flat(shape: Sequence[int], classes: int, window: Sequence[int], hidden: int) -> list[nn.Module]:
    """Max-pooling of maps `(C, H, W)`, then one or two linear layers; no pooling for `(D,)` or a window of 1."""
    layers: list[nn.Module] = []
    if len(shape) == 3 and max(window) > 1:
        layers.append(nn.MaxPool2d((window[0], window[1]), ceil_mode=True))
        shape = (shape[0], *(math.ceil(side / size) for side, size in zip(shape[1:], window, strict=True)))
    features = math.prod(shape)
    layers.append(nn.Flatten())
    if hidden:
        layers += [nn.Linear(features, hidden), nn.ReLU()]
    return [*layers, nn.Linear(hidden or features, classes)]


def _convolutions(channels: int, sides: Sequence[int], classes: int, widths: str) -> nn.Module:
    """Convolutions with batch norm and ReLU, pooling by 2 after each one or (``x2``) two of them, and a linear layer.

    On maps of more than 16 positions per side, the first convolution has a stride.
    """
    layers: list[nn.Module] = []
    height, width = sides
    for part in widths.split("-"):
        out, _, times = part.partition("x")
        for _ in range(int(times or 1)):
            step = (1, 1) if layers else (math.ceil(height / _FINE), math.ceil(width / _FINE))
            window = (max(3, 2 * step[0] - 1), max(3, 2 * step[1] - 1))
            padding = (window[0] // 2, window[1] // 2)
            layers += [
                nn.Conv2d(channels, int(out), window, stride=step, padding=padding, bias=False),
                nn.BatchNorm2d(int(out)),
                nn.ReLU(),
            ]
            channels = int(out)
            height, width = math.ceil(height / step[0]), math.ceil(width / step[1])
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, classes))
