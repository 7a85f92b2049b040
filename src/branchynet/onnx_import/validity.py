"""Refuse files that are no valid ONNX, as ONNX Runtime does."""

from collections import Counter

import onnx
import onnx.checker
import onnx.defs

from ..errors import FileError, GraphError, first_line
from .operators.operator import DAMAGED


def check_version(model: onnx.ModelProto) -> None:
    """Raise `GraphError` if the file is newer than the installed onnx."""
    opset = max((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), default=0)
    for what, version, newest in (
        ("operator set", opset, onnx.defs.onnx_opset_version()),
        ("format (ir_version)", model.ir_version, onnx.IR_VERSION),
    ):
        if version > newest:
            raise GraphError(
                f"it has {what} {version}, and onnx {onnx.__version__} knows those up to {newest}: upgrade onnx, or "
                "export the network in an older one"
            )


def check_names(graph: onnx.GraphProto) -> None:
    """Raise `FileError` if a name is not text, or if two nodes, inputs or constants define the same value."""
    weights = [one.name for one in graph.initializer]
    given = {*weights, *(one.name for one in graph.input)}
    defined = [*given, *(name for node in graph.node for name in node.output if name)]
    read = (name for node in graph.node for name in (node.op_type, node.domain, node.name, *node.input))
    outputs = (one.name for one in graph.output)
    for name in (*defined, *read, *outputs):
        if not isinstance(name, str):  # protobuf returns what is not valid UTF-8 as bytes
            raise FileError(f"its name {name!r} is not valid UTF-8; {DAMAGED}")
    for what, names in (("constants", weights), ("inputs", [one.name for one in graph.input]), ("values", defined)):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise FileError(f"it has two {what} with the name {twice[0]!r}; {DAMAGED}")


def check_node(node: onnx.NodeProto, opset: int) -> None:
    """Raise `GraphError` unless the inputs and attributes of a node fit the specification of its operator."""
    context = type(onnx.checker.DEFAULT_CONTEXT)()
    context.ir_version = onnx.IR_VERSION
    context.opset_imports = {"": opset, "ai.onnx": opset}
    try:
        onnx.checker.check_node(node, context)
    except onnx.checker.ValidationError as error:
        if "deprecated" in str(error):  # ONNX Runtime still computes these
            return
        where = f"{node.op_type}, which computes {node.output[0]!r},"
        raise GraphError(f"{where} is not valid in operator set {opset} ({first_line(error)}); {DAMAGED}") from error
