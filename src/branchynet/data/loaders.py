"""Batches for training and recording, and random changes to them.

Everything random here is drawn from torch's global generator on the CPU, so that whoever seeds it (the trainer, every
epoch) gets the same batches again.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from ..arguments import check_seed
from ..errors import InputError
from .datasets import Split

Augment = Callable[[Tensor], Tensor]  # (B, C, H, W) float in [0, 1] -> the same shape


class _Images(Dataset[Any]):
    """A split that is indexed by whole batches: one gather instead of B small ones and a stack."""

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
    """Batches `(images, labels)` of a split: float32 `(B, C, H, W)`, as `Split.inputs` gives them, and int64 `(B,)`.

    The last batch may be smaller. Without `seed` all chance comes from torch's global generator.

    Args:
        split: the images.
        batch_size: B, at least 1.
        shuffle: whether every pass has a new order.
        augment: a random change of each batch, such as `shift`, `affine`, `flip_crop` or any function of its kind.
        seed: fixes the orders (not the augmentation), whatever the state of the global generator.

    Raises:
        InputError: a batch size below 1, or a seed outside 0..2^32 - 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1; got {batch_size}")
    generator = None if seed is None else torch.Generator().manual_seed(check_seed(seed))
    return DataLoader(_Images(split, augment), batch_size, shuffle=shuffle, collate_fn=_as_is, generator=generator)


def _as_is(batch: Any) -> Any:
    return batch


class ProgressiveLoader:
    """Batches whose images are small in the first epochs and grow: a cheap way to more epochs (arXiv:2104.00298, 4).

    `fit` tells it the epoch. Networks must take images of any size, as those do that end in global average pooling.

    Args:
        batches: a loader of `(images, target)`, images float `(B, C, H, W)`.
        sides: H and W of the images in epoch 1, 2 and so on; the last holds for all later ones.

    Raises:
        InputError: no sides, or one below 1.
    """

    def __init__(self, batches: DataLoader[Any], sides: Sequence[int]) -> None:
        if not sides or min(sides) < 1:
            raise InputError(f"sides must be one size of at least 1 an epoch; got {tuple(sides)}")
        self.batches, self.sides = batches, tuple(sides)
        self.batch_size, self.num_workers = batches.batch_size, batches.num_workers
        self.set_epoch(1)

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        """From now on give images of this epoch's size; epochs count from 1."""
        self.side = self.sides[min(epoch, len(self.sides)) - 1]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        size = (self.side, self.side)
        for images, target in self.batches:
            if images.shape[2:] != size:
                images = F.interpolate(images, size, mode="bilinear", antialias=True)
            yield images, target


def shift(pixels: int) -> Augment:
    """Move each image by up to `pixels` rows and columns, either way; what comes in at the edge is 0.

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
    """Crop each image at random from itself padded with 0, and mirror every other one: the usual change for CIFAR-10.

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
    """Turn, move and zoom each image about its centre by amounts of its own, bilinearly; what comes in is 0.

    Args:
        degrees: the most that an image is turned, either way.
        translate: the most that it is moved, as a share of its height and width, either way.
        scale: the most that it is enlarged or shrunk, as a share of its size; below 1.

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
        # affine_grid asks where each output pixel comes from, in units of half the width and half the height.
        rows = (cos, -sin * (height / width), 2 * translate * right, sin * (width / height), cos, 2 * translate * down)
        matrices = torch.stack(rows, dim=1).view(batch, 2, 3).to(images)
        grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    return apply


def compose(*augments: Augment) -> Augment:
    """One augmentation that applies the given ones in turn."""

    def apply(images: Tensor) -> Tensor:
        for augment in augments:
            images = augment(images)
        return images

    return apply
