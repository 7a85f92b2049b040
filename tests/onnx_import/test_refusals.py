"""Files that cannot be imported end in one clear error."""

import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from branchynet import BranchyNet, Policy, attach, export, from_onnx
from branchynet.errors import FileError, GraphError, InputError
from helpers.onnx_nodes import save_graph

X = {"x": np.ones((2, 3), np.float32)}


def one_node(path, operator, inputs=("x",), constants=(), domain="", outputs=("out",), **attributes):
    node = helper.make_node(operator, inputs, outputs, name="the_node", domain=domain, **attributes)
    return save_graph([node], X, list(constants), [outputs[0]], path)


def branch():
    return helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [], [onnx.ValueInfoProto(name="y")])


def scale():
    return [numpy_helper.from_array(np.float32(0.1), "s"), numpy_helper.from_array(np.int8(0), "z")]


@pytest.mark.parametrize(
    ("operator", "options", "message"),
    [
        ("Frobnicate", {}, r"the operator Frobnicate \(node 'the_node', which computes 'out'\) cannot be imported"),
        (
            "BiasGelu",
            {"domain": "com.microsoft"},
            "com.microsoft.BiasGelu.*export the network again without",
        ),
        ("TreeEnsemble", {"domain": "ai.onnx.ml"}, "the operator ai.onnx.ml.TreeEnsemble"),
        ("RandomNormalLike", {}, "RandomNormalLike.*draws random numbers.*eval mode"),
        ("QuantizeLinear", {"inputs": ("x", "s", "z"), "constants": scale()}, "QuantizeLinear.*quantized.*float file"),
        ("QLinearConv", {}, "QLinearConv.*quantized.*float file"),
        ("MatMulInteger", {}, "MatMulInteger.*quantized"),
        ("If", {"inputs": ("x",), "then_branch": branch(), "else_branch": branch()}, "If.*control flow.*torch.where"),
        ("Loop", {"body": branch()}, "Loop.*control flow"),
        ("NonZero", {}, "NonZero, which computes 'out', gives results whose size depends on values"),
        (
            "Dropout",
            {"inputs": ("x", "", "t"), "constants": [numpy_helper.from_array(np.array(True), "t")]},
            "eval mode",
        ),
        ("MaxPool", {"outputs": ("out", "places"), "kernel_shape": [1]}, "positions that MaxPool returns"),
        ("Cast", {"to": int(onnx.TensorProto.STRING)}, "the ONNX type STRING cannot be imported"),
        ("Reshape", {"inputs": ("x", "x")}, "its input 'x' is computed from the data"),
        ("Relu", {"alpha": 1.0}, "Relu, which computes 'out', is not valid in operator set 20 .*alpha"),
    ],
)
def test_operators_that_cannot_be_imported_are_named(operator, options, message, tmp_path):
    path = one_node(tmp_path / "net.onnx", operator, **options)
    with pytest.raises((GraphError, InputError), match=message):
        from_onnx(path)(torch.ones(2, 3))


def plain(path):
    return one_node(path, "MatMul", ("x", "w"), [numpy_helper.from_array(np.ones((3, 2), np.float32), "w")])


def test_missing_foreign_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(FileError, match=r"there is no file .*none\.onnx"):
        from_onnx(tmp_path / "none.onnx")
    with pytest.raises(FileError, match="is a folder"):
        from_onnx(tmp_path)
    with pytest.raises(InputError, match="path must be"):
        from_onnx(3)
    for name, content in (("text", b"no model at all"), ("empty", b""), ("weights", bytes(range(256)) * 9)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FileError, match="is not an ONNX file"):
            attach(tmp_path / name, "auto", example=torch.ones(2, 3))


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_truncated_files_are_refused(kept, tmp_path):
    content = plain(tmp_path / "net.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(content[: int(kept * len(content))])
    with pytest.raises((FileError, GraphError, InputError)):
        from_onnx(tmp_path / "cut.onnx")(torch.ones(2, 3))


def changed(tmp_path, change):
    model = onnx.load(plain(tmp_path / "net.onnx"))
    change(model)
    (tmp_path / "changed.onnx").write_bytes(model.SerializeToString())
    return tmp_path / "changed.onnx"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: m.graph.initializer[0].dims.__setitem__(0, 9), FileError, "the constant 'w' is damaged"),
        (lambda m: m.graph.initializer.pop(), FileError, "the node 'the_node' reads 'w', which is not defined before"),
        (lambda m: m.graph.output.pop(), FileError, "has no outputs"),
        (lambda m: m.graph.input.pop(), GraphError, "has no inputs"),
        (lambda m: m.opset_import[0].__setattr__("version", 6), GraphError, "operator set 6; 7 and later"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(change, error, message, tmp_path):
    with pytest.raises(error, match=message):
        from_onnx(changed(tmp_path, change))


def test_weights_in_another_file_are_read_and_missed(tmp_path):
    model = onnx.load(plain(tmp_path / "net.onnx"))
    path = tmp_path / "apart" / "net.onnx"
    path.parent.mkdir()
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert from_onnx(path)(torch.ones(2, 3)).tolist() == [[3, 3], [3, 3]]
    shutil.move(path.parent / "weights.bin", tmp_path)
    with pytest.raises(FileError, match=r"weights that .* keeps in another file cannot be read"):
        from_onnx(path)


@pytest.mark.parametrize("layout", ["nested", "stages"])
def test_files_with_exits_inside_are_refused(layout, tmp_path):
    net = BranchyNet(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), {"1": nn.Linear(8, 3)})
    path = export(net, tmp_path / "net", policy=Policy(thresholds=(0.5,)), example=torch.rand(2, 4), layout=layout)
    with pytest.raises(GraphError, match="exits inside; give the PyTorch network"):
        from_onnx(path / "stage_1.onnx" if layout == "stages" else path)
