"""Compare the thresholds in a file's graph with the policy in its metadata."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from ..errors import FileError
from ..policy.values import Policy


def moved_thresholds(policy: Policy | None, model: onnx.ModelProto, path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return one message per threshold in the graph (a default value or a constant) that differs from the policy."""
    held = dict(_constants(model.graph, str(Path(path).parent), path))
    problems = []
    for n, threshold in enumerate(policy.thresholds if policy else (), 1):
        if (value := held.get(f"threshold_{n}")) is None:
            continue
        if threshold is None:
            problems.append(f"the file has a threshold at exit {n}, its metadata say never")
            continue
        with np.errstate(over="ignore"):  # values beyond float32 are infinite in the file
            want = np.float32(threshold).astype(value.dtype)
        if value.size != 1 or value.item() != want:
            text = f"{value.item():.6g}" if value.size == 1 else f"{value.size} values"
            problems.append(f"the file's threshold at exit {n} is {text}, its metadata say {threshold:.6g}")
    return tuple(problems)


def _constants(
    graph: onnx.GraphProto, folder: str, path: str | os.PathLike[str]
) -> Iterator[tuple[str, NDArray[np.generic]]]:
    """Yield every initializer and constant with a threshold's name, at any level."""
    tensors = [(tensor.name, tensor) for tensor in graph.initializer]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _constants(attribute.g, folder, path)
            elif node.op_type == "Constant" and attribute.name == "value":
                tensors.append((node.output[0], attribute.t))
    for name, tensor in tensors:
        if name.startswith("threshold_"):
            try:
                yield name, numpy_helper.to_array(tensor, folder)
            except (ValueError, TypeError, OSError, onnx.checker.ValidationError) as error:
                raise FileError(f"{name} in {path} cannot be read ({error}); export it again") from error
