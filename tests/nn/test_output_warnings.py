"""Warnings for probabilities instead of logits, and for outputs that exits ignore."""

import logging
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from branchynet import BranchyNet, Policy, attach, export, fit, load, record
from branchynet.losses import pixel_error
from branchynet.nn.output_warnings import are_probabilities
from branchynet.training.options import FitOptions


@pytest.fixture(autouse=True)
def _brief_failures(caplog):
    caplog.set_level(logging.WARNING)


def net(*ends, backbone_end=None):
    """A chain with one branch per end; an end is the module after a branch's linear layer."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4), backbone_end or nn.Identity()]
    taps = dict(zip(("1", "3"), ends, strict=False))
    return BranchyNet(nn.Sequential(*layers), {tap: nn.Sequential(nn.Linear(8, 4), end) for tap, end in taps.items()})


X, Y = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 4
LOADER = [(X[:8], Y[:8]), (X[8:], Y[8:])]
VERBS = {
    "fit": lambda net, folder: fit(net, LOADER, LOADER, epochs=2, progress=False, options=FitOptions(device="cpu")),
    "record": lambda net, folder: record(net, LOADER, progress=False),
    "export": lambda net, folder: export(
        net, folder / "m.onnx", policy=Policy(thresholds=(0.5,) * (net.num_exits - 1)), example=X[:3]
    ),
}


def message(action):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        action()
    return [w for w in found if issubclass(w.category, UserWarning) and "give" in str(w.message)]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("made", "exits"),
    [
        (lambda: net(nn.Softmax(1)), "exit 1 gives"),
        (lambda: net(nn.Identity(), nn.Softmax(-1)), "exit 2 gives"),
        (lambda: net(nn.Identity(), backbone_end=nn.Softmax(1)), "exit 2 gives"),
        (lambda: net(nn.Softmax(1), nn.Softmax(1), backbone_end=nn.Softmax(1)), "exits 1, 2, 3 give"),
    ],
    ids=["branch", "second", "last", "all"],
)
def test_probabilities_are_warned_of_once(verb, made, exits, tmp_path):
    (warning,) = message(lambda: VERBS[verb](made(), tmp_path))
    assert f"{exits} probabilities" in str(warning.message) and "logits" in str(warning.message)
    assert warning.filename == __file__  # the user's line


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("end", [nn.Identity, lambda: nn.LogSoftmax(1), nn.Sigmoid, nn.ReLU])
def test_other_outputs_are_not(verb, end, tmp_path):
    assert not message(lambda: VERBS[verb](net(end(), backbone_end=end()), tmp_path))


def test_what_a_users_own_score_makes_of_probabilities_is_theirs(tmp_path):
    def own(outputs):
        return 1 - outputs[-1].amax(dim=1)

    simplex = net(nn.Softmax(1), backbone_end=nn.Softmax(1))
    policy = Policy(score=own, thresholds=(0.5,))
    assert not message(lambda: export(simplex, tmp_path / "m.onnx", policy=policy, example=X[:3]))

    def error(output, target):
        return (output.argmax(dim=1) != target).float()

    assert not message(lambda: record(simplex, LOADER, loss=error, score=own, progress=False))
    assert message(lambda: record(simplex, LOADER, loss=error, score="margin", progress=False))


def test_a_plain_network_may_answer_in_probabilities(tmp_path):
    plain = nn.Sequential(nn.Linear(6, 4), nn.Softmax(1))
    path = None

    def flat():
        nonlocal path
        path = export(plain, tmp_path / "m.onnx", policy=None, example=X[:3])

    assert not message(flat)
    np.testing.assert_allclose(load(path, threads=1).outputs(X.numpy())[1].sum(axis=1), 1, atol=1e-5)


def test_the_remedy_works(tmp_path):
    """Logarithms of probabilities are logits: labels are equal, and entropies come near 0."""
    sharp = net(nn.Softmax(1), backbone_end=nn.Softmax(1))
    with torch.no_grad():
        sharp.branches[0][0].weight.mul_(100)
    cured = BranchyNet(
        sharp.backbone, {"1": nn.Sequential(sharp.branches[0][0], nn.LogSoftmax(1))}, output=torch.log
    ).eval()
    assert not message(lambda: export(cured, tmp_path / "m.onnx", policy=Policy(thresholds=(0.5,)), example=X[:3]))
    assert (load(tmp_path / "m.onnx", threads=1)(X.numpy()).exit == 1).sum() > 6
    with torch.no_grad():
        assert all(torch.equal(a.argmax(1), b.argmax(1)) for a, b in zip(sharp(X), cured(X), strict=True))


def test_maps_of_probabilities_and_half_precision():
    maps = torch.randn(3, 5, 4, 4)
    assert are_probabilities(maps.softmax(1)) and not are_probabilities(maps.softmax(2))
    assert are_probabilities(torch.randn(9, 300).bfloat16().softmax(1)) and not are_probabilities(maps)
    assert not are_probabilities(torch.ones(3, 1)) and not are_probabilities(torch.tensor([[0, 1], [1, 0]]))
    dense = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Softmax(1))
    target = torch.zeros(4, 5, 5, dtype=torch.long)
    loader = [(torch.randn(4, 2, 5, 5), target)]
    assert message(lambda: record(dense, loader, loss=pixel_error, progress=False))
    assert message(lambda: fit(dense, loader, epochs=1, progress=False, options=FitOptions(device="cpu")))


class Detector(nn.Module):
    """A network of classes and boxes, combined by `returns`."""

    def __init__(self, returns):
        super().__init__()
        self.body, self.classes, self.boxes, self.returns = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 4), returns

    def forward(self, x):
        features = torch.tanh(self.body(x))
        return self.returns(self.classes(features), self.boxes(features))


FURTHER = {
    "tuple": (lambda classes, boxes: (classes, boxes), r"entry 2 \(B, 4\)"),
    "dict": (lambda classes, boxes: {"scores": classes, "boxes": boxes}, r"'boxes' \(B, 4\)"),
    "logits": (lambda classes, boxes: types.SimpleNamespace(boxes=boxes, logits=classes), r"'boxes' \(B, 4\)"),
    "maps": (lambda classes, boxes: [classes, boxes[:, :, None, None]], r"entry 2 \(B, 4, 1, 1\)"),
}


@pytest.mark.parametrize("kind", FURTHER)
def test_further_outputs_are_told(kind, tmp_path):
    returns, shown = FURTHER[kind]
    with pytest.warns(UserWarning, match=rf"backbone's output holds more than the answer \(B, 3\): {shown}.*output="):
        attach(Detector(returns), ["body"], example=X)
    with pytest.warns(UserWarning, match=rf"network's output holds more than the answer \(B, 3\): {shown}"):
        export(Detector(returns), tmp_path / "m.onnx", policy=None, example=X[:3])
    with pytest.warns(UserWarning, match=shown):
        record(Detector(returns), [(X, Y % 3)], progress=False)


@pytest.mark.parametrize("kind", FURTHER)
def test_further_outputs_are_told_once_a_verb(kind, tmp_path):
    """For all batch sizes: Python's filter shows the same text of a line once."""
    net = Detector(FURTHER[kind][0])
    verbs = (
        lambda: export(net, tmp_path / "m.onnx", policy=None, example=X[:3]),
        lambda: record(net, [(X, Y % 3), (X[:2], Y[:2] % 3)], progress=False),
    )
    for verb in verbs:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("default")
            verb()
        assert len([w for w in seen if "holds more than the answer" in str(w.message)]) == 1


@pytest.mark.parametrize(
    "returns",
    [
        lambda classes, boxes: {"loss": boxes.mean(), "logits": classes, "hidden": None, "layers": (boxes,)},
        lambda classes, boxes: (classes,),
        lambda classes, boxes: types.SimpleNamespace(logits=classes, names=["a"], scale=boxes[:1, 0]),
    ],
    ids=["by the way", "alone", "no row a sample"],
)
def test_what_is_no_further_output_is_not_told(returns):
    def answer(returned):
        return returned["logits"] if isinstance(returned, dict) else returned[0]

    output = None if isinstance(returns(X[:, :3], X), types.SimpleNamespace) else answer
    attach(Detector(returns), ["body"], example=X, output=output)  # warnings are errors here


def test_saying_which_output_is_meant_silences_the_warning(tmp_path):
    returns, _ = FURTHER["tuple"]
    chosen = attach(Detector(returns), ["body"], example=X, output=lambda returned: returned[1])
    assert chosen(X)[-1].shape == (12, 4)
    export(chosen, tmp_path / "m.onnx", policy=Policy(thresholds=(0.5,)), example=X[:3])
