"""Maps stay in the layout of ONNX Runtime's convolutions: values are equal, and chains of additions are fused."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from branchynet import BranchyNet, Policy, attach, load, zoo
from branchynet.deploy.assembly import assemble
from branchynet.graph.onnx_flat import flatten
from branchynet.graph.onnx_layout import keep_blocks
from branchynet.graph.onnx_nest import flat_model
from branchynet.policy.scores import entropy
from helpers.onnx_graphs import FULL, Sketch, graphs, profile

STRANGE = [np.nan, np.inf, -np.inf, 1e-45, 3e38, -0.0]


def pools(model):
    every = [node for _, graph in graphs(ir.to_proto(model).graph) for node in graph.node]
    return [node for node in every if node.op_type == "AveragePool"]


def chain(sketch, x, channels, *, reader="Conv", kind=np.float32, other=None):
    """As in a residual block: the sum of a map and its convolution, and a reader of the sum."""
    shape = x.shape
    generator = np.random.default_rng(0)
    weights = sketch.constant(generator.normal(size=(channels, channels, 1, 1)).astype(kind))
    dtype = ir.DataType.FLOAT if kind == np.float32 else ir.DataType.DOUBLE
    made = sketch.op("Conv", x, weights, shape=shape, dtype=dtype, kernel_shape=[1, 1])
    added = sketch.op("Add", made, x if other is None else other, shape=shape, dtype=dtype)
    active = sketch.op("Relu", added, shape=shape, dtype=dtype)
    if reader == "Conv":
        return sketch.op("Conv", active, weights, shape=shape, dtype=dtype, kernel_shape=[1, 1])
    return sketch.op(reader, active, shape=shape, dtype=dtype)


def of_one(make, channels, dtype=ir.DataType.FLOAT, **more):
    sketch = Sketch()
    x = sketch.input("x", channels, 3, 3)
    x.dtype = dtype
    score = sketch.op("Identity", sketch.input("s"), shape=[sketch.batch])
    return flat_model(sketch.flat([make(sketch, x, channels, **more)], [score]), ["output_1"], "output_1")


def test_the_side_that_no_convolution_made_is_brought_into_blocks(tmp_path):
    model = of_one(chain, 16)
    ir.save(model, tmp_path / "before.onnx")
    keep_blocks(model)
    ir.save(model, tmp_path / "after.onnx")
    onnx.checker.check_model(tmp_path / "after.onnx", full_check=True)
    (pool,) = pools(model)
    assert list(pool.input) == ["x"]
    x = np.random.default_rng(1).normal(size=(4, 16, 3, 3)).astype(np.float32)
    x[:2].reshape(-1)[: len(STRANGE)] = STRANGE
    feeds = {"x": x, "s": np.zeros(4, np.float32)}
    before, after = (profile(tmp_path / f"{name}.onnx", feeds, tmp_path)[0] for name in ("before", "after"))
    np.testing.assert_array_equal(after["output"], before["output"])
    keep_blocks(model)
    assert len(pools(model)) == 1  # a second time changes nothing


def alike(sketch, x, channels):
    """Both operands come from convolutions."""
    weights = sketch.constant(np.ones((channels, channels, 1, 1), np.float32))
    made = sketch.op("Conv", x, weights, shape=x.shape, kernel_shape=[1, 1])
    return chain(sketch, made, channels)


def scaled(sketch, x, channels):
    """The other operand has one number per channel."""
    scale = sketch.op("GlobalAveragePool", x, shape=[sketch.batch, channels, 1, 1])
    return chain(sketch, x, channels, other=sketch.op("Exp", scale, shape=scale.shape))


def read_twice(sketch, x, channels):
    """The convolution's output has another reader, so the addition cannot be fused."""
    weights = sketch.constant(np.ones((channels, channels, 1, 1), np.float32))
    made = sketch.op("Conv", x, weights, shape=x.shape, kernel_shape=[1, 1])
    added = sketch.op("Add", sketch.op("Add", made, x, shape=x.shape), made, shape=x.shape)
    return sketch.op("Conv", added, weights, shape=x.shape, kernel_shape=[1, 1])


def shifted(sketch, x, channels):
    """The other operand is constant."""
    return chain(sketch, x, channels, other=sketch.constant(np.ones((1, channels, 3, 3), np.float32)))


@pytest.mark.parametrize(
    ("make", "channels", "more"),
    [
        (chain, 10, {}),  # not a whole block
        (chain, 16, {"reader": "Exp"}),  # the reader does not use blocks
        (chain, 16, {"dtype": ir.DataType.DOUBLE, "kind": np.float64}),
        (alike, 16, {}),
        (scaled, 16, {}),
        (read_twice, 16, {}),
        (shifted, 16, {}),
    ],
)
def test_nothing_is_added_where_it_would_not_help(make, channels, more):
    model = of_one(make, channels, **more)
    keep_blocks(model)
    assert pools(model) == []


class Stack(torch.nn.Module):
    """Residual blocks; the first of a stage has a shortcut without parameters."""

    def __init__(self):
        super().__init__()
        net = zoo.resnet(20)
        self.stem, self.stage1, self.stage2 = net.stem, net.stage1, net.stage2
        pool = torch.nn.AdaptiveAvgPool2d(1)
        self.classifier = torch.nn.Sequential(pool, torch.nn.Flatten(), torch.nn.Linear(32, 10))

    def forward(self, x):
        """Return logits (B, 10)."""
        return self.classifier(self.stage2(self.stage1(self.stem(x))))


@pytest.mark.parametrize("dynamic", [pytest.param(True, marks=pytest.mark.heavy), False])
def test_behind_a_cut_no_more_additions_run_by_themselves_than_in_the_static_graph(dynamic, tmp_path):
    torch.manual_seed(0)
    x = torch.rand(3, 3, 32, 32)
    net = attach(Stack(), ["stage1.0", "stage2.0"], example=x).eval()
    flat = flatten(net, x, score=entropy, dynamic=dynamic)
    rows = x[: 3 if dynamic else 1].numpy()
    ran = {}
    for name, policy, last in (("static", None, "output_3"), ("exits", Policy(thresholds=(-1.0, -1.0)), "output")):
        ir.save(assemble(flat, policy), tmp_path / f"{name}.onnx")
        results, events = profile(tmp_path / f"{name}.onnx", {"x": rows}, tmp_path, FULL)
        ran[name] = Counter(event["op"] for event in events)
        np.testing.assert_allclose(results[last], net(x[: len(rows)])[-1].detach(), rtol=1e-4, atol=1e-4)
    # A block right before a cut has a padded shortcut: no convolution in the same graph reads that sum.
    assert ran["exits"]["Add"] - ran["static"]["Add"] <= dynamic
    assert ran["exits"]["Conv"] == ran["static"]["Conv"] > 12


def test_one_cut_value_is_pooled_once_in_each_graph_that_adds_it(tmp_path):
    torch.manual_seed(0)
    x = torch.rand(4, 3, 32, 32)
    trunk = Stack()
    head = torch.nn.Sequential(zoo.resnet(20).stage1[0], torch.nn.Flatten(), torch.nn.Linear(16 * 32 * 32, 10))
    first = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16 * 32 * 32, 10))
    net = BranchyNet(trunk, {"stem": first, "stage1.0": head})
    model = assemble(flatten(net.eval(), x, score=entropy, dynamic=False), Policy(thresholds=(0.5, 0.5)))
    names = [name for pool in pools(model) for name in pool.output]
    assert len(names) == len(set(names)) >= 2
    ir.save(model, tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    answer = load(tmp_path / "model.onnx", threads=1)(x[:1].numpy())
    np.testing.assert_allclose(answer.output, net(x[:1])[answer.exit[0] - 1].detach(), rtol=1e-4, atol=1e-4)
