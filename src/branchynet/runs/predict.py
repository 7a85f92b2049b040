"""Predictions for image files."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.images import images_in, read_image
from ..data.normalization import stored_normalization
from ..deploy.engine import Engine
from ..deploy.staged_files import MANIFEST
from ..errors import DataError, FileError, InputError

BATCH = 64


def predict_files(engine: Engine, images: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Predict the labels of image files, with the preprocessing of the training images.

    Yields ``{"image", "label", "exit", "score"}`` for each file, in order; ``{"image", "error"}`` if the file is
    missing or not an image. Raises `InputError` if the network does not read one image of fixed size, or the file's
    `mean` and `std` are not numbers.
    """
    shape = engine.inputs[0].shape
    if len(engine.inputs) != 1 or len(shape) != 3 or None in shape:
        raise InputError(f"this network reads {'; '.join(map(str, engine.inputs))}, not one image; call it from Python")
    size = (int(shape[0] or 0), int(shape[1] or 0), int(shape[2] or 0))
    normalization = stored_normalization(engine.metadata.get("preprocessing"), size[0])
    for start in range(0, len(images), BATCH):
        found: list[dict[str, Any]] = [{"image": str(file)} for file in images[start : start + BATCH]]
        rows, good = [], []
        for one in found:
            try:
                rows.append(read_image(one["image"], size))
                good.append(one)
            except DataError as error:
                one["error"] = str(error)
        if rows:
            batch = np.concatenate(rows)
            answer = engine.answer_all(batch if normalization is None else normalization(batch))
            for one, label, exit, score in zip(good, answer.label, answer.exit, answer.score, strict=True):
                name = engine.labels[label] if label < len(engine.labels) else str(label)
                one |= {"label": name, "exit": int(exit), "score": float(score)}
        yield from found


def model_file(path: Path) -> Path:
    """The exported file or folder itself, or ``model.onnx`` of a run folder.

    Raises `FileError` if it is missing or out of date.
    """
    if not path.is_dir() or (path / MANIFEST).exists():
        return path
    if not (path / "model.onnx").is_file():
        raise FileError(f"{path} has no model.onnx yet; run `branchynet export {path}` first")
    from ..deploy.onnx_file import model_metadata
    from .provenance import check_model

    check_model(path, model_metadata(path / "model.onnx"))
    return path / "model.onnx"


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files, and for each folder all image files in it and its subfolders, sorted by name, without duplicates.

    Raises `DataError` for a folder without images.
    """
    found = [file for path in paths for file in (images_in(path) if path.is_dir() else [path])]
    return list({file.absolute(): file for file in found}.values())
