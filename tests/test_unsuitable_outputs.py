"""Outputs and targets that cannot be recorded, scored or trained are refused with the remedy."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from branchynet import (
    BranchyNet,
    Policy,
    attach,
    export,
    fit,
    joint_loss,
    measure,
    record,
)
from branchynet.errors import GraphError, InputError
from branchynet.policy.scores import SCORES
from branchynet.training.options import FitOptions
from helpers.tasks import disagreement, hamming, linear, squashed

RECORDED = [(torch.rand(4, 3), torch.rand(4, 2))]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"labels must be integers.*float32 of shape \(4, 2\).*loss="),
        ({"score": "margin"}, r"score='margin' is for records with loss="),
        ({"loss": F.mse_loss}, r"loss= gives \(\) for outputs \(4, 2\) at exit 1.*\(4,\)"),
        ({"loss": lambda o, t: (o - t).abs()}, r"loss= gives \(4, 2\)"),
        ({"loss": lambda o, t: 0.5}, r"loss= gives float"),
        ({"loss": lambda o, t: o.new_full((4,), 1.5)}, r"loss= gives 1.5 at exit 1; losses must lie in \[0, 1\]"),
        ({"loss": lambda o, t: o.new_full((4,), -0.1)}, r"gives -0.1"),
        ({"loss": lambda o, t: o.new_full((4,), math.nan)}, r"gives nan"),
        ({"loss": hamming, "score": lambda outputs: outputs[-1]}, r"score= gives \(4, 2\)"),
        ({"loss": hamming, "score": "entrpy"}, r"did you mean 'entropy'"),
    ],
)
def test_what_cannot_be_recorded_is_named_at_the_first_batch(given, message):
    def endless():
        yield RECORDED[0]
        raise AssertionError("a second batch was asked for")

    with pytest.raises(InputError, match=message):
        record(linear(), endless(), progress=False, **given)


def test_nan_outputs_and_shapes_that_differ_are_named():
    with pytest.raises(InputError, match="exit 1 gives NaN"):
        record(linear(), [(torch.full((4, 3), math.nan), torch.rand(4, 2))], loss=hamming, progress=False)
    net = BranchyNet(nn.Conv2d(1, 2, 1), {"input": nn.AvgPool2d(2)})
    with pytest.raises(
        InputError, match=r"exit 1: \(1, 1, 2, 2\), exit 2: \(1, 2, 4, 4\); give every branch the shape"
    ):
        record(net, [(torch.rand(1, 1, 4, 4), torch.zeros(1))], loss=hamming, progress=False)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("shape", [(4, 1), (4, 1, 3, 3), (4,)])
def test_named_scores_refuse_what_has_no_classes(name, shape):
    """The entropy of one output is always 0: every sample would leave at exit 1."""
    with pytest.raises(InputError, match=r"do not have two classes in dimension 1.*callable"):
        SCORES[name]((torch.zeros(shape),))


def test_the_default_score_is_refused_for_one_number_at_every_step(tmp_path):
    net, x = linear(1), torch.rand(4, 3)
    with pytest.raises(InputError, match="callable"):
        record(net, [(x, torch.rand(4, 1))], loss=squashed, progress=False)
    with pytest.raises(InputError, match="callable"):
        measure(net, x, seconds=0.01)
    with pytest.raises(InputError, match="callable"):
        export(net, tmp_path / "model.onnx", policy=Policy(thresholds=(0.5,)), example=x)


def test_dense_branches_of_another_size_are_named():
    with pytest.raises(InputError, match=r"exit 1 .*\(2, 3, 2, 2\).*\(2, 3, 4, 4\); give every branch the shape"):
        joint_loss((torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 4, 4)), torch.zeros(2, 4, 4, dtype=torch.int64))


class Bare(nn.Module):
    """A common form of regression network."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(3, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.head(torch.relu(self.hidden(x))).squeeze(1)


def test_outputs_without_a_dimension_of_their_own_are_refused_with_the_remedy(tmp_path):
    x, y = torch.rand(4, 3), torch.rand(4, 1)
    with pytest.raises(InputError, match=r"output has shape \(2,\).*output=lambda y: y.unsqueeze\(1\)"):
        attach(Bare(), ["hidden"], example=x)
    net = BranchyNet(Bare(), {"hidden": nn.Linear(8, 1)})
    with pytest.raises(InputError, match=r"\(4, 1\), but the last exit \(4,\)"):
        joint_loss(net(x), y, loss=F.mse_loss)
    with pytest.raises(InputError, match=r"exit 2: \(4,\).*unsqueeze\(1\)"):
        record(net, [(x, y)], loss=squashed, score=disagreement, progress=False)
    with pytest.raises(GraphError, match=r"one number per sample as \(B, 1\)"):
        export(net, tmp_path / "model.onnx", policy=Policy(disagreement, (0.5,)), example=x)


def test_the_remedy_helps():
    x, y = torch.rand(4, 3), torch.rand(4, 1)
    backbone = Bare()
    net = attach(backbone, ["hidden"], example=x, output=lambda y: y.unsqueeze(1))
    fit(net, [(x, y)], epochs=1, loss=F.mse_loss, progress=False, options=FitOptions(device="cpu"))
    made = record(net, [(x, y)], loss=squashed, score=disagreement, progress=False)
    expected = [[squashed(o[i : i + 1], y[i : i + 1]).item() for o in net(x)] for i in range(4)]
    np.testing.assert_allclose(made.losses, expected, atol=1e-6)
    torch.testing.assert_close(net(x)[-1].squeeze(1), backbone(x))
