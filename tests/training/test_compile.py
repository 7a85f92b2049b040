"""Training with compiled parts: which parts, and the weights that they reach."""

import functools

import pytest
import torch
from torch import nn

from branchynet import BranchyNet
from branchynet.errors import InputError
from branchynet.training import context
from branchynet.training.context import compiled
from branchynet.training.options import FitOptions
from helpers.training_runs import loader, make, quiet, state


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize(
    ("taps", "parts"),
    [
        ([], [""]),
        (["input"], [""]),
        (["stem"], ["stem", "blocks.0", "blocks.1", "blocks.2", "head"]),
        (["blocks.1"], ["stem", "blocks.0", "blocks.1", "blocks.2", "head"]),
        (["blocks.0", "blocks.1.0"], ["stem", "blocks.0", "blocks.1.0", "blocks.1.1", "blocks.2", "head"]),
    ],
)
def test_parts_are_the_largest_without_taps_inside(taps, parts, monkeypatch):
    """With functions that count their calls in place of compiled ones; a tree of branches is taken apart too."""
    ran = []

    def counting(forward):
        return lambda *args: ran.append(forward.__self__) or forward(*args)

    monkeypatch.setattr(context.torch, "compile", counting)
    backbone = Nested()
    tree = BranchyNet(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), {"0": nn.Linear(4, 3)})
    branches = [tree, *(nn.Linear(4, 3) for _ in taps[1:])][: len(taps)]
    net = BranchyNet(backbone, dict(zip(taps, branches, strict=True)))
    names = {id(module): name for name, module in backbone.named_modules()}
    inside = [tree.backbone[0], tree.backbone[1], tree.branches[0]] if taps else []
    expected = net.eval()(torch.ones(2, 4))
    with compiled(net):
        found = net(torch.ones(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [names[id(module)] for module in ran if id(module) in names] == parts
    others = [id(module) for module in ran if id(module) not in names]
    assert sorted(others) == sorted(map(id, [*inside, *branches[1:]]))
    del ran[:]
    net(torch.ones(2, 4))
    assert ran == [] and not any("forward" in module.__dict__ for module in net.modules())


def test_a_forward_of_the_callers_own_is_restored(monkeypatch):
    monkeypatch.setattr(context.torch, "compile", lambda forward: lambda *args: forward(*args) + 1)
    net = nn.Linear(2, 2)
    own = net.forward = lambda x: x * 2
    with pytest.raises(KeyError), compiled(net):
        assert net(torch.ones(1, 2)).tolist() == [[3.0, 3.0]]
        raise KeyError
    assert net.forward is own


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # both come from torch's compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_compiled_training_reaches_the_same_weights():
    """Compiled kernels add in another order; SGD, because Adam makes full steps of rounding errors.

    Without dropout, for which compiled kernels draw other numbers.
    """
    nets = [make(), make()]
    for net, compile in zip(nets, (False, True), strict=True):
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        quiet(net, loader(), loader(), epochs=1, compile=compile, optimizer=functools.partial(torch.optim.SGD, lr=0.05))
    for name, value in state(nets[0]).items():
        torch.testing.assert_close(value, nets[1].state_dict()[name], rtol=1e-4, atol=1e-5)


def test_an_unknown_value_is_named():
    with pytest.raises(InputError, match=r"compile must be .*bool; got 'max-autotune': give True or False"):
        FitOptions(compile="max-autotune")
