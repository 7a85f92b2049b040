"""Operators that resize or rearrange images `(B, C, H, W)`, and volumes or signals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import GraphError
from .operator import DAMAGED, Operator

_MODES = {"linear": {1: "linear", 2: "bilinear", 3: "trilinear"}, "cubic": {2: "bicubic"}}
_RESIZE_MODES = ("nearest", *_MODES)
_ROUND: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda places: np.ceil(places - 0.5),
    "round_prefer_ceil": lambda places: np.floor(places + 0.5),
}
_HALF = ("half_pixel", "pytorch_half_pixel")


@dataclass(frozen=True)
class Resizing:
    """The attributes of Resize, as in the ONNX specification."""

    antialias: int = 0
    axes: Sequence[int] | None = None
    coordinate_transformation_mode: str = "half_pixel"
    cubic_coeff_a: float = -0.75
    exclude_outside: int = 0
    extrapolation_value: float = 0.0
    keep_aspect_ratio_policy: str = "stretch"
    mode: str = "nearest"
    nearest_mode: str = "round_prefer_floor"

    def __post_init__(self) -> None:
        plain = not self.antialias and not self.exclude_outside and self.keep_aspect_ratio_policy == "stretch"
        if not plain or self.cubic_coeff_a != -0.75:
            options = "antialias, exclude_outside, keep_aspect_ratio_policy or another cubic_coeff_a"
            raise GraphError(f"Resize with {options} cannot be imported")
        if self.mode not in _RESIZE_MODES or self.nearest_mode not in _ROUND:
            raise GraphError(f"Resize has no mode {self.mode!r} with nearest_mode {self.nearest_mode!r}; {DAMAGED}")


def _resize(
    x: Tensor,
    roi: Any = None,
    scales: Sequence[float] | None = None,
    sizes: Sequence[Any] | None = None,
    **attributes: Any,
) -> Tensor:
    if not sizes and not scales:
        raise GraphError("Resize has neither scales nor sizes; " + DAMAGED)
    options = Resizing(**attributes)
    mode, how = options.mode, options.coordinate_transformation_mode
    axes = [a % x.dim() for a in (range(x.dim()) if options.axes is None else options.axes)]
    wanted: dict[int, tuple[Any, float]] = {}  # the new size of every dimension that changes, and its scale
    for place, axis in enumerate(axes):
        if sizes:
            if not isinstance(sizes[place], int) and axis < 2:
                continue  # the batch
            new, scale = sizes[place], sizes[place] / x.shape[axis]
        else:
            assert scales
            if scales[place] == 1:
                continue
            new, scale = math.floor(x.shape[axis] * scales[place]), scales[place]
        if not isinstance(new, int) or not isinstance(x.shape[axis], int):
            raise GraphError("Resize of a dimension of free size cannot be imported; leave that dimension fixed")
        if new != x.shape[axis] or scale != 1:
            wanted[axis] = new, scale
    if not wanted:
        return x
    if mode in _MODES and min(wanted) >= 2 and (fast := _interpolated(x, wanted, mode, how, bool(sizes))) is not None:
        return fast
    if mode == "cubic":
        raise GraphError(f"cubic Resize in mode {how!r} of dimensions {sorted(wanted)} cannot be imported")
    rounds = mode == "nearest" and options.nearest_mode in ("floor", "ceil")
    for axis, (new, scale) in wanted.items():
        if how == "half_pixel_symmetric" and rounds and scale != int(scale):
            raise GraphError(
                f"Resize in mode {how!r} with nearest_mode {options.nearest_mode!r} and the scale {scale:g} cannot be "
                "imported, because ONNX Runtime differs from the specification there; use 'half_pixel'"
            )
        places = _places(how, x.shape[axis], new, scale)
        x = _nearest(x, axis, places, options.nearest_mode) if mode == "nearest" else _linear(x, axis, places)
    return x


def _interpolated(x: Tensor, wanted: dict[int, tuple[int, float]], mode: str, how: str, sized: bool) -> Tensor | None:
    """Return the result of torch's own function, or None if torch has none."""
    kind = _MODES[mode].get(x.dim() - 2)
    if kind is None or how not in (*_HALF, "align_corners") or (how in _HALF and not sized and _uneven(x, wanted)):
        return None
    if how == "half_pixel" or all(new > 1 for new, _ in wanted.values()):
        size = [wanted[axis][0] if axis in wanted else x.shape[axis] for axis in range(2, x.dim())]
        return F.interpolate(x, size=size, mode=kind, align_corners=how == "align_corners")
    return None


def _uneven(x: Tensor, wanted: dict[int, tuple[int, float]]) -> bool:
    """Whether a scale is not the exact ratio of the sizes."""
    return any(abs(new / x.shape[axis] - scale) > 1e-6 for axis, (new, scale) in wanted.items())


def _places(how: str, old: int, new: int, scale: float) -> np.ndarray:
    """Return the position in the old dimension of every element of the new one."""
    x, scale = np.arange(new, dtype=np.float32), float(np.float32(scale))  # as runtimes compute it, to round equally
    if how == "asymmetric":
        return x / scale
    if how == "align_corners":
        return x * (old - 1) / (new - 1) if new > 1 else x * 0
    if how == "pytorch_half_pixel" and new == 1:
        return x * 0
    if how in _HALF:
        return (x + 0.5) / scale - 0.5
    if how == "half_pixel_symmetric":
        return old / 2 * (1 - new / (scale * old)) + (x + 0.5) / scale - 0.5
    if how == "tf_half_pixel_for_nn":
        return (x + 0.5) / scale
    raise GraphError(f"Resize in mode {how!r} cannot be imported; use 'half_pixel', 'asymmetric' or 'align_corners'")


def _nearest(x: Tensor, axis: int, places: np.ndarray, how: str) -> Tensor:
    chosen = np.clip(_ROUND[how](places), 0, x.shape[axis] - 1).astype(int).tolist()
    return x.index_select(axis, torch.tensor(chosen, device=x.device))


def _linear(x: Tensor, axis: int, places: np.ndarray) -> Tensor:
    places = np.clip(places, 0, x.shape[axis] - 1)
    low = np.floor(places).astype(int)
    high = np.minimum(low + 1, x.shape[axis] - 1)
    shape = [-1 if d == axis else 1 for d in range(x.dim())]
    share = torch.tensor((places - low).tolist(), dtype=x.dtype, device=x.device).reshape(shape)
    a, b = (x.index_select(axis, torch.tensor(one.tolist(), device=x.device)) for one in (low, high))
    return a + (b - a) * share


def _upsample(x: Tensor, scales: Sequence[float], *, mode: str = "nearest") -> Tensor:
    return _resize(x, None, scales, mode=mode, coordinate_transformation_mode="asymmetric", nearest_mode="floor")


def _depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    if mode not in ("CRD", "DCR"):
        raise GraphError(f"DepthToSpace has no mode {mode!r}; {DAMAGED}")
    if mode == "CRD":
        return F.pixel_shuffle(x, blocksize)
    b, c, h, w = x.shape
    y = x.reshape(b, blocksize, blocksize, c // blocksize**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(b, c // blocksize**2, h * blocksize, w * blocksize)


def _space_to_depth(x: Tensor, *, blocksize: int) -> Tensor:
    b, c, h, w = x.shape
    y = x.reshape(b, c, h // blocksize, blocksize, w // blocksize, blocksize).permute(0, 3, 5, 1, 2, 4)
    return y.reshape(b, c * blocksize**2, h // blocksize, w // blocksize)


def _grid_sample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Tensor:
    kind = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    return F.grid_sample(x, grid, kind, padding_mode, bool(align_corners))


RESIZING: dict[str, Operator] = {
    "DepthToSpace": Operator(_depth_to_space),
    "GridSample": Operator(_grid_sample),
    "Resize": Operator(_resize, numbers=(1, 2, 3)),
    "SpaceToDepth": Operator(_space_to_depth),
    "Upsample": Operator(_upsample, numbers=(1,)),
}
