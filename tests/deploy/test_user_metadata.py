"""Class names and preprocessing in a file, and the message for a network that cannot be compared."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

from branchynet import BranchyNet, export, load
from branchynet.deploy.user_metadata import class_names, plain_values
from branchynet.errors import GraphError, InputError

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _brief_failures(caplog):
    caplog.set_level(logging.WARNING)


def net():
    torch.manual_seed(0)
    return BranchyNet(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), {"1": nn.Linear(8, 4)})


def test_as_many_labels_as_outputs(tmp_path):
    for labels in (["a", "b"], list("abcde"), np.array(["a", "b"])):
        with pytest.raises(InputError, match=rf"labels= names {len(labels)} classes.* has 4 outputs"):
            export(net(), tmp_path / "m.onnx", policy=None, example=X, labels=labels)
        assert not (tmp_path / "m.onnx").exists()
    with pytest.raises(InputError, match="got 'abcd': give a list of class names"):
        export(net(), tmp_path / "m.onnx", policy=None, example=X, labels="abcd")
    assert class_names(np.array(["a", "b"])) == ["a", "b"] and class_names((1, 2)) == ["1", "2"]


def test_numbers_of_numpy_and_torch_are_kept(tmp_path):
    given = {"mean": np.float32(0.5), "size": np.array([28, 28]), "std": torch.tensor([0.1, 0.25]), "n": np.int64(3)}
    path = export(net(), tmp_path / "m.onnx", policy=None, example=X, preprocessing=given, labels=tuple("abcd"))
    engine = load(path, threads=1)
    kept = engine.metadata["preprocessing"]
    assert kept == {"mean": 0.5, "size": [28, 28], "std": pytest.approx([0.1, 0.25]), "n": 3}
    assert engine.labels == ("a", "b", "c", "d")


@pytest.mark.parametrize("value", [{"f": len}, {"n": nn.Identity()}, {("a", 1): 2}, {"s": {1, 2}}])
def test_values_that_json_cannot_store_are_refused(value):
    with pytest.raises(InputError, match="preprocessing= cannot be kept"):
        plain_values(value)


class Adrift(nn.Module):
    """Answers otherwise with every call, behind features that hardly differ: `gain` makes much of their rounding."""

    def __init__(self, gain):
        super().__init__()
        self.linear, self.gain, self.calls = nn.Linear(6, 4), gain, 0

    def forward(self, x):
        self.calls += 1
        return (1 + self.linear(x) / self.gain - 1) * self.gain + self.calls


@pytest.mark.parametrize(("gain", "magnifies"), [(1.0, False), (1e9, True)])
def test_a_network_that_magnifies_rounding_is_named(gain, magnifies, tmp_path):
    class Counted(Adrift):
        def __deepcopy__(self, memo):
            twin = Adrift(self.gain)
            twin.load_state_dict(self.state_dict())
            twin.calls = self.calls - len(X)  # so that it repeats its earlier outputs
            return twin

    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 6), Counted(gain))
    with pytest.raises(GraphError) as raised:
        export(backbone, tmp_path / "m.onnx", policy=None, example=X)
    assert ("magnifies rounding" in str(raised.value)) == magnifies
