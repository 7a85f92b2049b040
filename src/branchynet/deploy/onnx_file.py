"""Read the metadata of an exported file without a runtime."""

import os
from typing import Any

from ..onnx_files import entries, parse_model
from .engine import read_metadata


def model_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the metadata that `export` wrote. Raise `FileError`."""
    return read_metadata(entries(parse_model(path), path), path)
