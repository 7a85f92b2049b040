"""Galleries of images with their predictions, as parts of a report."""

import base64
import io
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from ..errors import InputError

MOST_PICTURES = 24  # images per gallery
LARGEST = 96  # pixels per side of a shown image


@dataclass(frozen=True, eq=False)
class Gallery:
    """Images with their predictions, such as those that leave first. A report shows the first 24.

    Attributes:
        title: the heading.
        images: `(B, H, W)` or `(B, H, W, 3)` uint8.
        label, predicted: `(B,)` indices of the true and the predicted classes.
        exit: `(B,)` the exit of each image, from 1.
        score: `(B,)` the score at that exit.
        names: names of the classes; if empty, their indices are shown.

    Raises:
        InputError: the images are not uint8 pictures, the lengths differ, or a class has no name.
    """

    title: str
    images: NDArray[np.uint8]
    label: ArrayLike
    predicted: ArrayLike
    exit: ArrayLike
    score: ArrayLike
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        images = np.asarray(self.images)
        if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)):
            raise InputError(f"images must be uint8 (B, H, W) or (B, H, W, 3); got {images.dtype} {images.shape}")
        for name in ("label", "predicted", "exit", "score"):
            if np.shape(getattr(self, name)) != images.shape[:1]:
                raise InputError(f"{name} has shape {np.shape(getattr(self, name))} for {len(images)} images")
        most = max([-1, *np.ravel(self.label), *np.ravel(self.predicted)])
        if self.names and most >= len(self.names):
            raise InputError(f"class {most} has no name; there are {len(self.names)} names")


def gallery_section(gallery: Gallery) -> str:
    """Return the images as HTML with prediction, exit and score; wrong predictions are marked."""
    items = []
    values = (np.asarray(v) for v in (gallery.images, gallery.label, gallery.predicted, gallery.exit, gallery.score))
    for image, label, predicted, place, score in zip(*(v[:MOST_PICTURES] for v in values), strict=True):
        right, given = (escape(gallery.names[i] if gallery.names else str(i)) for i in (label, predicted))
        verdict = given if label == predicted else f"<b>{given}</b>, true class {right}"
        items.append(
            f'<li{"" if label == predicted else " class=missed"}><img src="{_png(image)}" '
            f'alt="an image of {right}">{verdict}<br><span class="quiet">exit {place}<br>{score:.3g}</span></li>'
        )
    return (
        f"<section>\n<h2>{escape(gallery.title)}</h2>\n<p class=quiet>The predicted class (and the true class if it "
        f'differs), the exit, and its score.</p>\n<ul class="pictures">{"".join(items)}</ul>\n</section>'
    )


def _png(image: NDArray[np.uint8]) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((LARGEST, LARGEST))
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
