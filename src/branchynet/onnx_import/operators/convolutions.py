"""Convolutions and poolings. Shape letters: B batch, C channels, and one or more spatial dimensions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import GraphError
from .operator import DAMAGED, Operator

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


@dataclass(frozen=True)
class Window:
    """The attributes of convolutions and poolings, as in the ONNX specification; empty ones have its defaults."""

    auto_pad: str = "NOTSET"
    ceil_mode: int = 0
    count_include_pad: int = 0
    dilations: Sequence[int] = ()
    group: int = 1
    kernel_shape: Sequence[int] = ()
    output_padding: Sequence[int] = ()
    output_shape: Sequence[int] = ()
    p: int = 2
    pads: Sequence[int] = ()
    storage_order: int = 0
    strides: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.auto_pad not in ("NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"):
            raise GraphError(f"there is no auto_pad {self.auto_pad!r}; {DAMAGED}")

    def steps(self, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return strides and dilations of `count` dimensions."""
        return tuple(self.strides) or (1,) * count, tuple(self.dilations) or (1,) * count

    def fixed_pads(self, count: int) -> tuple[list[int], list[int]]:
        """Return the padding that is written, before and after every dimension."""
        return list(self.pads[:count]) or [0] * count, list(self.pads[count:]) or [0] * count

    def padding(self, x: Tensor, kernel: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the padding before and after every spatial dimension of `x`."""
        count = len(kernel)
        if self.auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            totals = [
                ((n + s - 1) // s - 1) * s + (k - 1) * d + 1 - n
                for n, k, s, d in zip(x.shape[2:], kernel, *self.steps(count), strict=True)
            ]
            if any(total < -1 for total in totals):  # ONNX Runtime crops there, or fails; the specification pads by 0
                raise GraphError(
                    f"auto_pad {self.auto_pad!r} with strides {self.strides} larger than the window cannot be "
                    "imported; write the file with pads"
                )
            return self.halves([max(0, total) for total in totals])
        return ([0] * count, [0] * count) if self.auto_pad == "VALID" else self.fixed_pads(count)

    def reach(self, x: Tensor, kernel: Sequence[int], begins: Sequence[int], ends: Sequence[int]) -> list[int]:
        """Return the padding after every dimension that holds all windows of a pooling, and no more.

        As in ONNX Runtime, `ceil_mode` adds a window that passes the end, unless it starts in the padding there.
        """
        found = []
        for n, k, b, e, s, d in zip(x.shape[2:], kernel, begins, ends, *self.steps(len(kernel)), strict=True):
            room, extent = n + b + e, (k - 1) * d + 1
            last = (room - extent + (s - 1 if self.ceil_mode else 0)) // s * s  # where the last window starts
            if self.ceil_mode and last >= n + b:
                last -= s
            found.append(last + extent - n - b)
        return found

    def halves(self, totals: Sequence[int]) -> tuple[list[int], list[int]]:
        """Divide paddings into those before and after; SAME_UPPER has the odd one after."""
        less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
        return (less, more) if self.auto_pad == "SAME_UPPER" else (more, less)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, **attributes: Any) -> Tensor:
    window, count = Window(**attributes), _spatial("Conv", x, _CONV)
    strides, dilations = window.steps(count)
    begins, ends = window.padding(x, weight.shape[2:])
    if begins != ends:
        x, begins = _padded(x, begins, ends), [0] * count
    return _CONV[count](x, weight, bias, strides, begins, dilations, window.group)


def _conv_transpose(x: Tensor, weight: Tensor, bias: Tensor | None = None, **attributes: Any) -> Tensor:
    window, count = Window(**attributes), _spatial("ConvTranspose", x, _CONV_TRANSPOSE)
    strides, dilations = window.steps(count)
    extra, sizes = tuple(window.output_padding) or (0,) * count, list(window.output_shape)[-count:]
    if window.auto_pad in ("SAME_UPPER", "SAME_LOWER") and not sizes:
        sizes = [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
    begins, ends = window.fixed_pads(count)
    if sizes:
        terms = zip(strides, x.shape[2:], extra, weight.shape[2:], dilations, sizes, strict=True)
        begins, ends = window.halves([s * (n - 1) + e + (k - 1) * d + 1 - size for s, n, e, k, d, size in terms])
    if begins == ends and min(begins) >= 0:
        return _CONV_TRANSPOSE[count](x, weight, bias, strides, begins, extra, window.group, dilations)
    y = _CONV_TRANSPOSE[count](x, weight, bias, strides, 0, extra, window.group, dilations)
    return _padded(y, [-b for b in begins], [-e for e in ends])


def _max_pool(x: Tensor, *, outputs: int, **attributes: Any) -> Tensor:
    if outputs > 1:
        raise GraphError("the positions that MaxPool returns cannot be imported, only the largest values")
    window, count = Window(**attributes), _spatial("MaxPool", x, _MAX_POOL)
    kernel, (strides, dilations) = tuple(window.kernel_shape), window.steps(count)
    begins, ends = window.padding(x, kernel)
    if _even(begins, ends, kernel):
        return _MAX_POOL[count](x, kernel, strides, begins, dilations, bool(window.ceil_mode))
    x = _padded(x, begins, window.reach(x, kernel, begins, ends), -torch.inf)
    return _MAX_POOL[count](x, kernel, strides, 0, dilations)


def _average_pool(x: Tensor, **attributes: Any) -> Tensor:
    window, count = Window(**attributes), _spatial("AveragePool", x, _AVG_POOL)
    kernel, (strides, dilations) = tuple(window.kernel_shape), window.steps(count)
    if any(d != 1 for d in dilations):
        raise GraphError(f"AveragePool with dilations {dilations} cannot be imported, only with 1")
    begins, ends = window.padding(x, kernel)
    pool, include = _AVG_POOL[count], bool(window.count_include_pad)
    if _even(begins, ends, kernel):
        return pool(x, kernel, strides, begins, bool(window.ceil_mode), include)
    reach = window.reach(x, kernel, begins, ends)
    ones = torch.ones_like(x[:1, :1])
    if include:
        ones = _padded(ones, begins, ends, 1.0)
        rest = [r - e for r, e in zip(reach, ends, strict=True)]
        ones = _padded(ones, [0] * count, rest)
    else:
        ones = _padded(ones, begins, reach)
    # the share of each window that counts
    return pool(_padded(x, begins, reach), kernel, strides) / pool(ones, kernel, strides)


def _lp_pool(x: Tensor, **attributes: Any) -> Tensor:
    window, count = Window(**attributes), _spatial("LpPool", x, _AVG_POOL)
    kernel, (strides, dilations) = tuple(window.kernel_shape), window.steps(count)
    if any(d != 1 for d in dilations):
        raise GraphError(f"LpPool with dilations {dilations} cannot be imported, only with 1")
    begins, ends = window.padding(x, kernel)
    powers = _padded(x.abs() ** window.p, begins, window.reach(x, kernel, begins, ends))
    return (_AVG_POOL[count](powers, kernel, strides) * math.prod(kernel)) ** (1 / window.p)


def _even(begins: Sequence[int], ends: Sequence[int], kernel: Sequence[int]) -> bool:
    """Whether torch's own padding is enough."""
    return begins == ends and all(b <= k // 2 for b, k in zip(begins, kernel, strict=True))


def _spatial(name: str, x: Tensor, known: dict[int, Any]) -> int:
    """Return the number of spatial dimensions. Raises `GraphError` if torch has no such operator."""
    if x.dim() - 2 not in known:
        raise GraphError(f"{name} reads {x.dim()} dimensions; the batch, channels and 1 to 3 more can be imported")
    return x.dim() - 2


def _padded(x: Tensor, begins: Sequence[int], ends: Sequence[int], value: float = 0.0) -> Tensor:
    widths = [width for pair in zip(reversed(begins), reversed(ends), strict=True) for width in pair]
    return F.pad(x, widths, value=value)


def _global_average(x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.dim())), keepdim=True)


def _global_max(x: Tensor) -> Tensor:
    return x.amax(list(range(2, x.dim())), keepdim=True)


CONVOLUTIONS: dict[str, Operator] = {
    "AveragePool": Operator(_average_pool),
    "Conv": Operator(_conv, weights=(1, 2)),
    "ConvTranspose": Operator(_conv_transpose, weights=(1, 2)),
    "GlobalAveragePool": Operator(_global_average),
    "GlobalMaxPool": Operator(_global_max),
    "LpPool": Operator(_lp_pool),
    "MaxPool": Operator(_max_pool),
}
