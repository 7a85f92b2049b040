"""The PyTorch engine refuses wrong inputs, thresholds, policies and networks."""

import numpy as np
import pytest
import torch
from torch import nn

from branchynet import BranchyNet, Policy
from branchynet.deploy.torch_engine import TorchEngine
from branchynet.errors import GraphError, InputError
from helpers.networks import build, draw, two_inputs


@pytest.fixture(scope="module")
def engine():
    net, example = build(two_inputs, 0)
    return TorchEngine(net, Policy(thresholds=(1.0, 1.0)), draw(example, 8, 0))


IMAGE, VECTOR = np.zeros((3, 2, 8, 8), np.float32), np.zeros((3, 5), np.float32)


@pytest.mark.parametrize(
    ("given_as", "message"),
    [
        ([], "0 inputs given.*reads 2: image: float32"),
        ([IMAGE], "1 inputs given.*reads 2"),
        ([IMAGE, VECTOR, VECTOR], "3 inputs given"),
        ([IMAGE[:, :1], VECTOR], r"'image' is float32 \(3, 1, 8, 8\).*image: float32 \(B, 2, 8, 8\)"),
        ([IMAGE, torch.zeros(3, 4)], r"'vector' is float32 \(3, 4\)"),
        ([IMAGE[0], VECTOR[0]], r"'image' is float32 \(2, 8, 8\)"),
        ([IMAGE, np.float32(1)], "'vector' is float32"),
        ([IMAGE.astype(np.float64), VECTOR], "'image' is float64"),
        ([IMAGE, torch.zeros(3, 5).double()], r"'vector' is float64 \(3, 5\)"),
        ([IMAGE, VECTOR.astype(np.int64)], "'vector' is int64"),
        ([IMAGE, VECTOR.astype(">f4")], "'vector' is >f4"),
        ([IMAGE, VECTOR.tolist()], "'vector' is list"),
        ([IMAGE, VECTOR[:2]], r"batch sizes \[3, 2\]"),
        ([IMAGE[:0], VECTOR], r"batch sizes \[0, 3\]"),
    ],
)
def test_wrong_inputs_are_named(engine, given_as, message):
    with pytest.raises(InputError, match=message):
        engine(*given_as)


@pytest.mark.parametrize(
    ("given_as", "message"),
    [
        ((), "0 thresholds given for 3 exits; give 2"),
        ((0.5,) * 3, "3 thresholds"),
        (0.5, "must be a list; got 0.5"),
        (("low", "high"), "must be numbers.*'low'"),
        ((float("nan"), 0.5), "nan"),
    ],
)
@pytest.mark.parametrize("rows", [0, 3])
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
