"""`attach` compares the network of a file with ONNX Runtime."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from branchynet import attach, from_onnx
from branchynet.errors import GraphError
from branchynet.onnx_import.comparing import TOLERANCE
from branchynet.onnx_import.operators import OPERATORS
from branchynet.onnx_import.operators.operator import Operator
from helpers.onnx_nodes import save_graph
from helpers.onnx_sources import write

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def source():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3), nn.Softmax(1))


@pytest.fixture(params=["free", "fixed"])
def file(request, tmp_path):
    return write(source(), (X[:3],), tmp_path / "net.onnx", "script", free=request.param == "free")


def made_wrong(monkeypatch, operator, change):
    right = OPERATORS[operator].run

    def wrong(x, *, outputs, **attributes):
        more = {"outputs": outputs} if operator == "MaxPool" else {}
        return change(right(x, **attributes, **more))

    monkeypatch.setitem(OPERATORS, operator, Operator(wrong))


WRONG = {
    "factor": lambda y: y * 3,
    "order": lambda y: y.flip(1),
    "nan": lambda y: y / y.clamp(max=0),
}


@pytest.mark.parametrize("change", WRONG)
def test_the_first_value_that_differs_is_named(change, file, monkeypatch):
    made_wrong(monkeypatch, "Relu", WRONG[change])
    with pytest.raises(GraphError, match=r"net\.onnx: .* ONNX Runtime, first in '\S*[Rr]elu\S*'"):
        attach(file, "auto", example=X, num_exits=2)


def test_chosen_outputs_are_compared_until_their_weights_change(file, monkeypatch):
    names = [name for name in from_onnx(file).value_names.values() if "Gemm" in name]
    made_wrong(monkeypatch, "Tanh", WRONG["order"])
    with pytest.raises(GraphError, match=r"first in '\S*[Tt]anh"):
        attach(from_onnx(file, outputs=names[-1:]), "auto", example=X, num_exits=2)
    trained = from_onnx(file, outputs=names[-1:])
    with torch.no_grad():
        next(trained.parameters()).mul_(2)
    attach(trained, "auto", example=X, num_exits=2)


def test_rounding_is_no_difference(file, monkeypatch):
    made_wrong(monkeypatch, "Relu", lambda y: y * (1 + TOLERANCE / 10))
    attach(file, "auto", example=X, num_exits=2)


def test_a_wrong_shape_is_a_difference(tmp_path, monkeypatch):
    nodes = [
        helper.make_node("MaxPool", ["x"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("ReduceMean", ["pooled"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["mean", "w"], ["out"]),
    ]
    w = numpy_helper.from_array(np.ones((3, 2), np.float32), "w")
    images = torch.rand(2, 3, 8, 8)
    path = save_graph(nodes, {"x": images.numpy()}, [w], ["out"], tmp_path / "net.onnx", opset=13)
    attach(path, ["pooled"], example=images)
    made_wrong(monkeypatch, "MaxPool", lambda y: nn.functional.pad(y, (0, 1)))
    with pytest.raises(
        GraphError, match=r"first in 'pooled' \(its shape is \(2, 3, 4, 5\) instead of \(2, 3, 4, 4\)\)"
    ):
        attach(path, ["pooled"], example=images)


def test_a_file_that_the_runtime_cannot_compute_warns(tmp_path):
    path = write(source(), (X[:3],), tmp_path / "net.onnx", "script")
    model = onnx.load(path)
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE  # the importer does not read this
    path.write_bytes(model.SerializeToString())
    with pytest.warns(UserWarning, match=r"ONNX Runtime cannot compute .*net\.onnx .*not compared with it"):
        attach(path, "auto", example=X, num_exits=2)
