"""The PyTorch engine refuses wrong inputs, thresholds, policies and networks."""

import pytest
import torch
from torch import nn

from branchynet import BranchyNet, Policy
from branchynet.deploy.torch_engine import TorchEngine
from branchynet.errors import GraphError, InputError
from helpers.networks import build, draw, two_inputs
from helpers.wrong_calls import IMAGE, VECTOR, WRONG_INPUTS, WRONG_THRESHOLDS


@pytest.fixture(scope="module")
def engine():
    net, example = build(two_inputs, 0)
    return TorchEngine(net, Policy(thresholds=(1.0, 1.0)), draw(example, 8, 0))


@pytest.mark.parametrize(("given_as", "message"), WRONG_INPUTS)
def test_wrong_inputs_are_named(engine, given_as, message):
    with pytest.raises(InputError, match=message):
        engine(*given_as)


@pytest.mark.parametrize(("given_as", "message", "rows"), WRONG_THRESHOLDS)
def test_wrong_thresholds_are_named(engine, given_as, message, rows):
    with pytest.raises(InputError, match=message):
        engine(IMAGE[:rows], VECTOR[:rows], thresholds=given_as)


class Mixed(nn.Module):
    """A layer that mixes the samples of a batch."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        h = self.fc(x)
        return h - h.mean(0)


@pytest.mark.parametrize("place", [0, 1])
def test_samples_that_depend_on_each_other_are_refused(place):
    layers = [nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)]
    layers[place] = Mixed()
    net = BranchyNet(nn.Sequential(*layers), {"0": nn.Linear(6, 4)})
    with pytest.raises(GraphError, match=rf"exit {place + 1} differ by .* from .*same row alone.*other samples"):
        TorchEngine(net, Policy(thresholds=(1.0,)), torch.randn(4, 6))


def test_wrong_policies_are_named_before_any_export():
    net, example = build(two_inputs, 0)
    with pytest.raises(InputError, match="1 thresholds; 3 exits need 2"):
        TorchEngine(net, Policy(thresholds=(1.0,)), example)
