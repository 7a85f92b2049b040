"""Single image files: decoding, resizing, writing."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import ExifTags, Image, ImageOps

from ..errors import DataError, InputError
from ..files import replacing

MOST_PIXELS = 89_478_485  # where Pillow warns of a decompression bomb: 256 MB in RGB


def read_image(path: str | os.PathLike[str], shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """An image file as a batch of one, as `loader` gives them: `(1, C, H, W)` float32 in [0, 1].

    Turned upright by its EXIF orientation, made grey where C is 1 and RGB where C is 3 (transparency is dropped), and
    resized to H x W, not cropped, with an antialiased bilinear filter.

    Args:
        path: any file that Pillow can read.
        shape: `(C, H, W)`, as in `ImageData.shape`.

    Raises:
        DataError: a file that is missing or cannot be decoded.
        InputError: a shape with other than 1 or 3 channels.
    """
    channels, height, width = shape
    if channels not in (1, 3) or min(height, width) < 1:
        raise InputError(f"shape must be (1, H, W) or (3, H, W); got {tuple(shape)}")
    return np.divide(decode(path, (height, width), channels)[None], 255, dtype=np.float32)


def images_in(folder: Path) -> list[Path]:
    """The image files in a folder and below, by name, hidden ones left out. Raises `DataError` where there is none."""
    known = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in known and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not found:
        raise DataError(f"{folder} holds no image file; give image files, or a folder of them")
    return found


def save_image(image: ArrayLike, path: str | os.PathLike[str]) -> None:
    """Write an image `(C, H, W)`, floats in [0, 1] or uint8, C 1 or 3, in the format that the path's ending names.

    Raises:
        InputError: another shape, or an ending that Pillow cannot write.
        FileError: the file cannot be written.
    """
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[0] not in (1, 3) or 0 in array.shape:
        raise InputError(f"an image must have shape (1, H, W) or (3, H, W); got {array.shape}")
    suffix = Path(path).suffix.lower()
    if Image.registered_extensions().get(suffix) not in Image.SAVE:
        raise InputError(f"cannot write {path}: no image format ends in {suffix!r}; use .png or .jpg")
    if array.dtype != np.uint8:
        array = np.rint(np.clip(array.astype(np.float64), 0, 1) * 255).astype(np.uint8)
    with replacing(path) as temporary:
        Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0))).save(temporary)


def decode(
    path: str | os.PathLike[str], size: tuple[int, int] | None = None, channels: int | None = None
) -> NDArray[np.uint8]:
    """An image file as `(C, H, W)` uint8, upright; by default at its own size, C 1 if the file is grey, else 3.

    Raises:
        DataError: a file that is missing, cannot be decoded, or holds more than `MOST_PIXELS` pixels.
    """
    with _opened(path) as opened:
        image: Any = ImageOps.exif_transpose(opened)
        grey = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")
        if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut off at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        if image.mode == "P":  # straight to RGB, a palette with transparency makes Pillow warn
            image = image.convert("RGBA")
        image = image.convert("L" if channels == 1 or (channels is None and grey) else "RGB")
    if size is not None and image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    pixels = np.array(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """`(H, W)` of an image file, upright, as its header has it. Raises `DataError` as `decode` does."""
    with _opened(path) as opened:
        # A PNG file may hold its orientation behind its pixels, which would all be decoded for it.
        turned = opened.format != "PNG" and opened.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (opened.width, opened.height) if turned else (opened.height, opened.width)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """An image file of at most `MOST_PIXELS` pixels; what fails on it within the block is a `DataError`."""
    if Path(path).exists() and not Path(path).is_file():
        raise DataError(f"cannot read the image {os.fspath(path)}: it is no regular file; replace or remove it")
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise ValueError(f"{opened.width} x {opened.height} pixels are more than {MOST_PIXELS:,}")
            yield opened
    except Exception as error:  # Pillow's readers raise nearly anything on a malformed file
        if isinstance(error, FileNotFoundError):
            raise DataError(f"there is no image {os.fspath(path)}; give the path of an image file") from error
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"cannot read the image {os.fspath(path)} ({reason}); replace or remove it") from error
