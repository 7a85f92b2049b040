"""Quantize a flat graph to int8 before the cut, so that the values that cross the cut are int8 too.

An int8 value is a pair QuantizeLinear -> DequantizeLinear in the graph, which a runtime fuses with the operators around
it. Every reader gets its own DequantizeLinear: by the rule of the cut, it belongs to the reader's stage, where the
runtime can fuse it, and the tensor that crosses is int8, a quarter of the size.
"""

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor

from ..argument_checks import has_sizes, in_order
from ..errors import GraphError, InputError
from ..nn.checks import READ_ONCE
from .cut import cut
from .onnx_cut import parents
from .onnx_flat import FlatGraph

Batch = tuple[NDArray[Any], ...]  # one array per input of the graph

_STEPS = {"QuantizeLinear": ir.DataType.UINT8, "DequantizeLinear": ir.DataType.FLOAT}
_WEIGHED = ("Conv", "Gemm", "MatMul")
# Operators between convolutions; they become int8 if their inputs are int8.
_BETWEEN = ("Add", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat", "Reshape", "Flatten",
            "Transpose", "Squeeze", "Unsqueeze")  # fmt: skip


def calibration_batches(loader: Iterable[Any], flat: FlatGraph) -> list[Batch]:
    """Return the inputs in a loader as arrays for a flat graph; row by row if its batch is fixed at 1.

    The loader yields inputs, or `(inputs, target)`: inputs are a tensor, a tuple of tensors, or a dict by keyword.
    Raises `InputError` if it is empty, or if the inputs do not fit the graph.
    """
    found = [batch for batch in (_arrays(batch, flat) for batch in loader) if len(batch[0])]
    if not found:
        raise InputError(
            f"calibration= gave no samples; give a list of batches with a few hundred training samples ({READ_ONCE})"
        )
    if flat.dynamic:
        return found
    return [tuple(a[i : i + 1] for a in batch) for batch in found for i in range(len(batch[0]))]


def quantized(flat: FlatGraph, batches: Sequence[Batch], precision: str = "int8") -> FlatGraph:
    """Return the graph with convolutions and matrix products in int8.

    Weights have one scale per channel; the ranges of activations come from `batches`. The exits' outputs and scores
    stay float32, because thresholds need a finer resolution than a step of int8.

    x86 processors without VNNI add two products of a uint8 activation and an int8 weight in int16, which saturates at
    32,767. ``"int8"`` keeps weights in [-64, 64], and 2 * 255 * 64 = 32,640 fits; ``"int8-full-range"`` uses
    [-127, 127], for processors with VNNI and ARM processors.

    Raises:
        InputError: a calibration batch holds NaN or infinity.
        GraphError: there is nothing to quantize, or ONNX Runtime cannot quantize it.
    """
    for n, batch in enumerate(batches, 1):
        for value, array in zip(flat.model.graph.inputs, batch, strict=True):
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise InputError(
                    f"calibration batch {n} holds NaN or infinity in {value.name!r}, which gives int8 no range: leave "
                    "such samples out"
                )
    tail = [node.name or "" for node in last_products(flat)[1]]
    proto = ir.to_proto(flat.model)
    onnx.helper.set_model_props(proto, {"onnx.quant.pre_process": "onnxruntime.quant"})  # avoids a needless warning
    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, path = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        try:
            onnx.save(proto, source, save_as_external_data=True)  # ONNX Runtime 1.20 loses the weights of a proto
            quantize_static(
                source,
                path,
                _Reader(flat, batches),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=[*_WEIGHED, *_BETWEEN],
                nodes_to_exclude=[*tail, *_other_sums(flat)],
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                reduce_range=precision == "int8",
                extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
            )
        except Exception as error:  # ONNX Runtime passes on any error of its steps
            raise GraphError(f"ONNX Runtime cannot quantize this network ({error}); export it in float") from error
        model = ir.load(path)
    if not any(node.op_type == "DequantizeLinear" for node in model.graph):
        raise GraphError("the network has no float32 convolution or matrix product to make int8; export it in float")
    model.metadata_props.clear()
    _keep_tail_float(model.graph, tail, flat)
    _own_dequantizers(model.graph)
    _describe(model.graph, flat)
    passes.TopologicalSortPass()(model)
    return replace(flat, model=model)


class _Reader(CalibrationDataReader):
    """Batches in the form that ONNX Runtime reads."""

    def __init__(self, flat: FlatGraph, batches: Sequence[Batch]) -> None:
        names = [v.name for v in flat.model.graph.inputs]
        self.feeds = iter([dict(zip(names, batch, strict=True)) for batch in batches])

    def get_next(self) -> Any:
        """Return the next batch by input names, or None at the end."""
        return next(self.feeds, None)


def last_products(flat: FlatGraph) -> tuple[list[ir.Node], list[ir.Node]]:
    """Return the last products of every exit, and the nodes after them, which compute its output and its score."""
    exits = cut([[flat.value(name) for name in flat.names()]], parents)
    weighed = {n for n in flat.model.graph if n.op_type in _WEIGHED and n.outputs[0] in exits}
    before = cut([[v for node in weighed for v in node.inputs if v is not None]], parents)
    last = [n for n in flat.model.graph if not any(v in before for v in n.outputs)]
    return [n for n in last if n in weighed], [n for n in last if n not in weighed]


def _other_sums(flat: FlatGraph) -> list[str]:
    """Names of the sums without an operand from a convolution, as in transformers: int8 is too coarse for them."""

    def convolved(value: ir.Value | None) -> bool:
        node = None if value is None else value.producer()
        while node is not None and node.op_type in ("Relu", "Clip", "BatchNormalization"):
            node = node.inputs[0].producer() if node.inputs[0] is not None else None
        return node is not None and node.op_type == "Conv"

    sums = [node for node in flat.model.graph if node.op_type == "Add"]
    return [node.name or "" for node in sums if not any(convolved(v) for v in node.inputs)]


def _keep_tail_float(graph: ir.Graph, tail: Sequence[str], flat: FlatGraph) -> None:
    """Remove the int8 step between an exit's last product and its readers."""
    names = set(tail)
    for node in list(graph):
        pairs = [use.node for use in node.outputs[0].uses()] if node.op_type == "QuantizeLinear" else []
        if any(use.node.name not in names for pair in pairs for use in pair.outputs[0].uses()) or not pairs:
            continue
        source = node.inputs[0]
        assert source is not None
        for pair in pairs:
            if pair.outputs[0].is_graph_output():
                source.name = pair.outputs[0].name
            ir.convenience.replace_all_uses_with(pair.outputs[0], source, replace_graph_outputs=True)
            graph.remove(pair, safe=True)
        graph.remove(node, safe=True)


def _own_dequantizers(graph: ir.Graph) -> None:
    for node in [node for node in graph if node.op_type == "DequantizeLinear"]:
        for number, use in enumerate(list(node.outputs[0].uses())[1:], 2):
            copy = ir.node(node.op_type, node.inputs, node.attributes, num_outputs=1, name=f"{node.name}_{number}")
            copy.outputs[0].name = f"{node.outputs[0].name}_{number}"
            graph.insert_before(use.node, copy)
            use.node.replace_input_with(use.idx, copy.outputs[0])


def _describe(graph: ir.Graph, flat: FlatGraph) -> None:
    """Copy shapes and types from the float graph; the cut needs them to find the batch dimension."""
    known = {v.name: v for node in flat.model.graph for v in node.outputs}
    for node in graph:
        for value in node.outputs:
            if node.op_type in _STEPS and node.inputs[0] is not None:
                value.shape, value.type = node.inputs[0].shape, ir.TensorType(_STEPS[node.op_type])
            elif value.name in known:
                value.shape, value.type = known[value.name].shape, known[value.name].type


def _arrays(batch: Any, flat: FlatGraph) -> Batch:
    """Convert a batch of a loader to arrays in the order of the graph's inputs."""
    inputs = flat.model.graph.inputs
    alone = isinstance(batch, (tuple, list)) and len(batch) == len(inputs) and all(isinstance(t, Tensor) for t in batch)
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and not alone:
        batch = batch[0]  # batch[1] is the target
    if isinstance(batch, Mapping):
        batch = in_order(batch, [v.name or "" for v in inputs])
    given = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    arrays = [t.detach().cpu().numpy() if isinstance(t, Tensor) else np.asarray(t) for t in given]
    if len(arrays) != len(inputs) or not all(_fits(a, v, arrays[0]) for a, v in zip(arrays, inputs, strict=True)):
        gives = ", ".join(f"{a.dtype} {a.shape}" for a in arrays) or "nothing"
        reads = ", ".join(f"{v.name}: {v.dtype} {v.shape}".lower() for v in inputs)
        raise InputError(f"calibration gives {gives}; the network reads {reads}")
    return tuple(arrays)


def _fits(array: NDArray[Any], value: ir.Value, first: NDArray[Any]) -> bool:
    assert value.dtype is not None and value.shape is not None
    wanted = [len(first), *list(value.shape)[1:]]
    return array.dtype == value.dtype.numpy() and has_sizes(array.shape, wanted)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence ONNX Runtime's advice in the root logger, then restore the root logger."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
