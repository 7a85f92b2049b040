"""The PyTorch engine refuses wrong inputs, thresholds, policies and networks."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from branchynet import BranchyNet, Choice, Engine, ExitRecord, Policy, StagedEngine, evaluate, export, load
from branchynet.deploy import torch_engine
from branchynet.deploy.torch_engine import TorchEngine
from branchynet.errors import GraphError, InputError
from branchynet.nn.fingerprint import fingerprint
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


def test_a_choice_serves_as_policy_and_a_stale_one_is_refused():
    net, example = build(two_inputs, 0)
    other, _ = build(two_inputs, 1)
    policy = Policy(thresholds=(0.5, None))
    outcome = evaluate(ExitRecord(np.eye(3)[:, None, :].repeat(3, axis=1), np.arange(3)), policy)
    choice = Choice(policy, {"max_drop": 0.5}, outcome, "0" * 16, None, fingerprint(net))
    assert TorchEngine(net, choice, example).policy == policy
    with pytest.raises(InputError, match="the network and the choice are of different networks"):
        TorchEngine(other, choice, example)
    for wrong in ((0.5, None), example, None):
        with pytest.raises(InputError, match=r"policy must be a Policy; .*what choose\(\.\.\.\) returns"):
            TorchEngine(net, wrong, example)


def test_the_example_is_asked_for():
    net, _ = build(two_inputs, 0)
    with pytest.raises(InputError, match="TorchEngine needs an example: give one batch of inputs"):
        TorchEngine(net, Policy(thresholds=(1.0, 1.0)))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("answer_all", "call the engine itself, once per batch"),
        ("outputs", "only engines of files have it"),
        ("stream", "export.*layout='stages'"),
        ("stage", "export.*layout='stages'"),
        ("anything", "no attribute 'anything'$"),
    ],
)
def test_methods_of_other_engines_are_hinted_at(engine, name, hint, tmp_path):
    assert not hasattr(engine, name)
    with pytest.raises(AttributeError, match=hint):
        getattr(engine, name)
    net, example = build(two_inputs, 0)
    nested = load(export(net, tmp_path / "net.onnx", policy=None, example=example), threads=1)
    if name in ("stream", "stage", "anything"):
        with pytest.raises(AttributeError, match=f"'Engine' object .*{hint}"):
            getattr(nested, name)
    assert pickle.loads(pickle.dumps(nested)).num_exits == copy.deepcopy(nested).num_exits == 3


def test_every_method_of_another_engine_has_a_hint(engine):
    """Whatever an engine of files or stages offers, and this one does not, is in the table of hints."""
    offered = {name for kind in (Engine, StagedEngine) for name in vars(kind) if not name.startswith("_")}
    assert {name for name in offered if not hasattr(engine, name)} <= set(torch_engine._INSTEAD)
