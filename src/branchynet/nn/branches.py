"""Ready-made branches: small classifiers fed by a feature map.

Shape letters: B batch, C channels or classes, H height, W width, L tokens, D features.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError


class ConvBranch(nn.Sequential):
    """Convolutions, ReLU and max-pooling, average over positions, linear: `(B, C, H, W)` -> `(B, num_classes)`.

    Args:
        in_channels: C of the feature map.
        num_classes: outputs.
        channels: output channels of each 3x3 convolution (the paper's advice: more layers early, fewer late).
    """

    def __init__(self, in_channels: int, num_classes: int, channels: Sequence[int] = (32,)) -> None:
        layers: list[nn.Module] = [nn.ReLU()]
        for width in channels:
            layers += [nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
            in_channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes))


class PooledLinear(nn.Sequential):
    """ReLU, average-pooling to a small grid, linear: `(B, C, H, W)` -> `(B, num_classes)`, the cheapest branch."""

    def __init__(self, in_channels: int, num_classes: int, grid: int = 4) -> None:
        super().__init__(
            nn.ReLU(), nn.AdaptiveAvgPool2d(grid), nn.Flatten(), nn.Linear(in_channels * grid * grid, num_classes)
        )


class TokenLinear(nn.Module):
    """Mean over all positions, layer norm, linear: `(B, L, D)`, `(B, H, W, D)` or `(B, D)` -> `(B, num_classes)`.

    Args:
        features: D.
        num_classes: outputs.
        feature_dim: which dimension is D; 1 for `(B, D, L)` or `(B, D, H, W)`.
    """

    def __init__(self, features: int, num_classes: int, feature_dim: int = -1) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.norm = nn.LayerNorm(features)
        self.classifier = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, num_classes)`."""
        positions = [d for d in range(1, x.dim()) if d != self.feature_dim % x.dim()]
        return self.classifier(self.norm(x.mean(dim=positions) if positions else x))


class DenseBranch(nn.Module):
    """A 3x3 convolution, ReLU, a classifier at every position, resized: `(B, C, H, W)` -> `(B, num_classes, *size)`.

    Args:
        in_channels: C of the feature map.
        num_classes: outputs at every position.
        size: height and width of the backbone's own output.
        channels: of the convolution.
    """

    def __init__(self, in_channels: int, num_classes: int, size: tuple[int, int], channels: int = 32) -> None:
        super().__init__()
        self.size = size
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, num_classes, *size)`."""
        x = self.classifier(torch.relu(self.conv(torch.relu(x))))
        return nn.functional.interpolate(x, size=self.size, mode="bilinear", align_corners=False)


class InputMLP(nn.Sequential):
    """A small classifier on the raw input: optional pooling, one hidden layer: `(B, C, H, W)` -> `(B, num_classes)`.

    Args:
        shape: `(C, H, W)` of one input, or `(D,)`.
        num_classes: outputs.
        hidden: width of the hidden layer; 0 for a linear classifier.
        pool: side of the max-pooling window over pixels; 1 for none.
    """

    def __init__(self, shape: Sequence[int], num_classes: int, hidden: int = 32, pool: int = 2) -> None:
        layers: list[nn.Module] = []
        if len(shape) == 3 and pool > 1:
            layers.append(nn.MaxPool2d(pool, ceil_mode=True))
            shape = (shape[0], -(-shape[1] // pool), -(-shape[2] // pool))
        features = math.prod(shape)
        layers.append(nn.Flatten())
        if hidden:
            layers += [nn.Linear(features, hidden), nn.ReLU()]
        super().__init__(*layers, nn.Linear(hidden or features, num_classes))


def default_branch(features: Tensor, num_classes: int, feature_dim: int | None = None) -> nn.Module:
    """A sensible branch to `(B, num_classes)` for features of any shape with a leading batch.

    Args:
        features: such as the branch will read.
        num_classes: outputs.
        feature_dim: which dimension of them holds channels or features, which their shape alone does not say. By
            default 1 for `(B, C, H, W)` and `(B, C, T, H, W)` and the last for `(B, D)` and `(B, L, D)`; -1 for
            `(B, H, W, C)`, 1 for `(B, C, L)`.

    Returns:
        `ConvBranch` for `(B, C, H, W)`, else `TokenLinear`.

    Raises:
        InputError: features without a second dimension, or of integers (tap a later submodule).
    """
    if not torch.is_floating_point(features):
        raise InputError(f"no default branch reads {features.dtype} features; tap a later submodule or bring a branch")
    if features.dim() < 2:
        raise InputError(
            f"no default branch for features of shape {tuple(features.shape)}; use (B, C, H, W), (B, H, W, C), "
            "(B, L, D) or (B, D), or pass branch="
        )
    dim = (1 if features.dim() > 3 else -1) if feature_dim is None else feature_dim
    dim %= features.dim()
    if features.dim() == 4 and dim == 1:
        channels = features.shape[1]
        return ConvBranch(channels, num_classes, (max(8, min(64, channels)),))
    return TokenLinear(features.shape[dim], num_classes, -1 if dim == features.dim() - 1 else dim)
