"""BranchyNet and attach: one forward pass computes every exit and does not change the backbone."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from branchynet.errors import BranchyNetError, GraphError, InputError
from branchynet.nn.attaching import attach
from branchynet.nn.calls import evaluating, output_tensor
from branchynet.nn.network import BranchyNet
from helpers.trunks import X, head, hooks, trunk

# Forward


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_forward_gives_every_exit_then_the_backbones_own(data):
    names = ["input", "0.0", "0", "1.1", "2.0", "3", "4"]
    order = {name: i for i, name in enumerate(names)}
    taps = sorted(data.draw(st.sets(st.sampled_from(names))), key=order.get)
    backbone = trunk()
    net = BranchyNet(backbone, {tap: head(3 if tap == "4" else 5) for tap in taps})
    outputs = net(X)

    features, x = {"input": X}, X
    for i, block in enumerate(backbone[:4]):
        for j, layer in enumerate(block):
            x = layer(x)
            features[f"{i}.{j}"] = x
        features[str(i)] = x
    features["4"] = backbone[4](x)
    assert isinstance(outputs, tuple) and len(outputs) == net.num_exits == len(taps) + 1
    for tap, branch, output in zip(taps, net.branches, outputs, strict=False):
        assert output.equal(branch(features[tap]))
    assert outputs[-1].equal(backbone(X))
    assert not hooks(net)


def test_without_branches_there_is_one_exit():
    net = BranchyNet(trunk(), {})
    assert net.num_exits == 1 and [o.shape for o in net(X)] == [(6, 3)]


def test_a_branch_may_branch_itself_and_its_exits_take_its_place():
    twig = BranchyNet(nn.Sequential(nn.Linear(5, 5), nn.ReLU(), head()), {"input": head(), "0": head()})
    net = BranchyNet(trunk(), {"0": head(), "1": twig, "2": head()})
    outputs = net(X)
    assert net.num_exits == len(outputs) == 6
    inner = twig(net.backbone[:2](X))
    assert all(a.equal(b) for a, b in zip(outputs[1:4], inner, strict=True))
    assert outputs[0].equal(net.branches[0](net.backbone[0](X)))
    assert outputs[4].equal(net.branches[2](net.backbone[:3](X)))


class Pair(nn.Module):
    """A network of two arguments that ignores the first."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x, scale):
        return self.b(self.a(x) * scale)


def test_arguments_go_to_the_backbone_by_position_or_keyword():
    net = BranchyNet(Pair(), {"input": head(), "a": head()})
    given = net(X, 2 * X)
    for other in (net(X, scale=2 * X), net(x=X, scale=2 * X)):
        assert all(a.equal(b) for a, b in zip(given, other, strict=True))
    assert given[0].equal(net.branches[0](X))
    with pytest.raises(InputError, match="without inputs"):
        net()
    assert not hooks(net)


class Result(NamedTuple):
    hidden: torch.Tensor
    other: str = ""


@dataclass
class Logits:
    loss: float
    logits: torch.Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: y,
        lambda y: (y, "more"),
        lambda y: [y],
        lambda y: {"logits": y, "more": 1},
        lambda y: Result(y),
        lambda y: Logits(0.5, y),
    ],
)
def test_outputs_may_be_wrapped(wrap):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), Wraps()

        def forward(self, x):
            self.b(self.a(x))
            return wrap(self.a.weight[:3] @ x.T)

    class Wraps(nn.Module):
        def forward(self, x):
            return wrap(x)

    net = BranchyNet(Wrapped(), {"b": head()})
    early, last = net(X)
    assert early.equal(net.branches[0](net.backbone.a(X))) and last.shape == (3, 6)


@pytest.mark.parametrize("value", ["text", None, (), [], {}, ("text",), 3.0])
def test_outputs_without_a_tensor_are_refused(value):
    with pytest.raises(GraphError, match=f"'there' gives a {type(value).__name__}.*tap another"):
        output_tensor(value, "there")


# Refused networks


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("convv1", "no submodule 'convv1'; did you mean 'conv1'"),
        ("inputs", "did you mean 'input'"),
        ("zzzzzzz", "known names: 'input', 'conv1', 'block'"),
        ("", "no submodule ''"),
        ("block.2", "did you mean 'block.[01]'"),
    ],
)
def test_an_unknown_submodule_suggests_the_nearest(tap, message):
    backbone = nn.ModuleDict({"conv1": nn.Linear(5, 5), "block": nn.Sequential(nn.ReLU(), nn.ReLU())})
    with pytest.raises(InputError, match=message):
        BranchyNet(backbone, {tap: head()})


def test_a_branch_must_be_a_module():
    with pytest.raises(InputError, match=r"branch at '0' must be an nn\.Module; got function"):
        BranchyNet(trunk(), {"0": lambda x: x})


class Odd(nn.Module):
    """A network that runs `twice` two times, `never` not at all, and `after` only when forward has returned."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.never, self.last = (nn.Linear(5, 5) for _ in range(4))

    def forward(self, x):
        return self.last(self.twice(self.twice(self.first(x))))


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        (["twice"], "'twice' runs twice"),
        (["first", "never"], "'never' never ran"),
        (["last", "first"], r"\('last', 'first'\) but run in the order \('first', 'last'\)"),
        (["first", "input"], r"run in the order \('input', 'first'\)"),
    ],
)
def test_taps_that_do_not_run_once_in_order_are_refused(taps, message):
    net = BranchyNet(Odd(), {tap: head(5, 5) for tap in taps})
    with pytest.raises(GraphError, match=message):
        net(X)
    assert not hooks(net)


def test_hooks_go_when_a_forward_fails():
    class Fails(nn.Module):
        def forward(self, x):
            raise KeyError("own")

    for net in (
        BranchyNet(trunk(), {"0": Fails(), "1": head()}),
        BranchyNet(nn.Sequential(nn.Linear(5, 5), Fails()), {"0": head()}),
        BranchyNet(trunk(), {"0": nn.Linear(99, 3)}),
    ):
        with pytest.raises((KeyError, InputError)):
            net(X)
        assert not hooks(net)


# attach


@settings(max_examples=20, deadline=None)
@given(st.permutations(["input", "0.0", "1", "3.1"]))
def test_attach_numbers_exits_as_they_run(at):
    net = attach(trunk(), at, example=X)
    assert net.taps == ("input", "0.0", "1", "3.1")
    assert [o.shape for o in net(X)] == [(6, 3)] * 5


def test_attach_sizes_branches_from_the_example():
    message = []

    def branch(features, classes):
        message.append((tuple(features.shape), classes))
        return head(features.shape[1], classes)

    net = attach(trunk(), ["3", "0"], example=X, num_classes=3, branch=branch)
    assert message == [((2, 5), 3), ((2, 5), 3)]
    assert [o.shape for o in net(X)] == [(6, 3)] * 3


def test_attach_takes_examples_of_several_arguments():
    for example in ((X, 2 * X), {"x": X, "scale": 2 * X}, {"scale": 2 * X, "x": X}):
        net = attach(Pair(), ["a"], example=example)
        assert [o.shape for o in net(X, X)] == [(6, 3), (6, 3)]


def test_attach_leaves_the_backbone_alone():
    backbone = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    backbone[1].eval()
    modes = [m.training for m in backbone.modules()]
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    net = attach(backbone, ["1"], example=X)
    assert net.backbone is backbone and [m.training for m in backbone.modules()] == modes and not hooks(backbone)
    assert all(value.equal(before[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("at", "error", "message"),
    [
        ("0", InputError, "list of one or more different tap names; got '0'"),
        ([], InputError, r"got \[\]"),
        (["0", "0"], InputError, r"different.*\['0', '0'\]"),
        (["00"], InputError, "'00'"),
        (["never"], GraphError, "'never' never ran"),
        (["twice"], GraphError, "'twice' runs twice"),
    ],
)
def test_attach_refuses_what_cannot_be_tapped(at, error, message):
    backbone = Odd() if at in (["never"], ["twice"]) else trunk()
    with pytest.raises(error, match=message) as raised:
        attach(backbone, at, example=X)
    assert isinstance(raised.value, BranchyNetError) and not hooks(backbone)


def test_evaluating_puts_every_mode_back_even_after_an_error():
    net = trunk()
    net[1].eval()
    modes = [m.training for m in net.modules()]
    with evaluating(net):
        assert not any(m.training for m in net.modules())
    assert [m.training for m in net.modules()] == modes
    with pytest.raises(KeyError), evaluating(net):
        raise KeyError
    assert [m.training for m in net.modules()] == modes and len(set(modes)) == 2
