"""Image data sets: loading, batching and augmentation, and reading and writing of single image files.

Shape letters: S samples of a split, B samples in a batch, C channels, H rows, W columns.
"""

from ..extras import first_used

# Imported on first use: reading one image does not need PyTorch. __init__.pyi has the types.
_MODULES = {
    "datasets": ("ImageData", "Split", "load_data"),
    "images": ("images_in", "read_image", "save_image"),
    "loaders": ("Augment", "ProgressiveLoader", "affine", "compose", "flip_crop", "loader", "shift"),
    "normalization": ("Normalization",),
}
__getattr__ = first_used(__name__, _MODULES)
__all__ = sorted(name for names in _MODULES.values() for name in names)  # pyright: ignore[reportUnsupportedDunderAll]
