"""Files that are damaged or invalid end in one short error that names the file, never in another exception."""

import random

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from branchynet import attach, cascade, from_onnx
from branchynet.errors import BranchyNetError, FileError, GraphError, InputError
from helpers.onnx_nodes import node_file, save_graph, values
from helpers.onnx_sources import write
from helpers.operator_cases import CASES

X = np.ones((2, 3, 4, 4), np.float32)
W = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
SHORT = 700  # characters


def file(path, operator, inputs=("x",), constants=(W,), **attributes):
    node = helper.make_node(operator, inputs, ["out"], name="the_node", **attributes)
    return save_graph([node], {"x": X}, list(constants), ["out"], path)


def floats(*numbers):
    return numpy_helper.from_array(np.array(numbers, np.float32), "s")


@pytest.mark.parametrize(
    ("operator", "options", "message"),
    [
        ("MatMul", {"inputs": ("", "w")}, "MatMul, which computes 'out', is not valid.*empty"),
        ("MatMul", {}, "MatMul, which computes 'out', is not valid.*input size 1"),
        ("MaxPool", {"kernel_shape": 2}, "MaxPool, which computes 'out', is not valid.*kernel_shape"),
        ("MaxPool", {"kernel_shape": [2, 2], "strides": [0, 0]}, "MaxPool, which computes 'out', cannot read"),
        (
            "AveragePool",
            {"kernel_shape": [2, 2], "strides": [1, 0], "pads": [0, 0, 1, 1]},
            "AveragePool, which computes",
        ),
        ("Resize", {}, "Resize, which computes 'out',.*neither scales nor sizes"),
        (
            "Resize",
            {"inputs": ("x", "", "s"), "constants": [floats(1, 1, 2, 2)], "mode": "odd"},
            "Resize, which computes",
        ),
        (
            "Resize",
            {"inputs": ("x", "", "s"), "constants": [floats(1, 1, 1.7, 2)], "nearest_mode": "ceil"}
            | {"coordinate_transformation_mode": "half_pixel_symmetric"},
            "half_pixel_symmetric.*'ceil' and the scale 1.7 cannot be imported",
        ),
        ("MaxPool", {"kernel_shape": [1, 1], "strides": [3, 3], "auto_pad": "SAME_UPPER"}, "larger than the window"),
    ],
)
def test_nodes_that_do_not_fit_their_operator_are_named(operator, options, message, tmp_path):
    path = file(tmp_path / "net.onnx", operator, **options)
    with pytest.raises((GraphError, InputError), match=message) as found:
        # 12 pixels: with a stride of three and one pixel, ONNX Runtime crops
        from_onnx(path)(torch.ones(2, 3, 12, 12))
    assert "net.onnx" in str(found.value) and len(str(found.value)) < SHORT


def sparse():
    tensor = helper.make_sparse_tensor(floats(1, 2), numpy_helper.from_array(np.array([1, 5]), "i"), [4, 4])
    return helper.make_node("Constant", [], ["w"], sparse_value=tensor)


def nothing():
    return helper.make_node("Constant", [], ["w"])


@pytest.mark.parametrize(("constant", "message"), [(sparse, "'w' is sparse.*dense"), (nothing, "'w' has 0 values")])
def test_constants_that_hold_no_tensor_are_refused(constant, message, tmp_path):
    nodes = [constant(), helper.make_node("MatMul", ["x", "w"], ["out"])]
    path = save_graph(nodes, {"x": X}, [], ["out"], tmp_path / "net.onnx")
    with pytest.raises((GraphError, FileError), match=message):
        from_onnx(path)


def twice(model):
    model.graph.node.add().CopyFrom(model.graph.node[0])


def same_constant(model):
    model.graph.initializer.add().CopyFrom(model.graph.initializer[0])


def same_input(model):
    model.graph.input.add().CopyFrom(model.graph.input[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (twice, "two values with the name 'out'"),
        (same_constant, "two constants with the name 'w'"),
        (same_input, "two inputs with the name 'x'"),
        (lambda m: m.opset_import[0].__setattr__("version", 999), "operator set 999.*upgrade onnx"),
        (lambda m: m.__setattr__("ir_version", 999), "ir_version.* 999.*upgrade onnx"),
    ],
)
def test_files_that_the_runtime_calls_invalid_are_refused(change, message, tmp_path):
    path = file(tmp_path / "net.onnx", "MatMul", ("x", "w"))
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises((FileError, GraphError), match=rf"net\.onnx.*{message}"):
        from_onnx(path)


def test_names_that_are_no_text_are_refused(tmp_path):
    path = file(tmp_path / "net.onnx", "MatMul", ("x", "w"))
    for name in (b"MatMul", b"the_node", b"out"):
        changed = tmp_path / "changed.onnx"
        changed.write_bytes(path.read_bytes().replace(name, b"\xc1" + name[1:]))
        with pytest.raises(FileError, match=r"changed\.onnx.*UTF-8"):
            from_onnx(changed)


@pytest.mark.parametrize("of", [lambda path: onnx.load(path), lambda path: path.read_bytes(), lambda path: None])
def test_a_model_instead_of_a_path_gets_a_short_error(of, tmp_path):
    given = of(file(tmp_path / "net.onnx", "MatMul", ("x", "w")))
    with pytest.raises(InputError, match=r"path must be.*got .*: give the path of the ONNX file") as found:
        from_onnx(given)
    assert len(str(found.value)) < 120


def test_a_cascade_of_a_path_hints_at_from_onnx():
    with pytest.raises(InputError, match=r"network 1 of the cascade.*'net\.onnx'.*from_onnx\(path\)"):
        cascade("net.onnx", nn.Linear(3, 2).eval())


class FixedLength(nn.Module):
    """Its forward holds a length, as tracing exporters write it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.first(x).relu().reshape(-1, 2, 3, 4).mean((1, 2)))


@pytest.mark.parametrize("free", [True, False])
def test_a_length_that_a_file_fixes_is_named(free, tmp_path):
    path = write(FixedLength(), (torch.rand(2, 6, 4),), tmp_path / "net.onnx", "script", free=free)
    attach(path, "auto", example=torch.rand(3, 6, 4), num_exits=2)
    with pytest.raises(GraphError, match=r"fixes the sizes of its inputs \(dimension 1 of 'x1' is 6 there and 5 in"):
        attach(path, "auto", example=torch.rand(3, 5, 4), num_exits=2)
    model = onnx.load(path)
    for dim in model.graph.input[0].type.tensor_type.shape.dim:
        dim.Clear()
    path.write_bytes(model.SerializeToString())
    with pytest.raises(GraphError, match=r"a node of the file fixes a batch size or length .*dynamic_shapes"):
        attach(path, "auto", example=torch.rand(3, 5, 4), num_exits=2)


def mutated(content, rng):
    """Change one node, attribute, constant or byte."""
    model = onnx.ModelProto.FromString(content)
    node, kind = model.graph.node[0], rng.randrange(6)
    if kind == 0 and node.attribute:
        del node.attribute[rng.randrange(len(node.attribute))]
    elif kind == 1 and node.attribute:
        changed = rng.choice(node.attribute)
        if changed.type == onnx.AttributeProto.INT:
            changed.i = rng.choice([-100, -1, 0, 100, 2**40])
        elif changed.type == onnx.AttributeProto.INTS and changed.ints:
            changed.ints[rng.randrange(len(changed.ints))] = rng.choice([-5, 0, 100])
        else:
            changed.CopyFrom(helper.make_attribute(changed.name, rng.choice(["odd", 1.5, [1, 2], ["a"], 3])))
    elif kind == 2 and node.input:
        del node.input[-1]
    elif kind == 3 and node.input:
        node.input[rng.randrange(len(node.input))] = ""
    elif kind == 4 and model.graph.initializer:
        tensor = rng.choice(model.graph.initializer)
        array = numpy_helper.to_array(tensor).reshape(-1)[:-1].astype(rng.choice(["f4", "f8", "i4", "?"]))
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    else:
        damaged = bytearray(content)
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        return bytes(damaged)
    return model.SerializeToString()


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_never_end_in_another_error(seed, tmp_path):
    rng, refused, path = random.Random(seed), 0, tmp_path / "net.onnx"
    for _ in range(150):
        case = rng.choice(CASES)
        content = mutated(node_file(case, path).read_bytes(), rng)
        path.write_bytes(content)
        try:
            with torch.no_grad():
                from_onnx(path)(*(torch.from_numpy(value) for value in values(case).values()))
        except BranchyNetError:
            refused += 1
    assert refused > 20
