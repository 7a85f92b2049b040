"""The same file in OpenVINO, on the CPU."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ..errors import FileError
from .engine import Feeds, Graph, read_metadata
from .inputs import Input
from .onnx_file import entries, read_model


def open_in_openvino(path: str | os.PathLike[str], threads: int | None) -> Graph:
    """Open a file that `export` wrote; see `branchynet.load`, which calls this. Raises as it does."""
    import openvino

    model = read_model(path)
    metadata = read_metadata(entries(model, path), path)
    # OpenVINO takes an input with a default value for a constant: without the default it stays an input, which we feed.
    weights = [t for t in model.graph.initializer if t.name not in {i.name for i in model.graph.input}]
    del model.graph.initializer[:]
    model.graph.initializer.extend(weights)
    options: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # it may choose bfloat16, which moves scores across thresholds
    }
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = int(threads)
    try:
        core = openvino.Core()
        graph = core.read_model(model.SerializeToString())
        _fix_shapes_of_biases(graph)
        compiled = core.compile_model(graph, "CPU", options)
        inputs = tuple(_input(i) for i in model.graph.input)
    except Exception as error:  # on a damaged file other errors too, such as one of a message that is no UTF-8
        version = openvino.__version__.split("-")[0]
        raise FileError(
            f"OpenVINO {version} cannot run {path} ({_brief(error)}); load it with runtime='onnxruntime'"
        ) from error
    return Graph(
        _Requests(compiled, inputs), inputs, frozenset(i.name for i in inputs), len(compiled.outputs), metadata
    )


def _fix_shapes_of_biases(model: Any) -> None:
    """Reshape biases by constants, where OpenVINO's reader computes their shape from that of the convolution's output.

    Otherwise the convolution has a second reader wherever a shape is needed, so the bias is not fused with it but with
    the FakeQuantize behind, which then adds the first channel's bias to all channels.
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
    """Runs a compiled model; calls at the same time each take a request of their own."""

    def __init__(self, compiled: Any, inputs: Sequence[Input]) -> None:
        self.compiled = compiled
        kept = {name for port in compiled.inputs for name in port.get_names()}
        self.names = [i.name for i in inputs if i.name in kept]  # OpenVINO drops inputs that nothing reads
        self.free: list[Any] = []

    def __call__(self, feeds: Feeds) -> Sequence[NDArray[Any]]:
        try:
            request = self.free.pop()
        except IndexError:
            request = self.compiled.create_infer_request()
        try:
            # Copying the inputs takes several times as long as a small network; answers are copied.
            return request.infer({name: feeds[name] for name in self.names}, share_inputs=True).to_tuple()
        finally:
            self.free.append(request)


def _brief(error: Exception) -> str:
    """OpenVINO tells at length how it went; its summary says why it failed."""
    told = str(error)
    return " ".join(told[max(0, told.find("Summary:")) :].split())[:300]


def _input(value: onnx.ValueInfoProto) -> Input:
    kind = value.type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
    return Input(value.name, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).type, tuple(dims[1:]))
