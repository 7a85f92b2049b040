"""ONNX files of a few nodes, and their answers in ONNX Runtime."""

from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

IR_VERSION = 10


@dataclass(frozen=True)
class Case:
    """A node: its inputs by position (None for one that is left out), and which of them are constants."""

    operator: str
    inputs: tuple
    constants: tuple = ()
    attributes: dict = field(default_factory=dict)
    opset: int = 20
    outputs: int = 1
    note: str = ""

    def __str__(self):
        return f"{self.operator}{'-' if self.note else ''}{self.note}-{self.opset}"


def values(case):
    """The inputs of a case that are not constants, by name."""
    found = {f"x{n}": one for n, one in enumerate(case.inputs) if one is not None and n not in case.constants}
    return {name: np.asarray(value) for name, value in found.items()}


def node_file(case, path, batch="batch"):
    """Write a file with one node; the first size of all inputs is free."""
    given = values(case)
    constants = [
        numpy_helper.from_array(np.asarray(case.inputs[n]), f"x{n}")
        for n in case.constants
        if case.inputs[n] is not None
    ]
    names = ["" if one is None else f"x{n}" for n, one in enumerate(case.inputs)]
    outputs = [f"y{n}" for n in range(case.outputs)]
    node = helper.make_node(case.operator, names, outputs, **case.attributes)
    return save_graph([node], given, constants, outputs, path, case.opset)


def save_graph(nodes, given, constants, outputs, path, opset=20, sizes=None):
    """Write a file of nodes. `given` holds example inputs by name; their sizes are free unless `sizes` fixes them."""
    declared = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(a.dtype), (sizes or {}).get(name, [None] * a.ndim)
        )
        for name, a in given.items()
    ]
    ends = [onnx.ValueInfoProto(name=name) for name in outputs]
    graph = helper.make_graph(nodes, "graph", declared, ends, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSION)
    path.write_bytes(model.SerializeToString())
    return path


def runtime_answers(path, given):
    """All outputs of a file in ONNX Runtime, without its rewrites."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, given)
