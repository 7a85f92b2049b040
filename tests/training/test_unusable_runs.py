"""Run folders that cannot be resumed or written."""

import functools
import json
import threading

import pytest
import safetensors.torch
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from branchynet.errors import FileError, InputError
from branchynet.files import locked
from branchynet.training.schedules import Cosine
from helpers.training_runs import EPOCHS, Pictures, equal, make, quiet, resumed, state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 2}, "epochs=3.*epochs=2"),
        ({"seed": 1}, "seed=0.*seed=1"),
        ({"loss_weights": [1, 0.3]}, r"loss_weights=None.*loss_weights=\[1.0, 0.3\]"),
        ({"train": "branches"}, "train='all'.*train='branches'"),
        ({"optimizer": functools.partial(torch.optim.Adam, lr=0.01)}, "'lr': 0.001.*'lr': 0.01"),
        ({"schedule": Cosine(0.1)}, r"Cosine\(warmup=0.05\).*Cosine\(warmup=0.1\)"),
        ({"loss": functools.partial(F.cross_entropy, label_smoothing=0.1)}, "loss=.*label_smoothing=0.1"),
        ({"mixed_precision": "bf16"}, "mixed_precision='no'"),
    ],
)
def test_a_run_with_other_settings_is_refused(finished, changes, message):
    with pytest.raises(InputError, match=f"(?s){message}.*another run folder, or FitOptions\\(resume=False\\)"):
        resumed(finished, make(), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_workers": 2}, "workers=0.*workers=2"),
        ({"num_workers": 1, "persistent_workers": True}, "workers=0.*workers=1"),
        ({"batch_size": 11}, "batch_size=10.*batch_size=11"),  # as many batches, but with other samples
    ],
)
def test_a_loader_that_draws_other_numbers_is_refused(finished, changes, message):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    other = DataLoader(Pictures(), shuffle=True, **{"batch_size": 10, **changes})
    with pytest.raises(InputError, match=f"{message}.*another run folder, or FitOptions\\(resume=False\\)"):
        quiet(make(), other, epochs=EPOCHS, run=finished)
    assert {path: path.read_bytes() for path in finished.iterdir()} == before


@pytest.mark.parametrize("steps", [-1, 19, 10**15, 6.0, "6", None])
def test_steps_that_no_training_took_are_refused(finished, steps):
    path = finished / "training.safetensors"
    with safetensors.safe_open(path, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        header = json.loads(stored.metadata()["branchynet"])
    header["progress"]["steps"] = steps
    safetensors.torch.save_file(tensors, path, {"branchynet": json.dumps(header)})
    with pytest.raises(FileError, match=r"steps in 3 epochs of 6 batches"):
        resumed(finished, make())


def test_a_folder_in_use_is_refused(finished):
    gate, done = threading.Event(), threading.Event()

    def hold():
        with locked(finished):
            gate.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    gate.wait()
    try:
        before = {path: path.read_bytes() for path in finished.iterdir()}
        for more in ({}, {"resume": False}, {"seed": 1}):
            with pytest.raises(FileError, match=r"is in use"):
                resumed(finished, make(), **more)
        assert {path: path.read_bytes() for path in finished.iterdir()} == before
    finally:
        done.set()
        thread.join()
    assert resumed(finished, make())[1].last.epoch == EPOCHS


def test_a_run_of_another_network_is_refused(finished):
    net = make(width=5)
    before = state(net)
    with pytest.raises(FileError, match=r"'backbone.0.weight' is of shape \(4, 2, 3, 3\) .* \(5, 2, 3, 3\)"):
        resumed(finished, net)
    assert equal(before, state(net))


def test_a_truncated_or_foreign_state_is_refused(finished):
    path = finished / "training.safetensors"
    content = path.read_bytes()
    for foreign in (
        b"",
        content[:5],
        content[:100],
        content[:-1],
        content[: len(content) // 2],
        b"\x00" * 64,
        b"PK\x03\x04" * 9,
    ):
        path.write_bytes(foreign)
        with pytest.raises(FileError, match=r"training\.safetensors"):
            resumed(finished, make())
    path.write_bytes((finished / "checkpoint.safetensors").read_bytes())  # valid, but not the state of a training
    with pytest.raises(FileError, match=r"not the state.*resume=False"):
        resumed(finished, make())
    assert resumed(finished, make(), resume=False)[1].last.epoch == EPOCHS


def test_an_optimizer_that_tensors_and_json_cannot_hold_is_named(tmp_path):
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            self.state[self.param_groups[0]["params"][0]]["memory"] = {1, 2}
            return super().step(closure)

    with pytest.raises(InputError, match="Odd"):
        resumed(tmp_path, make(), optimizer=lambda p: Odd(p, lr=0.1))
