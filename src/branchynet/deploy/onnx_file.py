"""Read an exported file without a runtime."""

import os
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from ..errors import FileError
from .engine import read_metadata


def read_model(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Read the file with all its weights. Raise `FileError` if it is not an ONNX file or weights are missing."""
    model = parse_model(path)
    try:
        onnx.load_external_data_for_model(model, str(Path(path).parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise FileError(
            f"weights that {path} keeps in another file cannot be read ({error}); put that file next to it"
        ) from error
    return model


def parse_model(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Read the file without its external weights. Raise `FileError` if it is not an ONNX file."""
    try:  # as protobuf, like ONNX Runtime: onnx chooses the format by the file name
        return onnx.load(path, format="protobuf", load_external_data=False)
    except (DecodeError, ValueError, OSError, RecursionError) as error:
        raise FileError(f"{path} is not an ONNX file ({error}); give one that export(...) wrote") from error


def model_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the metadata that `export` wrote. Raise `FileError`."""
    return read_metadata(entries(parse_model(path), path), path)


def entries(model: onnx.ModelProto, path: str | os.PathLike[str]) -> dict[str, str]:
    """Return all metadata entries of a model as text. Raise `FileError` if they are not text."""
    try:
        return {entry.key: entry.value for entry in model.metadata_props}
    except UnicodeDecodeError as error:
        raise FileError(
            f"the metadata of {path} are not text ({error}); the file is damaged: export it again"
        ) from error
