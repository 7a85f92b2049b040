"""Images to learn from: loading, batching and augmenting data sets, and reading single image files.

Shape letters: S samples of a split, B samples in a batch, C channels, H rows, W columns.
"""

from .batches import Augment, Growing, affine, compose, flip_crop, loader, shift
from .images import images_in, read_image, save_image
from .normalization import Normalization
from .sets import ImageData, Split, load_data

__all__ = [
    "Augment",
    "Growing",
    "ImageData",
    "Normalization",
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
