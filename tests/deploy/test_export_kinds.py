"""Export of networks and scores of many kinds, and of flat files."""

import copy

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from branchynet.deploy.exporting import export
from branchynet.deploy.loading import load
from branchynet.graph.free_program import input_names
from branchynet.graph.onnx_flat import flatten
from branchynet.graph.torch_program import tensors_of
from branchynet.nn.network import BranchyNet
from branchynet.policy.scores import entropy
from branchynet.policy.values import Policy
from helpers.chains import TWO, Chain, alone, branchy, inputs

# Networks and scores of other kinds


def test_a_score_of_ones_own_may_read_the_earlier_exits(tmp_path):
    def changed_its_mind(outputs):
        """Patience: 1 - p of the latest answer, or 2 where it is not the answer of the exit before."""
        if len(outputs) == 1:
            return torch.full_like(outputs[0][:, 0], 2.0)
        differs = outputs[-1].argmax(1) != outputs[-2].argmax(1)
        return torch.where(differs, 2.0, 1 - torch.softmax(outputs[-1], 1).amax(1))

    net, x = branchy(), inputs(64, seed=1)
    outputs = alone(net, x)
    agree = outputs[0].argmax(1) == outputs[1].argmax(1)
    sure = 1 - torch.softmax(torch.tensor(outputs[1]), 1).amax(1).numpy()
    middle = float(np.median(sure[agree]))
    policy = Policy(changed_its_mind, (1.5, middle))
    path = export(net, tmp_path / "model.onnx", policy=policy, example=x)
    expected = np.where(agree & (sure < middle), 2, 3)
    assert 0 < (expected == 2).sum() < agree.sum() < 64
    engine = load(path, threads=1)
    clear = np.abs(sure - middle) > 1e-5
    for batch in (1, 5, 64):
        for start in range(0, 64 - batch + 1, batch):
            rows = slice(start, start + batch)
            answer = engine(x[rows].numpy())
            assert (answer.exit == expected[rows])[clear[rows]].all()
            want = outputs[answer.exit - 1, np.arange(64)[rows]]
            np.testing.assert_allclose(answer.output, want, atol=1e-4)
    assert engine.policy.score == "changed_its_mind"
    (tmp_path / "one").mkdir()
    one = load(export(net, tmp_path / "one" / "model.onnx", policy=policy, example=x, free="none"), threads=1)
    answers = [int(one(x[i : i + 1].numpy()).exit[0]) for i in range(16)]
    assert answers == expected[:16].tolist()


class Pixels(nn.Module):
    """An answer for every pixel, which ends in a ReLU after pooling."""

    def __init__(self):
        super().__init__()
        self.stem, self.pool, self.deeper = nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.Conv2d(3, 3, 1)
        self.last = nn.MaxPool2d(3, 1, 1)

    def forward(self, x):
        x = self.pool(self.stem(x))
        return torch.relu(self.last(self.deeper(torch.relu(x))))


def test_an_output_per_pixel_with_one_score_per_image(tmp_path):
    torch.manual_seed(0)
    # ReLU reads the tap too, so ReLU and pooling must not change places there; at the end they may.
    net, x = BranchyNet(Pixels(), {"pool": nn.Identity()}).eval(), torch.randn(16, 2, 9, 7)
    outputs = alone(net, x)

    def unsure(outputs):
        return entropy((outputs[-1],))

    scores = unsure((torch.tensor(outputs[0]),)).numpy()
    order = scores.argsort()
    policy = Policy(unsure, (float(scores[order[6:8]].mean()),))
    answer = load(export(net, tmp_path / "model.onnx", policy=policy, example=x), threads=1)(x.numpy())
    assert answer.exit.tolist() == np.where(scores < policy.thresholds[0], 1, 2).tolist()
    assert (answer.exit == 1).sum() == 7
    np.testing.assert_allclose(answer.output, outputs[answer.exit - 1, np.arange(16)], atol=1e-5)
    assert answer.label.shape == (16, 3, 2) and (outputs[0] < 0).any()
    np.testing.assert_array_equal(answer.label, answer.output.argmax(axis=1))
    flat = load(export(net, tmp_path / "flat.onnx", policy=None, example=x), threads=1)
    np.testing.assert_allclose(flat.outputs(x.numpy())[1:], outputs, atol=1e-5)


def test_exits_with_the_same_value(tmp_path):
    """Branches may be merged with each other and with the trunk, and still every exit has its own output."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 4)
    backbone = nn.Sequential(nn.Identity(), linear, nn.Identity())
    net = BranchyNet(backbone, {"0": copy.deepcopy(linear), "1": nn.Identity()})
    flat = flatten(net, inputs(2), score=entropy)
    assert [v.name for v in flat.model.graph.outputs] == [f"{k}_{n}" for k in ("output", "score") for n in (1, 2, 3)]
    for free in ("batch", "none"):
        policy = Policy(thresholds=(0.0, 9.0))
        path = export(net, tmp_path / "model.onnx", policy=policy, example=inputs(2), free=free)
        onnx.checker.check_model(path, full_check=True)
        answer = load(path, threads=1)(inputs(1).numpy())
        assert answer.exit.tolist() == [2]
        np.testing.assert_allclose(answer.output, linear(inputs(1)).detach(), atol=1e-6)


def test_double_precision_networks_give_float32(tmp_path):
    net, x = branchy().double(), inputs().double()
    answer = load(export(net, tmp_path / "model.onnx", policy=TWO, example=x), threads=1)(x.numpy())
    assert answer.output.dtype == answer.score.dtype == np.float32
    want = alone(net, x)[answer.exit - 1, np.arange(8)]
    np.testing.assert_allclose(answer.output, want, atol=1e-5)


class Named(nn.Module):
    """Inputs, submodules and parameters with the names that the file uses itself."""

    def __init__(self):
        super().__init__()
        self.label, self.exit, self.score = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)
        self.threshold_1 = nn.Parameter(torch.ones(8))
        self.register_buffer("output", torch.ones(8))

    def forward(self, threshold_1, output, linear, exit, threshold_map, output_1, exits=None):
        x = self.label(threshold_1 + 2 * output + 3 * linear + 4 * exit + 5 * threshold_map + 6 * output_1)
        return self.score(self.exit(F.threshold(F.threshold(x, 0.1, 0.0), 0.2, 0.0) * self.threshold_1 + self.output))


@pytest.mark.parametrize("keywords", [False, True])
def test_networks_may_use_the_names_that_the_file_uses(keywords, tmp_path):
    torch.manual_seed(0)
    net = BranchyNet(Named(), {"label": nn.Linear(8, 4)})
    example = tuple(inputs(8, seed) for seed in range(6))
    names = ["threshold_1", "output", "linear", "exit", "threshold_map", "output_1"]
    given = dict(zip(names, example, strict=True)) if keywords else example
    policy = Policy(thresholds=(1.2,))
    with pytest.warns(UserWarning, match=r"'threshold_1' as 'threshold_1_', .*'output_1' as 'output_1_'.*by that name"):
        path = export(net, tmp_path / "model.onnx", policy=policy, example=given)
    onnx.checker.check_model(path, full_check=True)
    engine = load(path, threads=1)
    renamed = ["threshold_1_", "output_", "linear", "exit_", "threshold_map", "output_1_"]
    assert [i.name for i in engine.inputs] == renamed
    answer = engine(*(t.numpy() for t in example))
    with torch.no_grad():
        every = torch.stack(net(*example)).numpy()
    np.testing.assert_allclose(answer.output, every[answer.exit - 1, np.arange(8)], atol=1e-4)


def test_input_names_are_the_networks_own_and_never_clash():
    class Many(nn.Module):
        def forward(self, output_, output, label, *more, score=None):
            """Nothing: only the names matter."""

    assert input_names(Many(), 5) == ["output_", "output__", "label_", "input_4", "input_5"]
    assert input_names(Many(), 1, ("score", "threshold_12", "score_1")) == [
        "output_", "score_", "threshold_12_", "score_1_",
    ]  # fmt: skip


def test_tensors_of_takes_a_tensor_a_tuple_or_a_dict():
    x, y = inputs(2), inputs(2, seed=1)
    assert tensors_of(x)[0].equal(x)
    assert [t.tolist() for t in tensors_of((x, y))] == [t.tolist() for t in tensors_of({"b": x, "a": y})]


# Flat files


def test_a_flat_file_gives_every_exit(tmp_path):
    net, x = branchy(), inputs(16, seed=2)
    path = export(net, tmp_path / "flat.onnx", policy=None, example=x)
    onnx.checker.check_model(path, full_check=True)
    assert [o.name for o in onnx.load(path).graph.output] == ["label", "output_1", "output_2", "output_3"]
    engine = load(path, threads=1)
    with torch.no_grad():
        expected = [o.numpy() for o in net(x)]
    label, *outputs = engine.outputs(x.numpy())
    for got, want in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(label, expected[-1].argmax(1))
    answer = engine(x.numpy())
    np.testing.assert_array_equal(answer.output, outputs[-1])
    assert answer.exit.tolist() == [3] * 16 and np.isnan(answer.score).all() and engine.policy is None


def test_any_module_can_be_written_flat(tmp_path):
    net, x = Chain().eval(), inputs(3)
    path = export(net, tmp_path / "plain.onnx", policy=None, example={"x": x})
    assert [o.name for o in onnx.load(path).graph.output] == ["label", "output"]
    answer = load(path, threads=1)(x.numpy())
    with torch.no_grad():
        np.testing.assert_allclose(answer.output, net(x), atol=1e-5)
    assert answer.label.tolist() == answer.output.argmax(1).tolist() and answer.exit.tolist() == [1] * 3
