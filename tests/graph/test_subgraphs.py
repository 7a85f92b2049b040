"""Operators that the exporter writes as nodes with subgraphs, and the values that these read from outside."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from branchynet import BranchyNet, Policy, load
from branchynet.deploy.assembly import assemble
from branchynet.graph.onnx_flat import flatten
from branchynet.graph.subgraphs import graphs_of, nodes_of, reads, within
from branchynet.policy.scores import entropy
from helpers.loop import agree_everywhere, every_exit
from helpers.networks import spread_out


class Joined(nn.Module):
    """`join(a, b)` combines two tensors `(B, 6)` to `(B, 12)`, before and after the first exit."""

    def __init__(self, join):
        super().__init__()
        torch.manual_seed(0)
        self.join = join
        self.a, self.b, self.c, self.f = nn.Linear(6, 6), nn.Linear(12, 6), nn.Linear(12, 6), nn.Linear(12, 4)

    def forward(self, x):
        first = torch.tanh(self.a(x))
        second = torch.tanh(self.b(self.join(first, x)))
        third = torch.tanh(self.c(self.join(second, first)))
        return self.f(self.join(third, x))


class Bags(nn.Module):
    """Bags of words, in the trunk and in a layer after the first exit."""

    def __init__(self, mode):
        super().__init__()
        torch.manual_seed(0)
        self.e, self.late = nn.EmbeddingBag(9, 6, mode=mode), nn.EmbeddingBag(9, 6, mode=mode)
        self.a, self.f = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, ids):
        y = torch.tanh(self.a(self.e(ids)))
        return self.f(torch.tanh(y + self.late(ids)))


JOINS = {
    "hstack": lambda a, b: torch.hstack([a, b]),
    "vstack": lambda a, b: torch.vstack([a.T, b.T]).T,
    "dstack": lambda a, b: torch.dstack([a, b]).flatten(1),
    "column_stack": lambda a, b: torch.column_stack([a[:, :2], a[:, 2:], b]),
    "atleast_2d": lambda a, b: torch.cat(torch.atleast_2d([a, b]), 1),
}


def joined(name):
    net = BranchyNet(Joined(JOINS[name]), {"a": nn.Linear(6, 4), "b": nn.Linear(6, 4)}).eval()
    return net, torch.randn(43, 6, generator=torch.Generator().manual_seed(1))


def bags(mode):
    net = BranchyNet(Bags(mode), {"a": nn.Linear(6, 4)}).eval()
    return net, torch.randint(9, (43, 5), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("make", "name"), [*((joined, name) for name in JOINS), *((bags, mode) for mode in ("sum", "mean", "max"))]
)
def test_nodes_that_hold_graphs_answer_at_every_exit_and_batch_size(make, name, tmp_path):
    net, x = make(name)
    spread_out(net, (x,))
    outputs = every_exit(net, (x,))
    flat = flatten(net, x[:2], score=entropy)
    ir.save(assemble(flat, Policy(thresholds=(0.5,) * (net.num_exits - 1))), tmp_path / "model.onnx")
    agree_everywhere(load(tmp_path / "model.onnx", threads=1), (x.numpy(),), outputs)
    ir.save(assemble(flat, None), tmp_path / "flat.onnx")
    got = load(tmp_path / "flat.onnx", threads=1).outputs(x.numpy())[1:]
    np.testing.assert_allclose(np.stack(got, axis=1), outputs, atol=1e-4)


def test_what_graphs_inside_a_node_read_is_read_by_the_node():
    def value(name):
        return ir.val(name, ir.DataType.FLOAT, [2])

    def graph(name, nodes, outputs):
        return ir.Graph([], outputs, nodes=nodes, name=name)

    a, b, c, d = map(value, "abcd")
    deepest = ir.node("Add", [b, c], name="deepest")
    other = ir.node("Neg", [d], name="other")
    inner = ir.node(
        "If",
        [value("deep")],
        {"then_branch": graph("x", [deepest], deepest.outputs), "else_branch": graph("y", [other], other.outputs)},
        name="inner",
    )
    middle = ir.node("Relu", [inner.outputs[0]], name="middle")
    outer = ir.node("SequenceMap", [a], {"body": graph("z", [inner, middle], [*middle.outputs, a])}, name="outer")
    assert [v.name for v in reads(outer)] == ["a", "deep", "b", "c", "d"]
    assert [n.name for n in within(outer)] == ["outer", "inner", "deepest", "other", "middle"]
    assert [n.name for n in nodes_of(next(graphs_of(outer)))] == ["inner", "deepest", "other", "middle"]
    assert reads(deepest) == [b, c] and list(graphs_of(deepest)) == []
