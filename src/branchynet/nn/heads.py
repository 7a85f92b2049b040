"""Classifiers of several sizes for features of any shape, by name: what a designer tries.

Shape letters: B batch, C channels or classes, H height, W width, L tokens, D features.
"""

import math

from torch import Tensor, nn

from .branches import TokenLinear

_LINEAR, _HIDDEN = 256, 1024  # features that a classifier without convolutions reads, about
_FINE = 16  # positions a side that the first convolution gives
_CONVOLUTIONS = ("8", "16-32", "32-64", "32-64-64", "64-64-128", "64x2-128x2-128")
DEEP = frozenset({"conv-64x2-128x2-128"})
"""Heads with several convolutions between two poolings."""


def heads(features: Tensor, num_classes: int, feature_dim: int | None = None) -> dict[str, nn.Module]:
    """Heads to `(B, num_classes)` by name, about the cheapest first; none where they would be integers' or scalars'.

    Args:
        features: such as they will read, `(B, ...)`.
        num_classes: outputs.
        feature_dim: which of their dimensions holds channels or features, where known; else the second of maps
            `(B, C, H, W)` and the last of others.
    """
    if not features.is_floating_point() or features.dim() < 2:
        return {}
    dim = ((1 if features.dim() > 3 else -1) if feature_dim is None else feature_dim) % features.dim()
    if features.dim() == 4 and dim == 1:
        return _on_maps(features.shape, num_classes)
    width = features.shape[dim]
    position = -1 if dim == features.dim() - 1 else dim
    return {
        "linear": TokenLinear(width, num_classes, position),
        "hidden-64": nn.Sequential(TokenLinear(width, 64, position), nn.ReLU(), nn.Linear(64, num_classes)),
    }


def _on_maps(shape: tuple[int, ...], classes: int) -> dict[str, nn.Module]:
    _, channels, height, width = shape
    found: dict[str, nn.Module] = {
        "linear": _flat(shape, classes, _LINEAR, 0),
        "hidden-64": _flat(shape, classes, _HIDDEN, 64),
    }
    for widths in _CONVOLUTIONS:
        if min(height, width) >= 2 ** len(widths.split("-")):
            found[f"conv-{widths}"] = _convolutions(channels, (height, width), classes, widths)
    return found


def _flat(shape: tuple[int, ...], classes: int, most: int, hidden: int) -> nn.Module:
    """Max-pooling to at most so many features, and one or two linear layers."""
    _, channels, height, width = shape
    grid = max(1, math.isqrt(most // channels))
    size = math.ceil(height / grid), math.ceil(width / grid)
    layers: list[nn.Module] = [] if size == (1, 1) else [nn.MaxPool2d(size, ceil_mode=True)]
    features = channels * math.ceil(height / size[0]) * math.ceil(width / size[1])
    layers.append(nn.Flatten())
    if hidden:
        layers += [nn.Linear(features, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden or features, classes))


def _convolutions(channels: int, sides: tuple[int, int], classes: int, widths: str) -> nn.Module:
    """Convolutions, each with batch norm and ReLU, pooling by 2 after one or (``x2``) two, and a linear layer.

    The first strides over maps of more than 16 positions a side.
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
