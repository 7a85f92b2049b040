"""Normalization of pixels per channel, as stored in exported files."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError


@dataclass(frozen=True)
class Normalization:
    """Subtract a mean and divide by a standard deviation per channel, both of pixels in [0, 1].

    Attributes:
        mean: `(C,)`.
        std: `(C,)`, above 0.

    Raises:
        InputError: `mean` and `std` are not finite or not of one length, or a `std` is not above 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        numbers = all(math.isfinite(value) for value in (*self.mean, *self.std))
        if not (numbers and self.mean and len(self.mean) == len(self.std) and min(self.std) > 0):
            raise InputError(
                f"mean and std must be finite numbers, one of each per channel, std above 0; got mean={self.mean} and "
                f"std={self.std}"
            )

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Normalize images `(B, C, H, W)` in [0, 1]."""
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (self.mean, self.std))
        return (images - mean) / std


def normalization_of(images: NDArray[np.uint8]) -> Normalization:
    """Return the normalization that gives each channel of `(S, C, H, W)` a mean of 0 and a standard deviation of 1.

    A constant channel is only centered.
    """
    means, stds = [], []
    for channel in range(images.shape[1]):
        # Exact counts and sums give the same result on every machine.
        counts = np.zeros(256, np.int64)
        for image in images[:, channel]:
            counts += np.bincount(image.ravel(), minlength=256)
        levels = [(level / 255, count) for level, count in enumerate(counts.tolist()) if count]
        total = sum(count for _, count in levels)
        mean = math.fsum(level * count for level, count in levels) / total
        variance = math.fsum((level - mean) ** 2 * count for level, count in levels) / total
        means.append(mean)
        stds.append(math.sqrt(variance) if len(levels) > 1 else 1.0)
    return Normalization(tuple(means), tuple(stds))


def stored_normalization(preprocessing: Any, channels: int) -> Normalization | None:
    """Return the normalization in a file's `preprocessing`, if any: `mean` and `std`, each a number or one per channel.

    Raises:
        InputError: only one of `mean` and `std` is given, or the values have the wrong type, number or range.
    """
    if not isinstance(preprocessing, Mapping) or not {"mean", "std"} & preprocessing.keys():
        return None
    entries = {name: _per_channel(name, preprocessing.get(name), channels) for name in ("mean", "std")}
    if not all(0 <= mean <= 1 for mean in entries["mean"]):
        raise InputError(
            f"the file's preprocessing has mean={preprocessing['mean']!r}, which is not a mean of pixels in [0, 1]; "
            "export it again with mean and std divided by 255, or prepare the images yourself in Python"
        )
    return Normalization(**entries)


def _per_channel(name: str, value: Any, channels: int) -> tuple[float, ...]:
    values = value if isinstance(value, list) else [value] * channels
    if len(values) != channels or any(type(v) not in (int, float) for v in values):
        raise InputError(
            f"the file's preprocessing has {name}={value!r}, but for {channels} channels it needs one number, or "
            "one per channel, for pixels in [0, 1]; export it again, or prepare the images yourself in Python"
        )
    return tuple(map(float, values))
