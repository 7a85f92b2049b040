"""Networks, policies and examples that cannot be cut into torch stages are refused with the reason."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from branchynet import Policy
from branchynet.errors import GraphError, InputError
from branchynet.graph.torch_flat import TorchGraph, check, name_of
from branchynet.graph.torch_stages import cut_stages
from helpers.changeable_trunk import example, trunk

ONE = Policy(thresholds=(1.0,))


class Broken(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x  # the error names this line


LINE = Broken.forward.__code__.co_firstlineno + 1


def broken(self, h, value):
    return self.broken(h)


def with_broken():
    net = trunk(None, broken)
    net.backbone.broken = Broken()
    return net


REFUSED = {
    "values decide": (with_broken, rf"'broken'.*test_torch_refusals\.py:{LINE}.*data-dependent.*torch\.where"),
    "a number of a tensor": (lambda: trunk(None, lambda s, h, v: h * h.max().item()), "item.*Python number.*where"),
    "a shape of values": (lambda: trunk(None, lambda s, h, v: h * h.nonzero().shape[0]), "nonzero.*torch.where"),
    "numpy": (
        lambda: trunk(None, lambda s, h, v: torch.from_numpy(h.numpy())),
        r"test_torch_refusals\.py:\d+.*numpy",
    ),
    "random": (lambda: trunk(None, lambda s, h, v: h + torch.rand_like(h)), r"'rand_like'.*\.py:\d+.*deterministic"),
    "dropout": (lambda: trunk(None, lambda s, h, v: F.dropout(h)), "dropout.*deterministic"),
    "rrelu": (lambda: trunk(None, lambda s, h, v: F.rrelu(h, training=True)), "rrelu.*deterministic"),
    "batch statistics": (lambda: trunk(None, lambda s, h, v: s.bare(h)), "'bare' averages.*training"),
    "training": (lambda: trunk(None, lambda s, h, v: s.norm.train()(h)), "'norm.running_mean'.*training mode"),
    "counting": (lambda: trunk(None, lambda s, h, v: h + 0 * s.count.add_(1)), "changes its buffer 'count'"),
    "a fixed batch": (lambda: trunk(None, lambda s, h, v: h.view(2, 8)), "batch size.*cannot stay free"),
    "pairs": (lambda: trunk(None, lambda s, h, v: h.view(-1, 2, 8).flip(1).view(-1, 8)), "cannot stay free"),
    "heavy without a batch": (
        lambda: trunk(
            lambda s, h: F.linear(h.reshape(-1, 4), s.b.weight[:4, :4]),
            lambda s, h, v: v.reshape(-1, 2, 4).flip(2).flatten(1),  # not as the branch reads it
            read=lambda h: h.reshape(-1, 8).sum(1, keepdim=True),
        ),
        r"the value 'linear_1' \(2\*B, 4\).*changeable_trunk\.py:\d+ crosses.*none of its dimensions is the batch",
    ),
    "strides": (lambda: trunk(None, lambda s, h, v: h.as_strided(h.shape, (8, 1))), "as_strided.*strides"),
    "last batch": (
        lambda: trunk(read=lambda h: h[:1, :1]),
        r"exit 1 gives \(1, 4\), whose first dimension must be the batch",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut_is_refused_with_the_reason(case):
    make, message = REFUSED[case]
    with pytest.raises((GraphError, InputError), match=f"(?s){message}"):
        cut_stages(make(), example(), ONE)


def test_a_decision_for_a_whole_batch_is_refused():
    graph = torch.fx.Graph()  # the form in which torch.export writes torch.cond
    x, decided = graph.placeholder("x"), graph.placeholder("decided")
    node = graph.call_function(torch.ops.higher_order.cond, (decided, x, x, (x,)))
    for made in graph.nodes:
        made.meta["val"] = example()
    assert name_of(node) == "cond"
    with pytest.raises(GraphError, match=r"'cond'.*whole batch"):
        check(node, TorchGraph(tuple(graph.nodes), (), (), (), {}, None, (), ()))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Policy(), "0 thresholds; 2 exits need 1"),
        (Policy(thresholds=(1.0, 1.0)), "2 thresholds; 2 exits need 1"),
        (Policy.from_json({"score": "entropie", "thresholds": [1.0]}), "did you mean 'entropy'"),
        (Policy(lambda outputs: outputs[-1], (1.0,)), "one number per sample"),
    ],
)
def test_wrong_policies_are_named(policy, message):
    with pytest.raises(InputError, match=message):
        cut_stages(trunk(), example(), policy)


@pytest.mark.parametrize("given", [[], 3, torch.zeros(()), (torch.zeros(2, 6), torch.zeros(3, 6))])
def test_wrong_examples_are_named(given):
    with pytest.raises(InputError, match="example"):
        cut_stages(trunk(), given, ONE)
