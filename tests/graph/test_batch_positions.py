"""Values that depend only on the number of samples, such as positions in the batch, are recomputed per stage."""

import onnx_ir as ir
import pytest
import torch
from torch import nn

from branchynet import BranchyNet, Policy, load
from branchynet.deploy.assembly import assemble
from branchynet.deploy.torch_engine import TorchEngine
from branchynet.graph.cut import Dependence
from branchynet.graph.onnx_flat import flatten
from branchynet.policy.scores import entropy
from helpers.loop import agree_everywhere, every_exit
from helpers.networks import spread_out


class Looks(nn.Module):
    """Three layers; each looks up one feature of its row, with positions that `look` computes before the first exit."""

    def __init__(self, look):
        super().__init__()
        torch.manual_seed(0)
        self.look = look
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.f = nn.Linear(6, 4)

    def forward(self, x):
        chosen = x.argmax(1)
        look = self.look(x, chosen)
        for layer in self.layers:
            x = torch.tanh(layer(x))
            x = x + look(x)
        return self.f(x)


def rows(make):
    """Index with pairs of a row and a column."""

    def look(x, chosen):
        places = make(x)
        return lambda y: y[places, chosen][:, None]

    return look


def flat(make):
    """Index into the flattened rows."""

    def look(x, chosen):
        index = make(torch.arange(x.shape[0]), x.shape[1], chosen)
        return lambda y: y.reshape(-1)[index][:, None]

    return look


def features(x, chosen):
    """Features that depend only on the batch size, also through costly operators."""
    same = torch.ones(x.shape[0], 6) @ torch.full((6, 6), 0.01)
    return lambda y: same + same.cumsum(1) * 0.1


def masks(x, chosen):
    """Masks and row numbers; the positions do not change the result."""
    places = torch.arange(x.shape[0])
    mask = (places >= 0)[:, None] & (x > 0)
    counts = (1.0 - (x > 0).float()) * 0.1 + 0.0 * places.float()[:, None]
    return lambda y: torch.where(mask, y, -y) * 0.1 + counts


LOOKS = {
    "arange": rows(lambda x: torch.arange(x.shape[0])),
    "cumsum of ones": rows(lambda x: torch.ones(x.shape[0], dtype=torch.long).cumsum(0) - 1),
    "cumsum of ones like": rows(lambda x: torch.ones_like(x[:, 0]).cumsum(0).long() - 1),
    "floats": rows(lambda x: (torch.arange(x.shape[0]).float() * 2).long() // 2),
    "eye": rows(lambda x: torch.eye(x.shape[0]).argmax(1)),
    "comparison": rows(lambda x: (torch.arange(x.shape[0])[:, None] > torch.arange(x.shape[0])).sum(1)),
    "triangle": rows(lambda x: torch.ones(x.shape[0], x.shape[0]).tril().sum(1).long() - 1),
    "twice around": rows(lambda x: (x.shape[0] - 1 - torch.arange(x.shape[0])).flip(0)),
    "merged": flat(lambda places, width, chosen: places * width + chosen),
    "merged floats": flat(lambda places, width, chosen: (places.float() * width + chosen.float()).long()),
    "features": features,
    "masks": masks,
}


@pytest.mark.parametrize("look", LOOKS)
def test_every_batch_that_stays_has_places_of_its_own(look, tmp_path):
    net = BranchyNet(Looks(LOOKS[look]), {"layers.0": nn.Linear(6, 4), "layers.1": nn.Linear(6, 4)}).eval()
    x = torch.randn(43, 6, generator=torch.Generator().manual_seed(1))
    spread_out(net, (x,))
    outputs, policy = every_exit(net, (x,)), Policy(thresholds=(0.5, 0.5))
    ir.save(
        assemble(flatten(net, x[:1], score=entropy), policy), tmp_path / "model.onnx"
    )  # the example has a single row
    for engine in (load(tmp_path / "model.onnx", threads=1), TorchEngine(net, policy, x[:1])):
        agree_everywhere(engine, (x.numpy(),), outputs)


def test_dependence_by_hand():
    made = Dependence(["x", "ids"], ["ids"])
    made.add("size", ["x"], ["x"], number=True, measures=True)
    made.add("ones", ["size"], [], number=None)
    made.add("bag", ["ones", "weight"], ["ones", "weight"], number=None, costly=True)
    made.add("wide", ["bag"], ["bag"], number=None)
    made.add("same", ["weight"], ["weight"], number=None)
    made.add("places", ["size"], ["size"], number=True)
    made.add("index", ["places", "ids"], ["places", "ids"], number=True)
    made.add("float", ["index"], ["index"], number=None)
    made.add("shaped", ["ids", "size"], ["ids"], number=True)
    made.add("feature", ["x", "places"], ["x", "places"], number=None)
    made.add("looked up", ["x", "index"], ["x"], number=False)
    made.add("mask", ["places", "x"], ["places", "x"], number=False)
    made.add("again", ["mask", "places"], ["mask", "places"], number=None)
    assert made.size == {"size", "ones", "bag", "wide", "places"} and not made.varies("same")
    assert made.recomputed == {"size", "ones", "wide", "places", "index", "float"}
    assert made.samples == {"x", "ids", "index", "float", "shaped", "feature", "looked up", "mask", "again"}
