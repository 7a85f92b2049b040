"""fp16 and bf16: what is converted, what stays float32, and what is too large."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from branchynet import BranchyNet, Policy, load
from branchynet.deploy.assembly import assemble
from branchynet.errors import GraphError
from branchynet.graph.half import HALF, MAGNITUDE, in_half, rounded
from branchynet.graph.onnx_flat import flatten
from branchynet.graph.subgraphs import nodes_of
from branchynet.policy.scores import entropy
from helpers.loop import agree_everywhere
from helpers.networks import draw
from helpers.onnx_graphs import flat_of

PRECISIONS = list(HALF)


def opened(folder, flat, policy=None, **options):
    path = folder / "model.onnx"
    ir.save(assemble(flat, policy, **options), path)
    return load(path, threads=1)


def outputs_of(engine, inputs):
    """Every exit's outputs, one sample at a time, `(S, N, C)`."""
    rows = [engine.outputs(*(i[s : s + 1] for i in inputs))[1:] for s in range(len(inputs[0]))]
    return np.stack([np.concatenate(exit) for exit in zip(*rows, strict=True)], axis=1)


def two(*layers, width=6):
    """A network of two exits: Linear, `layers`, Linear, with a branch after the layers."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, width), *layers, nn.Linear(width, 3))
    return BranchyNet(trunk, {str(len(layers)): nn.Linear(width, 3)}).eval()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ends_are_float32_and_the_trunk_is_half(family, precision):
    _, _, flat = flat_of(family)
    before = [(v.name, v.dtype, v.shape) for v in (*flat.model.graph.inputs, *flat.model.graph.outputs)]
    graph = in_half(flat, precision).model.graph
    assert [(v.name, v.dtype, v.shape) for v in (*graph.inputs, *graph.outputs)] == before
    made = {v.dtype for node in graph for v in node.outputs}
    assert made >= {HALF[precision], ir.DataType.FLOAT}
    assert {v.dtype for v in graph.initializers.values() if v.const_value.size > 256} <= {HALF[precision]}
    assert HALF[precision] not in {v.dtype for node in flat.model.graph for v in node.outputs}, "a copy is converted"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_nested_graph_answers_as_the_loop_over_the_flat_graph(family, precision, tmp_path):
    _, example, flat = flat_of(family)
    inputs = [i.numpy() for i in draw(example, 64, 0)]
    coarse = rounded(in_half(flat, precision), precision)
    outputs = outputs_of(opened(tmp_path, coarse, outputs=coarse.names()), inputs)
    exact = outputs_of(opened(tmp_path, flat), inputs)
    assert 0 < np.abs(outputs - exact).max() < {"fp16": 0.02, "bf16": 0.2}[precision] * np.abs(exact).max()
    never = Policy(thresholds=(-1.0,) * (flat.num_exits - 1))
    agree_everywhere(opened(tmp_path, coarse, never), inputs, outputs)


@pytest.mark.parametrize(("precision", "bits"), [("fp16", 11), ("bf16", 8)])
def test_values_are_rounded_to_the_bits_of_the_type(tmp_path, precision, bits):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(1, 1), nn.Linear(1, 1)
            with torch.no_grad():
                for layer in (self.first, self.last):
                    layer.weight.fill_(1.0)
                    layer.bias.fill_(0.0)

        def forward(self, x):
            return self.last(torch.relu(self.first(x)))

    flat = flatten(Plain(), torch.rand(2, 1))
    coarse = rounded(in_half(flat, precision), precision)
    x = np.float32([[1 + 2.0**-bits * 1.2], [1 + 2.0 ** (1 - bits)], [3.0]])
    got = opened(tmp_path, coarse, outputs=coarse.names()).outputs(x)[1]
    assert got.ravel().tolist() == [1 + 2.0 ** (1 - bits), 1 + 2.0 ** (1 - bits), 3.0]


@pytest.mark.parametrize(("precision", "bits"), [("fp16", 11), ("bf16", 8)])
def test_values_are_rounded_toward_zero(tmp_path, precision, bits):
    """The oracle clears the bits of float32 that the type does not have."""
    flat = flatten(nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)), torch.rand(2, 1))
    for value in flat.model.graph.initializers.values():
        size = value.const_value.numpy()
        if size.dtype == np.float32:
            value.const_value = ir.tensor(np.full_like(size, size.ndim > 1), name=value.name)
    coarse = rounded(in_half(flat, precision), precision, toward_zero=True)
    powers = np.exp2(np.arange(-4, 8))
    x = np.concatenate([np.random.default_rng(0).uniform(1e-3, 200, 500), powers, np.nextafter(powers, 0), [0]])
    x = x.astype(np.float32)[:, None]
    got = opened(tmp_path, coarse, outputs=coarse.names()).outputs(x)[1]
    kept = np.uint32(0xFFFFFFFF << (24 - bits) & 0xFFFFFFFF)
    np.testing.assert_array_equal(got, (x.view(np.uint32) & kept).view(np.float32))


def test_a_weight_that_is_too_large_is_named():
    net = two(nn.ReLU())
    with torch.no_grad():
        net.backbone[0].weight[2, 1] = -7e4
    flat = flatten(net, torch.rand(2, 4), score=entropy)
    with pytest.raises(GraphError, match=r"the weight '.*0\.weight' reaches 70000, and fp16 holds at most 65504.*bf16"):
        in_half(flat, "fp16")
    in_half(flat, "bf16")


def test_magnitudes_are_those_before_rounding(tmp_path):
    net = two(nn.ReLU())
    with torch.no_grad():
        net.backbone[0].weight.fill_(6e4)
    flat = flatten(net, torch.rand(2, 4), score=entropy)
    coarse = rounded(in_half(flat, "fp16"), "fp16")
    names = [v.name for v in coarse.model.graph.outputs if v.name.startswith(MAGNITUDE)]
    engine = opened(tmp_path, coarse, outputs=["output_1", *names])
    sizes = dict(zip(names, engine.outputs(np.ones((3, 4), np.float32))[2:], strict=True))
    assert max(sizes.values()) == pytest.approx(2.4e5, rel=1e-2) and sizes[f"{MAGNITUDE}input"] == 1


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -torch.inf])
def test_masks_stay_masks(tmp_path, precision, lowest):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
            self.register_buffer("mask", torch.tensor([0.0, lowest, 0.0, 0.0, lowest, 0.0]))

        def forward(self, x):
            return self.last(torch.softmax(self.first(x).clamp(max=torch.finfo(torch.float32).max) + self.mask, 1))

    torch.manual_seed(0)
    net, x = Masked().eval(), torch.randn(5, 4)
    coarse = rounded(in_half(flatten(net, x), precision), precision)
    got = opened(tmp_path, coarse, outputs=coarse.names()).outputs(x.numpy())[1]
    np.testing.assert_allclose(got, net(x).detach().numpy(), atol=0.02)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_sizes_of_a_resize_stay_float32(precision):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Upsample(scale_factor=1 / 3, mode="bilinear"), nn.Conv2d(4, 2, 1))
    graph = in_half(flatten(net, torch.rand(2, 1, 14, 14)), precision).model.graph
    resize = next(node for node in graph if node.op_type == "Resize")
    sizes = [v for v in resize.inputs[2:] if v is not None]
    assert sizes and {v.dtype for v in sizes} <= {ir.DataType.FLOAT, ir.DataType.INT64}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nodes_with_subgraphs_stay_float32(tmp_path, precision):
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.f = nn.Linear(6, 6), nn.Linear(12, 6), nn.Linear(12, 4)

        def forward(self, x):
            first = torch.tanh(self.a(x))
            second = torch.tanh(self.b(torch.hstack([first, x])))
            return self.f(torch.hstack([second, first]))

    torch.manual_seed(0)
    net = BranchyNet(Joined(), {"a": nn.Linear(6, 4)}).eval()
    x = torch.randn(9, 6)
    flat = flatten(net, x, score=entropy)
    assert any(node.op_type == "SequenceMap" for node in nodes_of(flat.model.graph))
    coarse = rounded(in_half(flat, precision), precision)
    got = opened(tmp_path, coarse, outputs=coarse.names()).outputs(x.numpy())[1:]
    for one, exact in zip(got, net(x), strict=True):
        np.testing.assert_allclose(one, exact.detach().numpy(), atol=0.05)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (lambda: nn.Sequential(nn.ReLU(), nn.Tanh()), "no float32 convolution.*export it in float32"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4).half(), nn.ReLU(), nn.Linear(4, 4).half()),
            "already computes in float16",
        ),
    ],
)
def test_networks_without_float32_products_are_refused(net, message):
    net = net()
    x = torch.rand(2, 4, dtype=next((p.dtype for p in net.parameters()), torch.float32))
    with pytest.raises(GraphError, match=message):
        in_half(flatten(net, x), "fp16")
