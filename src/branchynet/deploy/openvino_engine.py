"""Open an exported file in OpenVINO, on the CPU."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ..errors import FileError
from ..onnx_files import entries, parse_model, read_model
from .checksum import check_weights
from .engine import Feeds, Graph, read_metadata
from .input_checks import Input, run_error


def open_in_openvino(path: str | os.PathLike[str], threads: int | None) -> Graph:
    """Open a file that `export` wrote, for `branchynet.load`. Raise `FileError`."""
    import openvino

    model = parse_model(path)
    metadata = read_metadata(entries(model, path), path)
    check_weights(path, metadata)
    if metadata.get("weights") is None:
        model = read_model(path)
    # OpenVINO turns an input with a default value into a constant, so remove the default; the engine feeds it.
    weights = [t for t in model.graph.initializer if t.name not in {i.name for i in model.graph.input}]
    del model.graph.initializer[:]
    model.graph.initializer.extend(weights)
    options: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # bfloat16, its other choice, moves scores across thresholds
    }
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = int(threads)
    try:
        core = openvino.Core()
        with _readable(model, path, metadata) as readable:
            graph = core.read_model(readable)
            _fix_shapes_of_biases(graph)
            compiled = core.compile_model(graph, "CPU", options)
        inputs = tuple(_input(i) for i in model.graph.input)
    except Exception as error:  # a damaged file raises other errors too, such as UnicodeDecodeError
        version = openvino.__version__.split("-")[0]
        raise FileError(
            f"OpenVINO {version} cannot run {path} ({_brief(error)}); load it with runtime='onnxruntime'"
        ) from error
    return Graph(
        _Requests(compiled, inputs, metadata),
        inputs,
        frozenset(i.name for i in inputs),
        len(compiled.outputs),
        metadata,
    )


@contextlib.contextmanager
def _readable(
    model: onnx.ModelProto, path: str | os.PathLike[str], metadata: Mapping[str, Any]
) -> Iterator[bytes | Path]:
    """Yield what OpenVINO reads: a changed model with all its weights or, beyond 2 GB, one beside their file.

    OpenVINO refuses symbolic links to other folders.
    """
    if (weights := metadata.get("weights")) is None:
        yield model.SerializeToString()
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        source, place = Path(path).parent / weights["file"], Path(folder) / weights["file"]
        try:
            place.hardlink_to(source)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, place)
        onnx.save(model, Path(folder) / "model.onnx")
        yield Path(folder) / "model.onnx"


def _fix_shapes_of_biases(model: Any) -> None:
    """Reshape biases by constants instead of shapes that OpenVINO computes from the convolution's output.

    A computed shape is a second consumer of the convolution's output. OpenVINO then fuses the bias with the following
    FakeQuantize instead, and the result adds the bias of the first channel to all channels.
    """
    from openvino import opset13

    for node in model.get_ops():
        if node.get_type_name() == "If":
            for n in range(2):
                _fix_shapes_of_biases(node.get_function(n))
        if node.get_type_name() == "Reshape" and node.output(0).get_partial_shape().is_static:
            shape = opset13.constant(list(node.output(0).get_shape()), np.int64)
            node.input(1).replace_source_output(shape.output(0))


class _Requests:
    """Run a compiled model, with one request per concurrent call."""

    def __init__(self, compiled: Any, inputs: Sequence[Input], metadata: Mapping[str, Any]) -> None:
        self.compiled, self.metadata = compiled, metadata
        kept = {name for port in compiled.inputs for name in port.get_names()}
        self.names = [i.name for i in inputs if i.name in kept]  # OpenVINO drops unused inputs
        self.free: list[Any] = []

    def __call__(self, feeds: Feeds) -> Sequence[NDArray[Any]]:
        try:
            request = self.free.pop()
        except IndexError:
            request = self.compiled.create_infer_request()
        try:
            # Not shared: with casts of an input, OpenVINO later reads the memory of an earlier call's array.
            return request.infer({name: feeds[name] for name in self.names}, share_inputs=False).to_tuple()
        except Exception as error:
            raise run_error("OpenVINO", feeds, self.metadata, error) from error
        finally:
            self.free.append(request)


def _brief(error: Exception) -> str:
    """Return the summary of one of OpenVINO's long error messages."""
    text = str(error)
    return " ".join(text[max(0, text.find("Summary:")) :].split())[:300]


def _input(value: onnx.ValueInfoProto) -> Input:
    kind = value.type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
    return Input(value.name, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).type, tuple(dims[1:]))
