"""Data sets with one fixed split into training, validation and test images."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..errors import DataError, InputError, nearest, printable
from .archives import ARCHIVES, read_archive
from .folders import PARTS, read_folder
from .normalization import Normalization, normalization_of

FOLDER = "folder:"  # the prefix of a folder of the user's own images
MOST_CLASSES = 20  # more classes than this are not listed in a summary


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels of one part of a data set.

    Attributes:
        images: `(S, C, H, W)` uint8.
        labels: `(S,)` int64.
        normalization: normalization of `inputs`; None to keep them in [0, 1].

    Raises:
        InputError: wrong shape or dtype, no images, not one label per image, or a normalization for another number of
            channels.
    """

    images: Tensor
    labels: Tensor
    normalization: Normalization | None = None

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or not images.numel():
            raise InputError(f"images must be uint8 (S, C, H, W), not empty; got {images.dtype} {tuple(images.shape)}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise InputError(f"labels must be int64 ({len(images)},); got {labels.dtype} {tuple(labels.shape)}")
        if self.normalization is not None and len(self.normalization.mean) != images.shape[1]:
            raise InputError(f"the normalization {self.normalization} is not for images of {images.shape[1]} channels")

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, rows: Any = slice(None), augment: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return images as network inputs: `(B, C, H, W)` float32, in [0, 1] or normalized.

        Args:
            rows: a slice or a tensor of indices; default: all images.
            augment: a function of the images in [0, 1], applied before normalization.
        """
        images = self.images[rows].float().div_(255)
        images = augment(images) if augment else images
        return images if self.normalization is None else torch.from_numpy(self.normalization(images.numpy()))

    @property
    def digest(self) -> str:
        """SHA-256 of images and labels."""
        parts = hashlib.sha256(f"{tuple(self.images.shape)}".encode())
        for values in (self.images, self.labels):
            parts.update(values.contiguous().numpy().data)
        return parts.hexdigest()


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set of images in three parts.

    Attributes:
        name: the name given to `load_data`.
        classes: names of the classes, in the order of the labels.
        train: images to train the network.
        val: images to choose thresholds.
        test: images to report results.
        notes: remarks on how the images were read, such as their size; printed with the data.

    Raises:
        InputError: the parts have different shapes, or a label has no class.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part, split in zip(PARTS, self.splits, strict=True):
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

    @property
    def splits(self) -> tuple[Split, Split, Split]:
        """The three parts."""
        return self.train, self.val, self.test

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of training, validation and test images per class: `(3, C)`."""
        return np.stack([np.bincount(part.labels.numpy(), minlength=len(self.classes)) for part in self.splits])

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How an image file becomes an input; stored in exported files and applied by ``branchynet predict``."""
        how = {"shape": list(self.shape), "scale": "pixels / 255", "resize": "bilinear"}
        normalization = self.train.normalization
        return how if normalization is None else how | {"mean": normalization.mean, "std": normalization.std}

    def __str__(self) -> str:
        """The shape of the images, their number per class, and the notes."""
        counts = self.counts
        lines = [
            f"{printable(self.name)}: {counts.sum():,} images of {' x '.join(map(str, self.shape))} (channels x height "
            f"x width), {len(self.classes)} classes"
        ]
        rows = [("class", *PARTS)]
        if len(self.classes) <= MOST_CLASSES:
            rows += [(name, *map(str, column)) for name, column in zip(self.classes, counts.T, strict=True)]
        else:
            extremes = {"fewest": counts.min(axis=1), "most": counts.max(axis=1)}
            rows += [(f"{word} per class", *map(str, column)) for word, column in extremes.items()]
        rows.append(("all", *map(str, counts.sum(axis=1))))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for name, *numbers in rows:
            lines.append("  ".join([name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])]))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def load_data(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    download: bool = True,
    size: tuple[int, int] | None = None,
    split: Sequence[float] | None = None,
    normalize: bool = False,
) -> ImageData:
    """Load a data set by name. Its split is fixed and does not depend on any random state.

    ==================  ========================================================  ==============================
    name                images                                                    training / validation / test
    ==================  ========================================================  ==============================
    ``digits``          shipped: 8 x 8 digits, enlarged to (1, 28, 28)            1,197 / 300 / 300
    ``mnist``           handwritten digits, (1, 28, 28)                           50,000 / 10,000 / 10,000
    ``fashion-mnist``   articles of clothing, (1, 28, 28)                         50,000 / 10,000 / 10,000
    ``cifar10``         small photographs, (3, 32, 32)                            45,000 / 5,000 / 10,000
    ``folder:PATH``     your images: one folder per class, images directly in it  about 70 / 15 / 15%
    ==================  ========================================================  ==============================

    The content of an image of a folder determines its part, so adding or removing other images does not move it. A
    folder may instead hold folders ``train``, ``val`` and ``test`` (or ``valid``, ``validation``), each with one folder
    per class; a missing part is split off the training images. ``print(load_data(...))`` shows the number of images per
    class.

    Args:
        name: one of the names above.
        root: folder of the MNIST, Fashion-MNIST and CIFAR-10 files, as published or unpacked, in subfolders ``mnist``,
            ``fashion-mnist``, ``cifar-10-batches-bin``, or arranged as by torchvision. Default: the environment
            variable BRANCHYNET_DATA.
        download: whether to download missing files to the user's cache folder.
        size: `(H, W)` that the images of a folder are resized to. Default: the median height and the median width,
            of at most 2**20 pixels.
        split: proportions of training, validation and test images of a folder. Default: ``(70, 15, 15)``.
        normalize: whether to normalize all parts with the mean and standard deviation per channel of the training
            images (see `Normalization`).

    Raises:
        DataError: an unknown name, a data set that is missing or cannot be downloaded, or a malformed file.
        InputError: `size` or `split` is invalid, or is given for a data set other than a folder.

    Example:
        >>> data = load_data("digits")
        >>> data.shape, len(data.train), len(data.val), len(data.test)
        ((1, 28, 28), 1197, 300, 300)
    """
    data = _loaded(name, root, download, size, split)
    if not normalize:
        return data
    normalization = normalization_of(data.train.images.numpy())
    parts = (replace(split, normalization=normalization) for split in data.splits)
    return replace(data, **dict(zip(PARTS, parts, strict=True)))


def _loaded(
    name: str,
    root: str | os.PathLike[str] | None,
    download: bool,
    size: tuple[int, int] | None,
    split: Sequence[float] | None,
) -> ImageData:
    if name.startswith(FOLDER):
        read = read_folder(folder_path(name), size, split)
        return _parted(name, read.classes, [(read.images, read.labels, rows) for rows in read.parts], read.notes)
    for option, value in (("size", size), ("split", split)):
        if value is not None:
            shown = "x".join(map(str, value)) if option == "size" else "/".join(map(str, value))
            raise InputError(f"{option}={shown} is only for {FOLDER}PATH; {name!r} has a fixed {option}: leave it out")
    if name == "digits":
        return _digits()
    if name not in ARCHIVES:
        raise DataError(f"unknown data set {name!r}{nearest(name, ['digits', *ARCHIVES, FOLDER + 'PATH'])}")
    train, test = read_archive(name, root, download)
    order = _order(len(train[1]))
    held_out = round(len(order) * ARCHIVES[name].validation)
    if not 0 < held_out < len(order):
        raise DataError(f"{name}: {len(order)} training images are too few to hold some out for validation; get more")
    parts = (*train, order[:-held_out]), (*train, order[-held_out:]), (*test, np.arange(len(test[1])))
    return _parted(name, ARCHIVES[name].classes, parts)


def _order(count: int) -> NDArray[np.int64]:
    # RandomState's stream never changes (NEP 19); torch's may change between releases, and a network tested under
    # another release must not be tested on its training images.
    return np.random.RandomState(0).permutation(count).astype(np.int64)


def _parted(name: str, classes: tuple[str, ...], parts: Iterable[Sequence[Any]], notes: Any = ()) -> ImageData:
    """Return a data set; `parts` holds images `(S, C, H, W)`, labels `(S,)` and the rows to take, for each part."""
    train, val, test = (
        Split(torch.from_numpy(images[rows]), torch.from_numpy(labels[rows].astype(np.int64)))
        for images, labels, rows in parts
    )
    return ImageData(name, classes, train, val, test, notes)


def _digits() -> ImageData:
    """The test images of Alpaydin and Kaynak (1998), as in scikit-learn; doi:10.24432/C50P49, licensed CC BY 4.0."""
    with np.load(Path(__file__).with_name("digits.npz")) as stored:
        pixels, labels = stored["pixels"], stored["labels"]
    small = np.rint(pixels * (255 / 16)).astype(np.uint8)
    # Pillow's filters work in integers: the same bytes on every machine.
    images = np.stack([np.array(Image.fromarray(x).resize((28, 28), Image.Resampling.BICUBIC)) for x in small])[:, None]
    parts = np.split(_order(len(labels)), [1197, 1497])
    return _parted("digits", tuple("0123456789"), [(images, labels, rows) for rows in parts])


def folder_path(name: str) -> Path:
    """The absolute path in ``folder:PATH``. Raises `DataError` if it is not a folder."""
    try:
        base = Path(name.removeprefix(FOLDER)).expanduser().resolve()
        if name != FOLDER and base.is_dir():
            return base
    except (OSError, ValueError, RuntimeError):  # null character, circular links, home folder of an unknown user
        pass
    raise DataError(f"{name!r} does not name a folder; give {FOLDER}PATH, with one folder of images per class")
