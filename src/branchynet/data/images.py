"""Read, resize and write single image files."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..errors import DataError, InputError
from ..files import check_path, replacing

MOST_PIXELS = 89_478_485  # Pillow's limit for decompression bombs: 256 MB in RGB
SAFE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # of content from a network


def read_image(path: str | os.PathLike[str] | bytes, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Read an image file as a batch of one: `(1, C, H, W)` float32 in [0, 1], as from `loader`.

    The image is rotated by its EXIF orientation, converted to gray (C = 1) or RGB (C = 3) without transparency, and
    resized to H x W with an antialiased bilinear filter; it is not cropped.

    Args:
        path: any file that Pillow can read; or the content of a file in one of `SAFE_FORMATS`.
        shape: `(C, H, W)`, as in `ImageData.shape`.

    Raises:
        DataError: the file is missing or cannot be decoded.
        InputError: the shape does not have 1 or 3 channels.
    """
    channels, height, width = shape
    if channels not in (1, 3) or min(height, width) < 1:
        raise InputError(f"shape must be (1, H, W) or (3, H, W); got {tuple(shape)}")
    return np.divide(decode(path, (height, width), channels)[None], 255, dtype=np.float32)


def images_in(folder: Path) -> list[Path]:
    """List the image files in a folder and its subfolders by name, without hidden ones. Raises `DataError` if empty."""
    known = readable_extensions()
    found = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in known and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not found:
        raise DataError(f"{folder} holds no image file; give image files, or a folder of images")
    return found


def readable_extensions() -> set[str]:
    """The extensions of image files that Pillow can read, in lower case."""
    return {extension for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def save_image(image: ArrayLike, path: str | os.PathLike[str]) -> None:
    """Write an image in the format of the path's extension.

    Args:
        image: `(C, H, W)` with 1 or 3 channels; floats in [0, 1], or uint8.
        path: such as ``image.png``.

    Raises:
        InputError: another shape, or an extension that Pillow cannot write.
        FileError: the file cannot be written.
    """
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[0] not in (1, 3) or 0 in array.shape:
        raise InputError(f"an image must have shape (1, H, W) or (3, H, W); got {array.shape}")
    check_path(path)
    suffix = Path(path).suffix.lower()
    if Image.registered_extensions().get(suffix) not in Image.SAVE:
        raise InputError(f"cannot write {path}: no image format ends in {suffix!r}; use .png or .jpg")
    if array.dtype != np.uint8:
        array = np.rint(np.clip(array.astype(np.float64), 0, 1) * 255).astype(np.uint8)
    with replacing(path) as temporary:
        Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0))).save(temporary)


def decode(
    path: str | os.PathLike[str] | bytes, size: tuple[int, int] | None = None, channels: int | None = None
) -> NDArray[np.uint8]:
    """Decode an image file, or its content, as `(C, H, W)` uint8, upright.

    By default, it keeps its size, and C = 1 if it is gray, else 3.

    Raises `DataError` if the file is missing, cannot be decoded, or has more than `MOST_PIXELS` pixels.
    """
    with _opened(path) as opened:
        image: Any = ImageOps.exif_transpose(opened)
        gray = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")
        if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        if image.mode == "P":  # converting a palette with transparency to RGB directly makes Pillow warn
            image = image.convert("RGBA")
        image = image.convert("L" if channels == 1 or (channels is None and gray) else "RGB")
    if size is not None and image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    pixels = np.array(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Read the upright size `(H, W)` of an image file from its header. Raises `DataError` as `decode` does."""
    with _opened(path) as opened:
        # A PNG file may hold its orientation after its pixels, and reading it would decode them all.
        turned = opened.format != "PNG" and opened.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (opened.width, opened.height) if turned else (opened.height, opened.width)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str] | bytes) -> Iterator[Image.Image]:
    """Open an image file of at most `MOST_PIXELS` pixels; any error within the block becomes a `DataError`."""
    source, formats = (io.BytesIO(path), SAFE_FORMATS) if isinstance(path, bytes) else (path, None)
    try:
        if not isinstance(path, bytes) and Path(path).exists() and not Path(path).is_file():
            raise ValueError("it is not a regular file")
        with Image.open(source, formats=formats) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise ValueError(f"{opened.width} x {opened.height} pixels are more than {MOST_PIXELS:,}")
            yield opened
    except FileNotFoundError as error:
        raise DataError(f"there is no image {path}; give the path of an image file") from error
    except Exception as error:  # Pillow's readers raise nearly anything on a malformed file
        if isinstance(path, bytes):
            readable = "it is none of " + ", ".join(SAFE_FORMATS)
            reason = readable if isinstance(error, UnidentifiedImageError) else f"{type(error).__name__}: {error}"
            raise DataError(f"cannot read the image ({reason}); send another") from error
        raise DataError(
            f"cannot read the image {path} ({type(error).__name__}: {error}); replace or remove it"
        ) from error
