"""An exported file read as a model, without a runtime."""

import os
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from ..errors import FileError
from .engine import read_metadata


def read_model(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """The file with all its weights. Raises `FileError` for no ONNX file, or where weights that it names are gone."""
    model = parse_model(path)
    try:
        onnx.load_external_data_for_model(model, str(Path(path).parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise FileError(
            f"weights that {path} keeps in another file cannot be read ({error}); put that file beside it"
        ) from error
    return model


def parse_model(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """The file without weights that it keeps elsewhere. Raises `FileError` for no ONNX file.

    It is read as what ONNX Runtime reads, whatever its name: by itself onnx would take ``.json`` for another format.
    """
    try:
        return onnx.load(path, format="protobuf", load_external_data=False)
    except (DecodeError, ValueError, OSError, RecursionError) as error:
        raise FileError(f"{path} is no ONNX file ({error}); give one that export(...) wrote") from error


def model_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file says of itself, read without a runtime. Raises `FileError`."""
    return read_metadata(entries(parse_model(path), path), path)


def entries(model: onnx.ModelProto, path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a model, not yet understood. Raises `FileError` where they are no text."""
    try:
        return {entry.key: entry.value for entry in model.metadata_props}
    except UnicodeDecodeError as error:
        raise FileError(
            f"the metadata of {path} are no text ({error}); the file is damaged: export it again"
        ) from error
