"""Read ONNX files without a runtime."""

import os
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from .errors import FileError


def read_model(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Read the file with all its weights. Raise `FileError` if it is not an ONNX file or weights are missing."""
    model, folder = parse_model(path), Path(path).parent
    try:
        for tensor in filter(uses_external_data, _tensors(model.graph)):
            _check_length(ExternalDataInfo(tensor), folder)
        onnx.load_external_data_for_model(model, str(folder))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise FileError(
            f"weights that {path} keeps in another file cannot be read ({error}); put that file next to it"
        ) from error
    return model


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of the graph and of the graphs in its nodes."""
    yield from graph.initializer
    for attribute in (a for node in graph.node for a in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)


def _check_length(data: ExternalDataInfo, folder: Path) -> None:
    """Raise `ValueError` if the file is shorter than the tensor needs: not every version of onnx notices."""
    needed = (data.offset or 0) + (data.length or 0)
    size = (folder / data.location).stat().st_size
    if size < needed:
        raise ValueError(f"{data.location} has {size} bytes, and a tensor ends at byte {needed}")


def parse_model(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Read the file without its external weights. Raise `FileError` if it is not an ONNX file."""
    try:  # as protobuf, like ONNX Runtime: onnx chooses the format by the file name
        return onnx.load(path, format="protobuf", load_external_data=False)
    except (DecodeError, ValueError, OSError, RecursionError) as error:
        raise FileError(
            f"{path} is not an ONNX file ({error}); give one that export(...) or another exporter wrote"
        ) from error


def entries(model: onnx.ModelProto, path: str | os.PathLike[str]) -> dict[str, str]:
    """Return all metadata entries of a model as text. Raise `FileError` if they are not text."""
    try:
        return {entry.key: entry.value for entry in model.metadata_props}
    except UnicodeDecodeError as error:
        raise FileError(
            f"the metadata of {path} are not text ({error}); the file is damaged: export it again"
        ) from error
