"""Whole data sets, each with one fixed split into training, validation and test images."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..errors import DataError, InputError, nearest, printable
from .archives import ARCHIVES, read_archive
from .images import decode

FOLDER = "folder:"  # the prefix of a folder of the user's own images
MOST_UNASKED = 1 << 20  # pixels that the first image may give all others; one photograph must not fill the memory
MOST_BYTES = 8 << 30  # of images in memory; more is nearly always a photograph's size taken for want of `size`


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their classes.

    Attributes:
        images: `(S, C, H, W)` uint8.
        labels: `(S,)` int64.

    Raises:
        InputError: another shape or dtype, no images, or not one label an image.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or not images.numel():
            raise InputError(f"images must be uint8 (S, C, H, W), not empty; got {images.dtype} {tuple(images.shape)}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise InputError(f"labels must be int64 ({len(images)},); got {labels.dtype} {tuple(labels.shape)}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def digest(self) -> str:
        """SHA-256 of images and labels, to tell whether two splits are the same."""
        parts = hashlib.sha256(f"{tuple(self.images.shape)}".encode())
        for values in (self.images, self.labels):
            parts.update(values.contiguous().numpy().data)
        return parts.hexdigest()


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set of images in three parts.

    Attributes:
        name: what `load_data` was asked for.
        classes: the names of the classes, in the order of the labels.
        train: what the network learns from.
        val: what thresholds are chosen on.
        test: what results are reported on.

    Raises:
        InputError: parts of different shapes, or a label without a class.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split

    def __post_init__(self) -> None:
        for part, split in (("train", self.train), ("val", self.val), ("test", self.test)):
            shape = tuple(split.images.shape[1:])
            if shape != self.shape:
                raise InputError(f"{part} images are {shape} but train images are {self.shape}: resize them")
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= len(self.classes):
                raise InputError(f"{part} labels lie in {low}..{high}, but there are {len(self.classes)} classes")

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of every image."""
        _, channels, height, width = self.train.images.shape
        return channels, height, width


def load_data(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    download: bool = True,
    size: tuple[int, int] | None = None,
) -> ImageData:
    """Load a data set by name, in its one split, which depends on no random state.

    ==================  ========================================================  ==============================
    name                images                                                    training / validation / test
    ==================  ========================================================  ==============================
    ``digits``          scikit-learn's 8 x 8 digits, enlarged to (1, 28, 28)      1,197 / 300 / 300
    ``mnist``           handwritten digits, (1, 28, 28)                           50,000 / 10,000 / 10,000
    ``fashion-mnist``   articles of clothing, (1, 28, 28)                         50,000 / 10,000 / 10,000
    ``cifar10``         small photographs, (3, 32, 32)                            45,000 / 5,000 / 10,000
    ``folder:PATH``     your own: one folder a class, images directly in it       about 70 / 15 / 15 %
    ==================  ========================================================  ==============================

    An image of a folder goes to one of the three by its content, and stays there when others are added or removed.

    Args:
        name: one of the names above.
        root: the folder where MNIST, Fashion-MNIST and CIFAR-10 files lie, as published or unpacked, in folders
            ``mnist``, ``fashion-mnist``, ``cifar-10-batches-bin``, or as torchvision arranges them; by default the one
            that the environment variable BRANCHYNET_DATA names.
        download: whether to download what is not there, once, into the user's cache folder.
        size: `(H, W)` that the images of a folder are resized to; by default the size of the first, which may then have
            `MOST_UNASKED` pixels at most.

    Raises:
        DataError: an unknown name, a data set that is missing or cannot be downloaded, or a malformed file.
        InputError: `size` for a data set that has its own.
    """
    if name.startswith(FOLDER):
        return _folder(name, size)
    if size is not None:
        raise InputError(f"size={size} is only for {FOLDER}PATH; {name!r} has a size of its own: leave it out")
    if name == "digits":
        return _digits()
    if name not in ARCHIVES:
        raise DataError(f"unknown data set {name!r}{nearest(name, ['digits', *ARCHIVES, FOLDER + 'PATH'])}")
    train, test = read_archive(name, root, download)
    archive = ARCHIVES[name]
    order = _order(len(train[1]))
    held_out = round(len(order) * archive.validation)
    if not 0 < held_out < len(order):
        raise DataError(f"{name}: {len(order)} training images are too few to hold some out for validation; get more")
    parts = (*train, order[:-held_out]), (*train, order[-held_out:]), (*test, np.arange(len(test[1])))
    return ImageData(name, archive.classes, *(_take(*part) for part in parts))


def _order(count: int) -> NDArray[np.int64]:
    # RandomState's stream is frozen for good (NEP 19), torch's may change with a release: a network trained under one
    # and tested under another must not meet its training images.
    return np.random.RandomState(0).permutation(count).astype(np.int64)


def _take(images: NDArray[np.uint8], labels: NDArray[np.integer], indices: NDArray[np.int64]) -> Split:
    return Split(torch.from_numpy(images[indices]), torch.from_numpy(labels[indices].astype(np.int64)))


def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    small = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    # Pillow's filters work in integers: the same bytes on every machine.
    images = np.stack([np.array(Image.fromarray(x).resize((28, 28), Image.Resampling.BICUBIC)) for x in small])[:, None]
    parts = np.split(_order(len(labels)), [1197, 1497])
    return ImageData("digits", tuple("0123456789"), *(_take(images, labels, part) for part in parts))


def _folder(name: str, size: tuple[int, int] | None) -> ImageData:
    base = Path(name.removeprefix(FOLDER)).expanduser()
    if name == FOLDER or not base.is_dir():
        raise DataError(f"{name!r} names no folder; give {FOLDER}PATH, with one folder of images for each class")
    folders = sorted(entry.name for entry in base.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    classes = [printable(name) for name in folders]
    if len(classes) < 2:
        raise DataError(f"{base} holds {len(classes)} folders {classes}; it must hold one for each class, two at least")
    files = [_image_files(base / each) for each in folders]
    height, width = decode(files[0][0]).shape[1:] if size is None else size
    if size is None and height * width > MOST_UNASKED:
        raise DataError(
            f"{files[0][0]}, the first image, is {height} x {width} pixels, and all others would be resized to that; "
            "give a size=(H, W), such as (224, 224), or remove it"
        )
    if height < 1 or width < 1:
        raise InputError(f"size must be (H, W), both at least 1; got {size}")
    count = sum(map(len, files))
    if count * 3 * height * width > MOST_BYTES:
        raise DataError(f"{base}: {count} images of {height} x {width} do not fit in memory; give a size=(H, W)")
    decoded = [decode(file, (height, width)) for group in files for file in group]
    channels = max(len(image) for image in decoded)  # one colour image makes them all RGB
    images = np.stack([np.broadcast_to(image, (channels, height, width)) for image in decoded])
    labels = np.repeat(np.arange(len(classes)), [len(group) for group in files])
    places = np.array([_place(file) for group in files for file in group])
    return ImageData(name, tuple(classes), *(_take(images, labels, part) for part in _parts(labels, places)))


def _image_files(folder: Path) -> list[Path]:
    known = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = sorted(
        (file for file in folder.iterdir() if file.suffix.lower() in known and not file.name.startswith(".")),
        key=lambda file: file.name,
    )
    if len(files) < 3:
        raise DataError(
            f"{folder} holds {len(files)} images directly in it; a class needs three at least, one each to train on, "
            "to choose on and to test on: add some, or remove the folder"
        )
    return files


def _place(file: Path) -> float:
    """Where a file falls between 0 and 1 by its content, wherever it lies and whatever lies beside it."""
    try:
        return int.from_bytes(hashlib.sha256(file.read_bytes()).digest()[:8], "big") / 2**64
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}; replace or remove it") from error


def _parts(labels: NDArray[np.integer], places: NDArray[np.floating]) -> Sequence[NDArray[np.int64]]:
    """Indices of training, validation and test images, mixed: whoever halves a part must not get half of the classes.

    An image goes where it falls, so that another one more or less moves none, and copies of one image stay together:
    what is tested on was never trained on. Of a class too small for that the lowest one is for testing, the next for
    validation and the highest for training.

    Args:
        labels: `(S,)` classes.
        places: `(S,)` between 0 and 1.
    """
    part = np.digitize(places, (0.15, 0.3))  # 0 is the test
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        mine = mine[np.argsort(places[mine], kind="stable")]
        for wanted, one in ((2, mine[-1]), (0, mine[0]), (1, mine[1])):
            if wanted not in part[mine]:
                part[one] = wanted
    order = np.argsort(places, kind="stable")
    return [order[part[order] == n] for n in (2, 1, 0)]
