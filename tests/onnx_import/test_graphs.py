"""What only shows in graphs of several nodes: free sizes, constants, names, and a batch that the file fixes."""

import numpy as np
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from branchynet import Policy, attach, detach, export, from_onnx, load
from branchynet.errors import GraphError, InputError
from helpers.networks import Tokens, build, chain, draw, residual, two_inputs
from helpers.onnx_nodes import runtime_answers, save_graph
from helpers.onnx_sources import write

RNG = np.random.default_rng(0)


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def constants(**values):
    return [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]


def node(operator, inputs, output, **attributes):
    return helper.make_node(operator, inputs.split(), output.split(), **attributes)


def check(path, *shape):
    """The file gives the same in PyTorch and in ONNX Runtime for three batch sizes."""
    net = from_onnx(path).eval()
    for rows in (1, 2, 7):
        x = floats(rows, *shape)
        with torch.no_grad():
            ours = net(torch.from_numpy(x)).numpy()
        # float32: sums in another order
        np.testing.assert_allclose(ours, runtime_answers(path, {"x": x})[0], rtol=1e-4, atol=1e-5)
    return net


HEADS = [
    node("MatMul", "x w", "y"),
    node("Shape", "x", "shape"),
    node("Gather", "shape zero", "batch"),
    node("Unsqueeze", "batch first", "rows"),
    node("Gather", "shape two", "width"),
    node("Div", "width two", "each"),
    node("Unsqueeze", "each first", "depth"),
    node("Concat", "rows rest heads depth", "split", axis=0),
    node("Reshape", "y split", "apart"),
    node("Transpose", "apart", "swapped", perm=[0, 2, 1, 3]),
    node("Cast", "each", "each_float", to=1),
    node("Sqrt", "each_float", "root"),
    node("Div", "swapped root", "scaled"),
    node("ReduceMean", "scaled", "means", axes=[1], keepdims=0),
    node("Reshape", "means flat", "joined"),
    node("Concat", "rows one", "column", axis=0),
    node("ConstantOfShape", "column", "ones", value=constants(one=np.ones(1, np.float32))[0]),
    node("Mul", "joined ones", "same"),
    node("Cast", "width", "width_float", to=1),
    node("Range", "begin width_float step", "steps"),
    node("Add", "same steps", "added"),
    node("Gemm", "added head", "out"),
]


def test_sizes_that_are_computed_leave_the_batch_free(tmp_path):
    """The size arithmetic that exporters write for attention: the batch goes through Shape, Concat and Reshape."""
    numbers = constants(
        zero=0, two=2, first=[0], rest=[-1], heads=[2], one=[1], flat=[0, 12], begin=np.float32(0), step=np.float32(0.5)
    )
    weights = constants(w=floats(6, 6), head=floats(12, 3))
    given = {"x": floats(2, 4, 6)}
    path = save_graph(HEADS, given, numbers + weights, ["out"], tmp_path / "heads.onnx", opset=17)
    net = check(path, 4, 6)
    assert {name for name, _ in net.named_parameters()} == {"weights.w", "weights.head"}
    x = torch.from_numpy(floats(5, 4, 6))
    attached = attach(path, ["scaled"], example=x).eval()
    file = load(export(attached, tmp_path / "model.onnx", policy=Policy(thresholds=(-1.0,)), example=x))
    for rows in (1, 5):
        with torch.no_grad():
            np.testing.assert_allclose(file(x[:rows].numpy()).output, net(x[:rows]), atol=1e-4)  # float32 sums


def test_constants_that_nodes_compute_are_not_trained(tmp_path):
    nodes = [
        node("NonZero", "which", "found"),
        node("Squeeze", "found", "places"),
        node("Gather", "x places", "chosen", axis=1),
        node("Upsample", "image scales", "large", mode="nearest"),
        node("Flatten", "large", "row"),
        node("MatMul", "chosen w", "y"),
        node("Add", "y row", "z"),
        node("Scatter", "z index update", "out", axis=1),
    ]
    numbers = constants(
        which=[0, 1, 1, 0, 1],
        image=floats(1, 1, 2, 2),
        scales=np.array([1, 1, 1, 2], np.float32),
        w=floats(3, 8),
        index=[[0]],
        update=np.array([[5]], np.float32),
    )
    path = save_graph(nodes, {"x": floats(2, 5)}, numbers, ["out"], tmp_path / "nodes.onnx", opset=9)
    net = check(path, 5)
    assert {name for name, _ in net.named_parameters()} == {"weights.w", "weights.image"}


def test_masks_exponents_and_statistics_are_not_trained(tmp_path):
    nodes = [
        node("BatchNormalization", "x scale bias mean var", "norm"),
        node("Abs", "norm", "positive"),
        node("Pow", "positive exponents", "powers"),
        node("Add", "powers mask", "masked"),
        node("Mul", "masked half", "out"),
    ]
    values = constants(
        scale=floats(3), bias=floats(3), mean=floats(3), var=np.abs(floats(3)), exponents=np.float32([1, 2, 3]),
        mask=np.float32([0, -1e9, 0]), half=np.float32(0.5),
    )  # fmt: skip
    path = save_graph(nodes, {"x": floats(2, 3)}, values, ["out"], tmp_path / "nodes.onnx")
    net = check(path, 3)
    assert {name for name, _ in net.named_parameters()} == {"weights.scale", "weights.bias"}
    statistics = net.get_buffer("weights.mean").clone()
    net.train()(torch.randn(4, 3))
    assert net.get_buffer("weights.mean").equal(statistics)


def test_statistics_that_the_file_shares_with_weights_are_not_trained(tmp_path):
    nodes = [node("BatchNormalization", "x ones zeros zeros ones", "out")]
    values = constants(ones=np.ones(3, np.float32), zeros=np.zeros(3, np.float32))
    net = check(save_graph(nodes, {"x": floats(2, 3)}, values, ["out"], tmp_path / "nodes.onnx"), 3)
    assert len(list(net.parameters())) == len(list(net.buffers())) == 2
    net(torch.randn(4, 3)).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_equal_constants_of_new_norms_get_a_parameter_each_and_shared_weights_stay_shared(tmp_path):
    nodes = [
        node("LayerNormalization", "x ones", "a"),
        node("MatMul", "a w", "b"),
        node("LayerNormalization", "b ones", "c"),
        node("MatMul", "c w", "out"),
    ]
    values = constants(ones=np.ones(3, np.float32), w=floats(3, 3))
    net = check(save_graph(nodes, {"x": floats(2, 3)}, values, ["out"], tmp_path / "nodes.onnx"), 3)
    assert sorted(tuple(p.shape) for p in net.parameters()) == [(3,), (3,), (3, 3)]


NAMES = [
    node("Relu", "x", "/layer.1/Relu:0"),
    node("Relu", "/layer.1/Relu:0", "layer_1_Relu_0"),
    node("Relu", "layer_1_Relu_0", "12"),
    node("Relu", "12", "train"),
    node("Split", "train", "left right", axis=1, num_outputs=2),
    node("Shape", "x", "shape"),
    node("Transpose", "w", "turned"),
    node("MatMul", "right turned", "logits"),
    node("Softmax", "logits", "out"),
]


@pytest.fixture
def named(tmp_path):
    return save_graph(NAMES, {"x": floats(2, 6)}, constants(w=floats(4, 3)), ["out"], tmp_path / "named.onnx")


def test_taps_are_names_of_values_or_of_submodules(named):
    x = torch.randn(3, 6)
    names = ["/layer.1/Relu:0", "layer_1_Relu_0", "12", "train", "left", "x"]
    net = attach(named, names, example=x)
    assert net.taps == ("input", "layer_1_Relu_0", "layer_1_Relu_0_2", "value_12", "train_2", "left")
    assert set(net.taps[1:]) <= dict(net.backbone.named_modules()).keys()
    assert attach(named, ["value_12"], example=x).taps == ("value_12",)
    assert "Relu(layer_1_Relu_0) -> 12" in repr(net.backbone)


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("logit", "computes no value 'logit'; did you mean 'logits'"),
        ("w", "'w' is a constant of the file, such as a weight"),
        ("turned", "'turned' is computed from sizes or weights alone"),
    ],
)
def test_other_names_are_refused(named, tap, message):
    with pytest.raises(InputError, match=message):
        attach(named, [tap], example=torch.randn(2, 6))


def test_one_value_by_two_names_is_refused(named):
    with pytest.raises(InputError, match="at must name different values"):
        attach(named, ["12", "value_12"], example=torch.randn(2, 6))


def test_the_value_before_a_softmax_can_be_the_output(named):
    x = torch.randn(3, 6)
    logits = from_onnx(named, outputs=["logits"])(x)
    torch.testing.assert_close(logits.softmax(-1), from_onnx(named)(x))
    both = from_onnx(named, outputs=["logits", "12"])(x)
    assert both["logits"].equal(logits) and both["12"].equal(x.relu())
    with pytest.raises(InputError, match="outputs must be a list of names of values; got 'logits'"):
        from_onnx(named, outputs="logits")
    with pytest.raises(InputError, match="outputs= names 'logit', which no node computes; did you mean 'logits'"):
        from_onnx(named, outputs=["logit"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: net(), "without 'x'; the file has the inputs x"),
        (lambda net: net(torch.rand(2, 6), torch.rand(2, 6)), "has the inputs x; got 2 values"),
        (lambda net: net(y=torch.rand(2, 6)), "called with 'y', which is no input"),
        (lambda net: net(torch.rand(2, 6), x=torch.rand(2, 6)), "called with 'x', twice"),
        (lambda net: net(torch.rand(6)), r"'x' has shape \(6,\); the file needs \(\?, \?\)"),
        (lambda net: net([1, 2]), "'x' must be a tensor; got list"),
        (lambda net: net(torch.rand(2, 5)), "MatMul, which computes 'logits', cannot read"),
    ],
)
def test_wrong_inputs_are_refused(named, call, message):
    with pytest.raises(InputError, match=message):
        call(from_onnx(named))


@pytest.mark.parametrize("exporter", ["dynamo", "script"])
def test_a_batch_of_one_in_the_file_is_freed(exporter, tmp_path):
    source = Tokens(2, 8, 4).eval()
    path = write(source, (torch.randint(50, (1, 7)),), tmp_path / "one.onnx", exporter, free=False)
    ids = torch.randint(50, (5, 7))
    net = attach(path, "auto", example=ids, num_exits=2).eval()
    with torch.no_grad():
        torch.testing.assert_close(net(ids)[-1], source(ids), atol=1e-4, rtol=0)  # float32 sums
    answer = load(export(net, tmp_path / "model.onnx", policy=Policy(thresholds=(-1.0,)), example=ids))(ids.numpy())
    np.testing.assert_allclose(answer.output, source(ids).detach(), atol=1e-4)


@pytest.mark.parametrize("family", [chain, residual, two_inputs], ids=lambda f: f.__name__)
def test_a_batch_of_one_is_freed_in_other_networks(family, tmp_path):
    net, example = build(family, seed=3)
    one = tuple(values[:1] for values in example)
    path = write(detach(net), one, tmp_path / "one.onnx", "script", free=False)
    inputs = draw(example, 5, seed=3)
    with torch.no_grad():
        freed = attach(path, "auto", example=inputs, num_exits=2).eval()(*inputs)[-1]
        torch.testing.assert_close(freed, detach(net)(*inputs), atol=1e-4, rtol=0)  # float32 sums


class Merged(nn.Module):
    """Writes the time, and not the batch, as the first of the sizes."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(x.reshape(3, -1)).reshape(-1, 3, 2).mean(1)


def test_a_batch_that_cannot_be_freed_is_refused(tmp_path):
    path = write(Merged(), (torch.rand(1, 3, 4),), tmp_path / "one.onnx", "script", free=False)
    with pytest.raises(GraphError, match=r"the file fixes the batch size at 1, and.*export it again with a free batch"):
        attach(path, "auto", example=torch.rand(4, 3, 4), num_exits=2)


def test_samples_that_a_fixed_batch_mixes_are_refused(tmp_path):
    nodes = [
        node("Reshape", "x flat", "row"),
        node("Softmax", "row", "shares", axis=0),
        node("Reshape", "shares back", "out"),
    ]
    values = constants(flat=[-1], back=[-1, 3])
    path = save_graph(nodes, {"x": floats(1, 3)}, values, ["out"], tmp_path / "mixed.onnx", sizes={"x": [1, 3]})
    with pytest.raises(GraphError, match="fixes the batch size at 1, and mixes samples at any other"):
        attach(path, ["row"], example=torch.rand(4, 3))
