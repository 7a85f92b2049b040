"""Read the graph of an ONNX file."""

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import torch
from torch import Tensor

from ..errors import FileError, GraphError, InputError, nearest
from ..files import check_path
from ..onnx_files import entries, read_model
from .constants import is_few, tensor_of, trained, untied
from .dtypes import dtype_of
from .fixed_batch import free_batch
from .network import OnnxGraph
from .numbers import Numbers, known
from .operators import OPERATORS
from .steps import Step
from .unsupported import check_operator
from .validity import check_names, check_node, check_version

DENSE = "which cannot be imported; write the file with dense weights"
_OLDEST = 7  # before, operators broadcast by an attribute
_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}


def read_graph(path: str | os.PathLike[str], outputs: Sequence[str] | None = None) -> OnnxGraph:
    """Read the nodes and constants that the outputs need. Arguments and errors are those of `from_onnx`."""
    check_path(path)
    if isinstance(outputs, str):
        raise InputError(f"outputs must be a list of names of values; got {outputs!r}: give [{outputs!r}]")
    if not Path(path).exists():
        raise FileError(f"there is no file {path}; give the path of an ONNX file")
    if Path(path).is_dir():
        raise FileError(f"{path} is a folder; give an ONNX file")
    model = read_model(path)
    _check_origin(model, path)
    if not model.graph.node or not model.opset_import:
        raise FileError(f"{path} is not an ONNX file with a network; it may be damaged, or of another kind")
    return _graph(model, outputs)


def _check_origin(model: onnx.ModelProto, path: str | os.PathLike[str]) -> None:
    """Raise `GraphError` for a file of `export` with several exits, or for one of its stages."""
    about: Any = {}
    with contextlib.suppress(ValueError):  # another tool's entry of that name
        about = json.loads(entries(model, path).get("branchynet", "{}"))
    if isinstance(about, dict) and (about.get("exits", 1) != 1 or "stage" in about):
        raise GraphError(
            f"{path} is a file of branchynet.export with exits inside; give the PyTorch network that it was made of, "
            "or a file of the network alone, export(detach(net), path, policy=None, example=...)"
        )


def _graph(model: onnx.ModelProto, wanted: Sequence[str] | None) -> OnnxGraph:
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    check_version(model)
    opset = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), _OLDEST)
    if opset < _OLDEST:
        raise GraphError(
            f"it has operator set {opset}; {_OLDEST} and later can be read: convert it with "
            "onnx.version_converter.convert_version(model, 17)"
        )
    if model.graph.sparse_initializer:
        raise GraphError(f"it has sparse weights, {DENSE}")
    constants = {one.name: tensor_of(one) for one in model.graph.initializer}
    given = [one for one in model.graph.input if one.name not in constants]
    inputs = {one.name: _shape(one) for one in given}
    check_names(model.graph)
    if not inputs:
        raise GraphError("it has no inputs, so there is nothing to learn from; give the file of a network")
    outputs = tuple(wanted) if wanted else _answers(model.graph)
    nodes = _needed(model.graph.node, outputs, {*inputs, *constants})
    steps = []
    for node in nodes:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            constants[node.output[0]] = _constant(node)
        else:
            check_operator(node)
            check_node(node, opset)
            steps.append(_step(node, opset))
    batch = _fixed_batch(inputs.values())
    if batch is not None:
        steps = free_batch(steps, constants, tuple(inputs), batch)
    parameters = trained(constants, steps)
    left = untied(_fold(steps, constants, parameters), constants, parameters)
    read = {name for step in left for name in step.inputs} | set(outputs)
    return OnnxGraph(
        inputs,
        {one.name: dtype_of(one.type.tensor_type.elem_type) for one in given},
        outputs,
        left,
        {name: value for name, value in constants.items() if name in read},
        parameters & read,
        batch,
    )


def _answers(graph: onnx.GraphProto) -> tuple[str, ...]:
    """Return the names of the outputs that are floats; of all outputs if none is. Raises `FileError` for no outputs."""
    computed = {name for node in graph.node for name in node.output}
    named = {one.name: one.type.tensor_type.elem_type for one in graph.output if one.name in computed}
    if not named:
        raise FileError("it has no outputs that a node computes; it may be damaged, or hold no network")
    return tuple(name for name, kind in named.items() if kind in _FLOATS) or tuple(named)


def _needed(nodes: Sequence[onnx.NodeProto], outputs: Iterable[str], given: set[str]) -> list[onnx.NodeProto]:
    """Return the nodes that the outputs depend on, in order. Raises `InputError` or `FileError` for unknown values."""
    makers = {name: node for node in nodes for name in node.output if name}
    wanted = set(outputs)
    for name in outputs:
        if name not in makers:
            raise InputError(f"outputs= names {name!r}, which no node computes{nearest(name, makers)}")
    kept, defined = [], set(given)
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted.update(name for name in node.input if name)
    for node in reversed(kept):
        if missing := [name for name in node.input if name and name not in defined]:
            raise FileError(f"the node {node.name or node.op_type!r} reads {missing[0]!r}, which is not defined before")
        defined.update(node.output)
    return kept[::-1]


def _step(node: onnx.NodeProto, opset: int) -> Step:
    attributes = {one.name: _attribute(one) for one in node.attribute}
    used = [name if name else "" for name in node.output]
    while used and not used[-1]:
        used.pop()
    inputs = list(node.input)
    while inputs and not inputs[-1]:
        inputs.pop()
    return Step(node.op_type, tuple(inputs), tuple(used), attributes, opset)


def _attribute(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, onnx.TensorProto):
        return tensor_of(value)
    if isinstance(value, (int, float)):
        return value
    return [one.decode(errors="replace") if isinstance(one, bytes) else one for one in value]


def _constant(node: onnx.NodeProto) -> Tensor:
    if len(node.attribute) != 1:
        raise FileError(
            f"the constant {node.output[0]!r} has {len(node.attribute)} values, not one; write the file again"
        )
    attribute = node.attribute[0]
    if attribute.name == "sparse_value":
        raise GraphError(f"the constant {node.output[0]!r} is sparse, {DENSE}")
    value = _attribute(attribute)
    if isinstance(value, Tensor):
        return value
    if attribute.name in ("value_int", "value_ints"):
        return torch.tensor(value, dtype=torch.int64)
    if attribute.name in ("value_float", "value_floats"):
        return torch.tensor(value, dtype=torch.float32)
    raise GraphError(f"the constant {node.output[0]!r} holds {attribute.name}, which cannot be imported")


def _fold(steps: Iterable[Step], constants: dict[str, Tensor], parameters: set[str]) -> tuple[Step, ...]:
    """Compute the steps that read constants only, except parameters, and return the other steps."""
    left = []
    for step in steps:
        names = [name for name in step.inputs if name]
        if all(name in constants and name not in parameters for name in names):
            given = [None if not name else _number(constants[name]) for name in step.inputs]
            for name, value in zip(step.outputs, step.run(given), strict=False):
                constants[name] = value.as_tensor() if isinstance(value, Numbers) else value
        elif OPERATORS[step.operator].constant:
            raise GraphError(
                f"{step.described()} gives results whose size depends on values of the inputs; the graph must be the "
                "same for all samples: export the network without it"
            )
        else:
            left.append(step)
    return tuple(left)


def _number(value: Tensor) -> Any:
    return known(value) if is_few(value) else value


def _shape(value: onnx.ValueInfoProto) -> tuple[int | None, ...] | None:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        raise GraphError(f"the input {value.name!r} is a sequence or another type that is not a tensor")
    if not kind.HasField("shape"):
        return None
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)


def _fixed_batch(shapes: Iterable[tuple[int | None, ...] | None]) -> int | None:
    """Return the batch size that all inputs have; None if it is free, or unknown."""
    first = {shape[0] if shape else None for shape in shapes}
    return first.pop() if len(first) == 1 else None
