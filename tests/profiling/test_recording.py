import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from branchynet.errors import InputError
from branchynet.nn.network import BranchyNet
from branchynet.policy.exit_record import ExitRecord
from branchynet.profiling.recording import record


def make(classes=3):
    """Three exits; dropout and batch normalization, so that the mode matters."""
    backbone = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.ReLU(), nn.Linear(6, 3))
    return BranchyNet(backbone, {"input": nn.Linear(4, 3), "1": nn.Sequential(nn.Dropout(), nn.Linear(6, classes))})


@settings(max_examples=25, deadline=None)
@given(samples=st.integers(1, 20), batch=st.integers(1, 7), training=st.booleans())
def test_a_record_is_the_eval_forward_of_every_sample(samples, batch, training):
    net = make().train(training)
    net.branches[1].train(not training)
    modes = [module.training for module in net.modules()]
    x, y = torch.randn(samples, 4), torch.randint(3, (samples,))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    made = record(net, DataLoader(TensorDataset(x, y), batch), progress=False)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert made.outputs.dtype == np.float32 and made.labels.dtype == np.int64
    np.testing.assert_array_equal(made.labels, y)
    net.eval()
    for sample in range(samples):
        expected = np.stack([output[0].detach().numpy() for output in net(x[sample : sample + 1])])
        np.testing.assert_allclose(made.outputs[sample], expected, rtol=1e-4, atol=1e-5)


def test_a_plain_network_has_one_exit():
    net, x = nn.Linear(4, 3), torch.randn(5, 4)
    made = record(net, [(x, torch.zeros(5, dtype=torch.int64))], progress=False)
    assert made.outputs.shape == (5, 1, 3)
    np.testing.assert_allclose(made.outputs[:, 0], net(x).detach(), rtol=1e-5)


def test_low_precision_outputs_are_kept_as_float32():
    net = nn.Linear(4, 3).to(torch.bfloat16)
    made = record(net, [(torch.randn(2, 4, dtype=torch.bfloat16), torch.tensor([0, 1]))], progress=False)
    assert made.outputs.dtype == np.float32


def test_inputs_may_be_a_tuple_or_a_dict():
    net = nn.Bilinear(4, 2, 3)
    left, right, y = torch.randn(5, 4), torch.randn(5, 2), torch.zeros(5, dtype=torch.int64)
    made = [
        record(net, [(x, y)], progress=False) for x in ((left, right), [left, right], {"input2": right, "input1": left})
    ]
    assert made[0].digest == made[1].digest == made[2].digest


def test_a_record_survives_the_disk(tmp_path: Path):
    made = record(make(), [(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))], progress=False)
    made.save(tmp_path / "record.npz")
    assert ExitRecord.load(tmp_path / "record.npz").digest == made.digest


def test_exits_that_disagree_are_named():
    with pytest.raises(InputError, match=r"exit 1: \(2, 3\), exit 2: \(2, 5\), exit 3: \(2, 3\)"):
        record(make(classes=5), [(torch.randn(2, 4), torch.tensor([0, 1]))], progress=False)


def test_outputs_that_are_not_logits_are_named():
    with pytest.raises(InputError, match=r"outputs \(2, 3, 4, 4\) have positions.*loss="):
        record(nn.Conv2d(1, 3, 1), [(torch.randn(2, 1, 4, 4), torch.tensor([0, 1]))], progress=False)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no batch"),
        ([torch.zeros(2, 4)], "inputs, target"),
        ([(torch.zeros(2, 4), [0, 1])], "inputs, target"),
        ([(torch.full((2, 4), math.nan), torch.tensor([0, 1]))], "nan at sample 0, exit 1"),
        ([(torch.full((2, 4), math.inf), torch.tensor([0, 1]))], "at sample 0, exit 1"),
        ([(torch.zeros(2, 4), torch.tensor([0, 3]))], "3 classes"),
        ([(torch.zeros(2, 4), torch.tensor([0.0, 1.0]))], "labels must be integers"),
    ],
)
def test_data_that_cannot_be_recorded_is_named(data, message):
    with pytest.raises(InputError, match=message):
        record(make(), data, progress=False)


def test_the_bar_is_on_stderr_unless_silenced(capsys):
    data = [(torch.randn(2, 4), torch.tensor([0, 1]))]
    record(make(), data)
    assert "recording" in capsys.readouterr().err
    record(make(), data, progress=False)
    assert capsys.readouterr() == ("", "")


RECORDS = ExitRecord(np.eye(5, 3)[:, None], np.arange(5) % 3), ExitRecord.from_scores(np.eye(5), np.eye(5))


@pytest.mark.parametrize(
    "rows",
    [
        *([0.5], "x", [True, False], np.ones(6, bool), [5], [-6], [2**70], np.ones((5, 5), bool), None, 3, True),
        *((0, 0), [[0, 1]], {"a": 1}, slice("a"), slice(0, 3, 0), np.array(["0"]), np.array([0.0]), object()),
    ],
    ids=lambda rows: repr(rows).partition(" at 0x")[0],  # the same in every process
)
def test_invalid_rows_are_refused(rows):
    for made in RECORDS:
        with pytest.raises(InputError, match="rows must be indices below 5, a mask of 5 booleans or a slice; got"):
            made.take(rows)


@pytest.mark.parametrize(
    "rows", [[0, 4, -1, 0], range(2, 4), slice(None, None, -2), np.arange(5) > 2, [True] * 5, torch.tensor([1, 2])]
)
def test_rows_index_like_numpy(rows):
    for made in RECORDS:
        np.testing.assert_array_equal(made.take(rows).losses, made.losses[np.arange(5)[rows]])


def test_a_record_needs_rows():
    for rows in ([], slice(0), np.zeros(5, bool)):
        with pytest.raises(InputError, match="at least one sample"):
            RECORDS[1].take(rows)
