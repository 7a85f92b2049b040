"""Unusual calls of new users: each returns the right result, or says what prevents it."""

import numpy as np
import pytest
import torch

from branchynet import (
    BranchyNetError,
    BudgetController,
    ExitCost,
    ExitRecord,
    attach,
    export,
    frontier,
    load,
)
from branchynet.deploy.torch_engine import TorchEngine
from branchynet.training.options import FitOptions
from helpers.newcomer import (
    Small,
    WithLoss,
    cost,
    found,
    loader,
    net,
    policy,
    quick,
    silent,
    x,
    y,
)


def test_numbers_of_every_kind_are_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind in (float, np.float32, np.float64, torch.tensor):
        given = BudgetController(found, policy, ExitCost((10.0, 10.0), (1.0, 0.0)), goal_us=kind(15))
        assert given.goal_us == 15 and type(given.goal_us) is float
    assert export(net, "a.onnx", policy=policy, example=x, labels=None).exists()
    assert frontier(found, cost).policy(-1) == frontier(found, cost).policy(len(frontier(found, cost)) - 1)


def test_a_gpu_that_is_not_there():
    if torch.cuda.is_available():
        assert silent(net, loader, device="cuda").digest
        net.cpu()
        return
    for call in (silent, lambda *_, device: FitOptions(device=device)):
        with pytest.raises(BranchyNetError, match=r"device='cuda' is not available.*give 'cpu'"):
            call(net, loader, device="cuda")
    with pytest.raises(BranchyNetError, match="device='cuda' is not available"):
        TorchEngine(net, policy, x, device="cuda")


def test_numpy_batches_are_read_as_tensors():
    arrays = [(x.numpy(), y.numpy())]
    np.testing.assert_array_equal(silent(net, arrays).outputs, silent(net, [(x, y)]).outputs)
    assert quick(attach(Small(), at=["first"], example=x), arrays).rows[0].train_loss > 0


def test_an_optimizer_class_is_a_function_of_the_parameters():
    assert quick(attach(Small(), at=["first"], example=x), loader, optimizer=torch.optim.SGD).rows[0].lr > 0


def test_labels_that_only_a_loss_reads_are_no_input(tmp_path):
    features = torch.rand(8, 3)
    attached = attach(WithLoss(), at=["first"], example={"x": features})
    with pytest.raises(BranchyNetError, match=r"'labels'.*only to compute its loss: leave it out"):
        export(attached, tmp_path / "a.onnx", policy=policy, example={"x": features, "labels": y[:8]})
    assert load(export(attached, tmp_path / "a.onnx", policy=policy, example={"x": features})).inputs[0].name == "x"


def test_what_the_network_itself_raises_stays_in_the_chain():
    class Broken(Small):
        def forward(self, x):
            raise RuntimeError("out of paper")

    with pytest.raises(BranchyNetError, match="out of paper") as raised:
        attach(Broken(), at=["first"], example=x)
    assert isinstance(raised.value.__cause__, RuntimeError)

    class Interrupted(Small):
        def forward(self, x):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attach(Interrupted(), at=["first"], example=x)


def test_a_record_is_printed_in_one_short_line():
    assert repr(found).startswith("ExitRecord(16 samples, 2 exits, 4 classes, network ") and len(repr(found)) < 120
    scored = ExitRecord.from_scores(np.zeros((5, 3)), np.zeros((5, 3)), "margin")
    assert repr(scored) == "ExitRecord(5 samples, 3 exits, scores of 'margin')"
