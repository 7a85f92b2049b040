"""Multiply-accumulates agree with torch's counter, with operators decomposed into plain products."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from branchynet import BranchyNet, ExitCost
from branchynet.graph.macs import exit_macs
from branchynet.graph.onnx_flat import flatten
from branchynet.nn.calls import evaluating, find_tensor
from branchynet.nn.trace import tracing
from helpers.networks import FAMILIES, build
from helpers.onnx_graphs import Inner, Sketch

pytestmark = pytest.mark.filterwarnings("ignore:TF32")  # torch's own flags(), by which its fused LSTM is switched off


class Then(nn.Module):
    """A module, or a function of `(B, L, 6)`, followed by a classifier of the mean of its output."""

    def __init__(self, act, width=6):
        super().__init__()
        torch.manual_seed(0)
        self.act, self.f = act, nn.Linear(width, 4)
        self.w = nn.Parameter(torch.randn(3, 6, 5))

    def forward(self, x):
        y = self.act(x) if isinstance(self.act, nn.Module) else self.act(self, x)
        y = y[0] if isinstance(y, tuple) else y
        return self.f(y.flatten(1, -2).mean(1))


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x[:, :5], x[:, :5], need_weights=False)


def heads(x):
    return x.unflatten(-1, (2, 3)).transpose(1, 2)


def sdpa(self, x, **options):
    return (
        F.scaled_dot_product_attention(heads(x), heads(x[:, ::2]), heads(x[:, ::2]), **options)
        .transpose(1, 2)
        .flatten(2)
    )


def maps(layer):
    return lambda self, x: layer(x[:, :6].unflatten(1, (2, 3))).flatten(2).transpose(1, 2)


COUNTED = {
    "attention": (sdpa, 6),
    "attention with a mask": (lambda self, x: sdpa(self, x, attn_mask=torch.ones(9, 5).tril().bool()), 6),
    "multihead attention": (Attends(), 6),
    "encoder": (nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 10, batch_first=True), 2), 6),
    "lstm": (nn.LSTM(6, 5, num_layers=2, batch_first=True, bidirectional=True), 10),
    "gru": (nn.GRU(6, 5, num_layers=2, batch_first=True), 5),
    "rnn": (nn.RNN(6, 5, batch_first=True, bidirectional=True), 10),
    "einsum": (lambda self, x: torch.einsum("bld,hde->blhe", x, self.w).flatten(2), 15),
    "einsum with dots": (lambda self, x: torch.einsum("...ld,hde->...hle", x, self.w).flatten(1, 2), 5),
    "einsum of two batches": (lambda self, x: torch.einsum("bld,bmd->blm", x, x[:, :3]), 3),
    "products": (lambda self, x: x @ x.transpose(1, 2) @ x, 6),
    "convolution": (
        lambda self, x: F.conv1d(x.transpose(1, 2), self.w.permute(1, 0, 2)[:, :2], groups=3).transpose(1, 2),
        6,
    ),
    "transposed convolution": (
        lambda self, x: F.conv_transpose1d(x.transpose(1, 2), self.w.permute(1, 0, 2), stride=2).transpose(1, 2),
        3,
    ),
}


def counted(net, x):
    """Count with torch's counter, which does not know fused attention and fused LSTMs."""
    mkldnn = torch.backends.mkldnn.flags(enabled=False)
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        evaluating(net),
        sdpa_kernel(SDPBackend.MATH),
        mkldnn,
    ):
        net(*x)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("case", COUNTED)
def test_every_product_is_counted(case):
    net, x = Then(*COUNTED[case]).eval(), torch.randn(2, 9, 6)
    want = counted(net, (x[:1],))
    trunk, branch = exit_macs(flatten(net, x))
    assert (trunk, branch) == ((want,), (0.0,)) and want > 24
    with torch.no_grad(), evaluating(net), tracing(net, ((x[:1],), {}), lambda _, v: find_tensor(v)) as survey:
        net(x[:1])
    assert survey.operations[-1].macs == want


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_what_exits_and_trunk_cost_is_the_whole_network(family):
    net, example = build(family, 0)
    trunk, branch = exit_macs(flatten(net, example))
    one = tuple(t[:1] for t in example)
    plain = BranchyNet(net.backbone, {})
    assert sum(trunk) + sum(branch) == counted(net, one) and sum(branch) > 0
    assert sum(trunk) == counted(plain, one)  # exits of a tree share only nodes of a branch


@pytest.mark.parametrize("inner", [1, 2, 3])
@pytest.mark.parametrize("outer", [0, 1])
def test_an_exit_of_a_tree_costs_what_it_takes_and_never_costs_the_plain_network(inner, outer):
    """A tree has `inner` exits inside its branch and `outer` branches before it."""
    layers = [nn.Linear(9, 30), *(nn.Linear(30, 30) for _ in range(inner)), nn.Linear(30, 4)]
    tree = BranchyNet(nn.Sequential(*layers), {str(i): nn.Linear(30, 4) for i in range(inner)})
    heads = {"0": nn.Linear(8, 4)} if outer else {}
    net = BranchyNet(nn.Sequential(nn.Linear(7, 8), nn.Linear(8, 9), nn.Linear(9, 4)), {**heads, "1": tree}).eval()
    cost = ExitCost((1.0,) * net.num_exits, (0.0,) * net.num_exits, *exit_macs(flatten(net, torch.randn(2, 7))))
    plain = 7 * 8 + 8 * 9 + 9 * 4
    assert cost.macs([False] * (net.num_exits - 1) + [True])[-1] == plain
    first = 7 * 8 + 8 * 4 * outer
    reached = [first + 8 * 9 + 9 * 30 + i * 30 * 30 + (i + 1) * 30 * 4 for i in range(inner)]
    last = reached[-1] + 30 * 30 + 30 * 4
    want = [*([first] if outer else []), *reached, last, last + 9 * 4]
    assert cost.macs([True] * net.num_exits).tolist() == want


def test_products_of_several_operands_are_contracted_from_the_left():
    sketch = Sketch()
    x = sketch.input("x", 4)
    w, v = sketch.constant(np.ones((4, 5), np.float32)), sketch.constant(np.ones((5, 3), np.float32))
    y = sketch.op("Einsum", x, w, v, shape=[sketch.batch, 3], equation="bi,ij,jk->bk")
    assert exit_macs(sketch.flat([y], [sketch.total(y)])) == ((4.0 * 5 + 5 * 3,), (0.0,))


def holding(op_type, bodies, inputs):
    """A sketch whose exit is computed by a node with the given numbers of products in its subgraphs."""
    sketch = Sketch()
    x, w = sketch.input("x", 4), sketch.constant(np.ones((4, 4), np.float32))
    graphs = {}
    for name, products in bodies.items():
        inner, held = Inner(sketch), x
        for _ in range(products):
            held = inner.op("MatMul", held, w)
        graphs[name] = ir.Graph([], [inner.op("Neg", held)], nodes=inner.nodes, name=name)
    y = sketch.op(op_type, *inputs(sketch), shape=[sketch.batch, 4], **graphs)
    return sketch.flat([y], [sketch.total(y)])


def test_of_two_sides_the_costlier_counts_and_loops_are_not_guessed():
    yes = lambda sketch: [sketch.constant(np.bool_(True))]  # noqa: E731
    assert exit_macs(holding("If", {"then_branch": 2, "else_branch": 1}, yes)) == ((32.0,), (0.0,))
    turns = lambda sketch: [sketch.constant(np.int64(3)), None]  # noqa: E731
    assert exit_macs(holding("Loop", {"body": 1}, turns)) == ((), ())
    assert exit_macs(holding("Loop", {"body": 0}, turns)) == ((0.0,), (0.0,))


def test_a_product_of_unknown_size_is_not_counted_as_one():
    sketch = Sketch()
    x = sketch.input("x", 4)
    some = sketch.op("Compress", x, sketch.constant(np.array([True])), shape=[None, 4])
    y = sketch.op("MatMul", some, sketch.constant(np.ones((4, 4), np.float32)), shape=[None, 4])
    assert exit_macs(sketch.flat([y], [sketch.total(y)])) == ((), ())
    assert not any(ExitCost((1.0,), (0.0,), (), ()).trunk_macs)
