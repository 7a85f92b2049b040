"""Folders of the user's images: classes, sizes, and the split into training, validation and test images."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, InputError, counted, printable
from .images import decode, image_size, readable_extensions

MOST_UNASKED = 1 << 20  # limit of pixels per image if no size is given; photographs must not fill the memory
MOST_BYTES = 8 << 30  # limit of all images in memory
SPLIT = (70.0, 15.0, 15.0)
FEW = 10  # results for a class with fewer images are mostly chance
PARTS = ("train", "val", "test")
_PART_NAMES = {
    **dict.fromkeys(("train", "training"), 0),
    **dict.fromkeys(("val", "valid", "validation"), 1),
    **dict.fromkeys(("test", "testing"), 2),
}


@dataclass(frozen=True, eq=False)
class Folder:
    """The content of a folder of images: `parts` holds the rows of the training, validation and test images."""

    classes: tuple[str, ...]
    images: NDArray[np.uint8]  # (S, C, H, W)
    labels: NDArray[np.int64]  # (S,)
    parts: tuple[NDArray[np.int64], ...]
    notes: tuple[str, ...]


def read_folder(base: Path, size: tuple[int, int] | None, split: Sequence[float] | None) -> Folder:
    """Read a folder of images. Arguments and errors are those of `load_data`."""
    integers = isinstance(size, (tuple, list)) and len(size) == 2 and all(type(s) is int and s >= 1 for s in size)
    if size is not None and not integers:
        raise InputError(f"size must be (H, W), two integers of at least 1; got {size!r}")
    shares = _shares(split)
    roots = _roots(base)
    if roots.keys() == {0, 1, 2} and split is not None:
        raise InputError(
            f"split={'/'.join(f'{s:g}' for s in shares)} cannot be used with {base}, which has folders for all three "
            "parts: leave it out"
        )
    drawn = {0, 1, 2} - (roots.keys() - {0})  # the parts of the images in the first folder
    names, listed = _listed(roots, len(drawn))
    files = [file for group, _, _ in listed for file in group]
    rows = [(label, part) for group, label, part in listed for _ in group]
    labels, given = np.array(rows, np.int64).reshape(-1, 2).T.copy()
    notes, (height, width) = _size(base, files, size)
    if len(files) * 3 * height * width > MOST_BYTES:
        raise DataError(
            f"{base}: {len(files)} images of {height} x {width} do not fit in memory; give a smaller size (in Python, "
            "size=(H, W))"
        )
    decoded = [decode(file, (height, width)) for file in files]
    channels = max(len(image) for image in decoded)  # if one image has colors, all become RGB
    images = np.stack([np.broadcast_to(image, (channels, height, width)) for image in decoded])
    places = np.array([_place(file) for file in files])
    first = given == 0
    given[first] = split_by_place(labels[first], places[first], [shares[n] * (n in drawn) for n in range(3)])
    order = np.argsort(places, kind="stable")  # random, so that half of a part holds all classes
    parts = tuple(order[given[order] == n] for n in range(3))
    for name, part in zip(PARTS, parts, strict=True):
        if not len(part):
            raise DataError(f"{base} holds no {name} images; add some, or remove its empty folder")
    if len(roots) > 1 and len(drawn) > 1:
        notes.append(f"{' and '.join(PARTS[n] for n in sorted(drawn - {0}))} images are split off the training images")
    classes = tuple(map(printable, names))
    return Folder(classes, images, labels, parts, (*notes, *_copies(places, parts), *_small(classes, labels, parts)))


def _shares(split: Sequence[float] | None) -> tuple[float, ...]:
    shares = SPLIT if split is None else tuple(split)
    numbers = all(type(share) in (int, float) and share > 0 for share in shares)
    if not (len(shares) == 3 and numbers and math.isfinite(sum(shares))):
        raise InputError(
            "split must be three numbers above 0, for training, validation and test, such as 70/15/15; got "
            f"{'/'.join(map(str, shares))}"
        )
    total = sum(shares)
    if total > 50 and not math.isclose(total, 100):  # 8/1/1 are proportions, but numbers this large are percentages
        raise InputError(
            f"split={'/'.join(f'{share:g}' for share in shares)} adds up to {total:g}%; give shares that add up to "
            "100, such as 70/15/15"
        )
    return shares


def _subfolders(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror or error}; change its permissions") from error


def _roots(base: Path) -> dict[int, Path]:
    """The folders of training (0), validation (1) and test (2) images; ``{0: base}`` if `base` holds the classes."""
    names = _subfolders(base)
    parts = [_PART_NAMES.get(name.lower(), -1) for name in names]
    if 0 not in parts or -1 in parts or not all(_subfolders(base / name) for name in names):
        return {0: base}
    for part in parts:
        if parts.count(part) > 1:
            same = [name for name, p in zip(names, parts, strict=True) if p == part]
            raise DataError(f"{base} holds {' and '.join(same)}, which mean the same part: merge them")
    return dict(sorted((part, base / name) for part, name in zip(parts, names, strict=True)))


def _listed(roots: dict[int, Path], least: int) -> tuple[list[str], list[tuple[list[Path], int, int]]]:
    """Names of the classes; and for each class folder its image files, the index of its class, and its part."""
    names = _subfolders(roots[0])
    if len(names) < 2:
        shown = f"only one folder, {printable(names[0])!r}" if names else "no folders"
        raise DataError(f"{roots[0]} holds {shown}; it must hold one folder per class, at least two")
    listed = []
    for part, root in roots.items():
        for name in _subfolders(root):
            if name not in names:
                raise DataError(
                    f"{root / name} is a class without training images; add {roots[0] / name}, or remove it"
                )
            listed.append((_image_files(root / name, 0 if part else least), names.index(name), part))
    return names, listed


def _image_files(folder: Path, least: int) -> list[Path]:
    known = readable_extensions()
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in known and not f.name.startswith("."))
    if len(files) < least:
        parts = ", for training, validation and test" * (least == 3)
        raise DataError(
            f"{folder} holds {counted(len(files), 'image')} directly in it; a class needs at least {least}{parts}: add "
            "some, or remove the folder"
        )
    return files


def _size(base: Path, files: Sequence[Path], size: tuple[int, int] | None) -> tuple[list[str], tuple[int, int]]:
    """Notes on the size of the images, and the size: as given, or their median height and median width."""
    if size is not None:
        return [], size
    sizes = np.array([image_size(file) for file in files])
    # The lower median is a value that occurs, and equals the size of most images if most have the same.
    height, width = (int(np.sort(column)[(len(column) - 1) // 2]) for column in sizes.T)
    if height * width > MOST_UNASKED:
        raise DataError(
            f"the median size of the images in {base} is {height} x {width} pixels, too large to train on; give a "
            "size, such as 224 (in Python, size=(224, 224))"
        )
    other = int((sizes != (height, width)).any(axis=1).sum())
    if not other:
        return [], (height, width)
    (low, left), (high, right) = sizes.min(axis=0), sizes.max(axis=0)
    return [
        f"{other} of {len(files)} images are resized to {height} x {width} (height x width), the median of heights "
        f"{low} to {high} and widths {left} to {right}; give a size to change this"
    ], (height, width)


def _place(file: Path) -> float:
    """A number in [0, 1) that depends only on the content of a file."""
    try:
        return int.from_bytes(hashlib.sha256(file.read_bytes()).digest()[:8], "big") / 2**64
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}; replace or remove it") from error


def split_by_place(
    labels: NDArray[np.integer], places: NDArray[np.floating], shares: Sequence[float]
) -> NDArray[np.int64]:
    """Return the part of every image: 0 for training, 1 for validation, 2 for test.

    The place of an image determines its part. Adding or removing an image therefore moves no other one, and copies of
    an image are never in different parts. If a class has no image in a part, one is moved there: its lowest to test,
    the next to validation, its highest to training. A part with a share of 0 gets no images. Places are in [0, 1).
    """
    train, val, test = shares
    total = train + val + test
    part = 2 - np.digitize(places, (test / total, (test + val) / total)).astype(np.int64)
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        mine = mine[np.argsort(places[mine], kind="stable")]
        held_out = [wanted for wanted in (2, 1) if shares[wanted]]
        for wanted, one in zip((0, *held_out), (mine[-1], *mine), strict=False):
            if wanted not in part[mine]:
                part[one] = wanted
    return part


def _copies(places: NDArray[np.floating], parts: Sequence[NDArray[np.int64]]) -> list[str]:
    """Notes on validation and test images that are copies of training images."""
    notes = []
    for name, part in zip(PARTS[1:], parts[1:], strict=True):
        if same := int(np.isin(places[part], places[parts[0]]).sum()):
            notes.append(f"{same} of {len(part)} {name} images are copies of training images: results look too good")
    return notes


def _small(classes: Sequence[str], labels: NDArray[np.int64], parts: Sequence[NDArray[np.int64]]) -> list[str]:
    """Notes on classes with few images, or with none in a part."""
    notes = []
    counts = np.bincount(labels, minlength=len(classes))
    if few := [f"{classes[n]!r} ({counts[n]})" for n in np.flatnonzero(counts < FEW).tolist()]:
        notes.append(f"classes with fewer than {FEW} images, too few to learn or to evaluate: {_shown(few)}")
    for name, part in zip(PARTS, parts, strict=True):
        none = np.flatnonzero(np.bincount(labels[part], minlength=len(classes)) == 0).tolist()
        if none:
            notes.append(f"classes without {name} images: {_shown([repr(classes[n]) for n in none])}")
    return notes


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
