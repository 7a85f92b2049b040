"""Batches for training and recording, and augmentation.

All random numbers come from torch's global generator on the CPU, which the trainer seeds in every epoch, so batches are
reproducible.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from ..argument_checks import check_seed
from ..errors import InputError
from .datasets import Split

Augment = Callable[[Tensor], Tensor]  # (B, C, H, W) float in [0, 1] -> the same shape


class _Images(Dataset[Any]):
    """A split that gathers a whole batch at once."""

    def __init__(self, split: Split, augment: Augment | None) -> None:
        self.split = split
        self.augment = augment

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices)
        return self.split.inputs(chosen, self.augment), self.split.labels[chosen]


def loader(
    split: Split,
    batch_size: int,
    *,
    shuffle: bool = False,
    augment: Augment | None = None,
    seed: int | None = None,
) -> DataLoader[Any]:
    """Return a loader of batches `(images, labels)`: `Split.inputs`, float32 `(B, C, H, W)`, and int64 `(B,)`.

    The last batch may be smaller.

    Args:
        split: the images.
        batch_size: B, at least 1.
        shuffle: whether every pass has a new order.
        augment: a random function of each batch, such as `shift`, `affine`, `flip_crop` or your own.
        seed: seed of the orders, but not of the augmentation. Default: torch's global generator.

    Raises:
        InputError: a batch size below 1, or a seed outside 0..2^32 - 1.

    Example:
        >>> images, labels = next(iter(loader(load_data("digits").val, 8)))
        >>> images.shape, labels.shape
        (torch.Size([8, 1, 28, 28]), torch.Size([8]))
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1; got {batch_size}")
    generator = None if seed is None else torch.Generator().manual_seed(check_seed(seed))
    return DataLoader(_Images(split, augment), batch_size, shuffle=shuffle, collate_fn=_as_is, generator=generator)


def _as_is(batch: Any) -> Any:
    return batch


class ProgressiveLoader:
    """Load small images in the first epochs and larger ones later, which makes the first epochs cheaper.

    `fit` sets the epoch. The network must accept images of any size, for example by global average pooling.

    Args:
        batches: a loader of `(images, target)`, images float `(B, C, H, W)`.
        sides: height and width of the images in epoch 1, 2 and so on; the last one applies to all later epochs.

    Raises:
        InputError: no sides, or one below 1.

    Source: Tan and Le 2021, section 4 (arXiv:2104.00298).
    """

    def __init__(self, batches: DataLoader[Any], sides: Sequence[int]) -> None:
        if not sides or min(sides) < 1:
            raise InputError(f"sides must hold at least one size, each at least 1; got {tuple(sides)}")
        self.batches, self.sides = batches, tuple(sides)
        self.batch_size, self.num_workers = batches.batch_size, batches.num_workers
        self.set_epoch(1)

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        """Use the image size of this epoch from now on; epochs count from 1."""
        self.side = self.sides[min(epoch, len(self.sides)) - 1]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        size = (self.side, self.side)
        for images, target in self.batches:
            if images.shape[2:] != size:
                images = F.interpolate(images, size, mode="bilinear", antialias=True)
            yield images, target


def shift(pixels: int) -> Augment:
    """Shift each image by up to `pixels` rows and columns in either direction, and fill with 0.

    Raises:
        InputError: a negative number of pixels.
    """
    if pixels < 0:
        raise InputError(f"pixels must be at least 0; got {pixels}")

    def apply(images: Tensor) -> Tensor:
        batch, _, height, width = images.shape
        windows = F.pad(images, (pixels,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2p+1, 2p+1, H, W)
        down, right = torch.randint(2 * pixels + 1, (2, batch)).to(images.device)
        return windows[torch.arange(batch, device=images.device), :, down, right]

    return apply


def flip_crop(padding: int = 4) -> Augment:
    """Pad each image with 0, crop it at random and mirror it with probability 1/2, as is usual for CIFAR-10.

    Raises:
        InputError: a negative padding.
    """
    crop = shift(padding)  # a random crop of a padded image is a random shift

    def apply(images: Tensor) -> Tensor:
        mirror = (torch.rand(len(images), 1, 1, 1) < 0.5).to(images.device)
        images = crop(images)
        return torch.where(mirror, images.flip(3), images)

    return apply


def affine(degrees: float = 10.0, translate: float = 0.1, scale: float = 0.1) -> Augment:
    """Rotate, shift and scale each image by random amounts with bilinear interpolation, and fill with 0.

    Args:
        degrees: largest rotation in either direction.
        translate: largest shift in either direction, as a share of height and width.
        scale: largest change of size, as a share of it; below 1.

    Raises:
        InputError: a negative amount, or a scale of 1 or more.
    """
    if degrees < 0 or translate < 0 or not 0 <= scale < 1:
        raise InputError(
            f"degrees and translate must be at least 0 and scale in [0, 1); got {degrees}, {translate} and {scale}"
        )

    def apply(images: Tensor) -> Tensor:
        batch, _, height, width = images.shape
        turn, zoom, right, down = torch.rand(4, batch) * 2 - 1
        angle, size = turn * math.radians(degrees), 1 + zoom * scale
        cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
        # affine_grid maps output to input positions, in units of half the width and half the height.
        rows = (cos, -sin * (height / width), 2 * translate * right, sin * (width / height), cos, 2 * translate * down)
        matrices = torch.stack(rows, dim=1).view(batch, 2, 3).to(images)
        grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    return apply


def compose(*augments: Augment) -> Augment:
    """Return an augmentation that applies the given ones in turn."""
    return lambda images: functools.reduce(lambda changed, augment: augment(changed), augments, images)
