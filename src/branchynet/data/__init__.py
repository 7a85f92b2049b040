"""Images to learn from: loading, batching and augmenting data sets, and reading single image files.

Shape letters: S samples of a split, B samples in a batch, C channels, H rows, W columns.
"""

from .datasets import ImageData, Split, load_data
from .images import images_in, read_image, save_image
from .loaders import Augment, ProgressiveLoader, affine, compose, flip_crop, loader, shift
from .normalization import Normalization

__all__ = [
    "Augment",
    "ImageData",
    "Normalization",
    "ProgressiveLoader",
    "Split",
    "affine",
    "compose",
    "flip_crop",
    "images_in",
    "load_data",
    "loader",
    "read_image",
    "save_image",
    "shift",
]
