import contextlib
import functools
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.utils.data import DataLoader

from branchynet.data import ProgressiveLoader
from branchynet.errors import FileError, InputError
from branchynet.training import checkpoint, loop
from branchynet.training.history import History
from branchynet.training.loop import fit
from branchynet.training.options import FitOptions
from branchynet.training.schedules import Constant, Cosine
from helpers.training_runs import EPOCHS, Pictures, Stop, equal, loader, make, quiet, resumed, state


def killed_run(folder, at):
    """Train into `folder` in a child process, which SIGKILL ends before the `at`-th sample is drawn."""
    data = loader(interrupt=lambda: os.kill(os.getpid(), signal.SIGKILL), at=int(at))
    fit(make(), data, epochs=EPOCHS, run=folder, progress=False, options=FitOptions(device="cpu"))


@pytest.mark.parametrize("at", [25, 60 + 44])  # in the third batch of epoch 1, in the fifth of epoch 2
def test_a_killed_run_resumes_to_the_same_weights(whole, tmp_path, at):
    command = f"import test_resume; test_resume.killed_run({str(tmp_path)!r}, {at})"
    paths = os.pathsep.join([*map(str, Path(__file__).parents[:2]), str(Path(checkpoint.__file__).parents[2])])
    child = subprocess.run([sys.executable, "-c", command], env={**os.environ, "PYTHONPATH": paths}, timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert len(History.load(tmp_path / "train.csv").rows) == at // 60
    # Other initial weights must not matter, because the run stores those of the first start.
    net, history = resumed(tmp_path, make(seed=9))
    assert equal(state(net), whole[0])
    assert [row.epoch for row in history.rows] == [1, 2, 3]
    assert [figures(row) for row in history.rows] == [figures(row) for row in whole[1].rows]
    assert History.load(tmp_path / "train.csv").rows[-1].train_loss == history.last.train_loss
    stored = safetensors.torch.load_file(tmp_path / "checkpoint.safetensors")
    assert equal(stored, whole[0])


def figures(row):
    return (row.epoch, row.lr, row.train_loss, row.train_accuracy, row.val_loss, row.val_accuracy)


class Counting(torch.optim.SGD):
    """An optimizer with a number as its state, which changes its steps."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["count"] = self.state[p].get("count", 0) + 1
            p.grad.div_(self.state[p]["count"])
        return super().step(closure)


RECIPES = {
    "numbers": {"optimizer": functools.partial(Counting, lr=0.1)},
    "adam": {},
    "sgd": {"optimizer": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True)},
    "adamw": {"optimizer": functools.partial(torch.optim.AdamW, lr=0.01, amsgrad=True), "train": "branches"},
    # A fused step reads memory in order, so the loaded state must have the memory order of the weights.
    "fused": {"optimizer": functools.partial(torch.optim.Adam, lr=0.01, fused=True), "channels_last": True},
    "groups": {
        "optimizer": lambda p: torch.optim.Adam([{"params": p[:2], "lr": 0.1}, {"params": p[2:]}], lr=0.01),
        "schedule": lambda o, n: torch.optim.lr_scheduler.MultiStepLR(o, [4, 9], 0.3),
        "channels_last": True,
    },
    "onecycle": {"schedule": lambda o, n: torch.optim.lr_scheduler.OneCycleLR(o, 0.01, n), "mixed_precision": "bf16"},
    "exponential": {"schedule": lambda o, n: torch.optim.lr_scheduler.ExponentialLR(o, 0.9), "distill": 0.5},
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("at", [0, 61, 133, 179])
def test_any_optimizer_and_schedule_resumes_to_the_same_weights(tmp_path, recipe, at):
    net = make()
    quiet(net, loader(), epochs=EPOCHS, **RECIPES[recipe])
    with pytest.raises(Stop):
        resumed(tmp_path, make(), interrupt=at, **RECIPES[recipe])
    again, _ = resumed(tmp_path, make(seed=9), **RECIPES[recipe])
    assert equal(state(net), state(again))


def test_overflowing_fp16_steps_are_skipped_and_the_scale_is_resumed(tmp_path, monkeypatch):
    """A CPU has no fp16 training, but torch's gradient scaler runs there; it halves its scale after an overflow."""
    accelerating, skipped = loop.accelerating, []

    @contextlib.contextmanager
    def scaling(mixed_precision, device):
        with accelerating(mixed_precision, device) as accelerator:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=2)
            yield accelerator
            skipped.append(EPOCHS * 6 - json.loads(header(tmp_path)["branchynet"])["progress"]["steps"])

    def header(folder):
        with safetensors.safe_open(folder / "training.safetensors", framework="pt") as stored:
            return stored.metadata()

    monkeypatch.setattr(loop, "accelerating", scaling)
    loud = {"loss_weights": [30, 30]}
    net, _ = resumed(tmp_path, make(), **loud)
    with pytest.raises(Stop):
        resumed(tmp_path, make(), resume=False, interrupt=133, **loud)
    again, history = resumed(tmp_path, make(seed=9), **loud)
    assert equal(state(net), state(again)) and all(value.isfinite().all() for value in state(net).values())
    assert skipped[0] == skipped[1] > 0
    # The schedule also skips these steps, so it is not at its end.
    assert history.last.lr > Cosine()(torch.optim.SGD(net.parameters(), lr=1e-3), 18).lr_lambdas[0](17) * 1e-3


@pytest.mark.parametrize("name", ["training.safetensors", "checkpoint.safetensors", "train.csv"])
def test_a_kill_between_the_files_of_a_checkpoint_loses_nothing(whole, tmp_path, name, monkeypatch):
    """Stop after `name` of epoch 2 was written, and leave a partial file."""
    written = []
    replace = Path.replace

    def watched(self, target):
        result = replace(self, target)
        written.append(Path(target).name)
        if written.count(name) == 3:  # the state before epoch 1 counts too
            raise Stop
        return result

    monkeypatch.setattr(Path, "replace", watched)
    with pytest.raises(Stop):
        resumed(tmp_path, make())
    monkeypatch.undo()
    half = tmp_path / ".checkpoint-abc.partial.safetensors"
    half.write_bytes(b"half")
    net, history = resumed(tmp_path, make(seed=9))
    assert equal(state(net), whole[0]) and len(history.rows) == EPOCHS
    names = sorted(p.name for p in tmp_path.iterdir() if p.name != ".lock")
    assert names == ["checkpoint.safetensors", "train.csv", "training.safetensors"]


def test_a_finished_run_returns_at_once(finished, whole):
    (finished / "train.csv").write_text("epoch\n")  # derived, so written again
    net = make(seed=9)
    _, history = resumed(finished, net, interrupt=0)
    assert equal(state(net), whole[0])
    assert [figures(row) for row in history.rows] == [figures(row) for row in whole[1].rows]
    assert len(History.load(finished / "train.csv").rows) == EPOCHS


def test_resume_false_starts_again(finished, whole):
    net, _ = resumed(finished, make(seed=9), resume=False)
    assert not equal(state(net), whole[0])
    assert equal(safetensors.torch.load_file(finished / "checkpoint.safetensors"), state(net))


def test_other_growing_batches_are_refused(tmp_path):
    def growing(workers):
        return ProgressiveLoader(DataLoader(Pictures(), 10, shuffle=True, num_workers=workers), (8,))

    quiet(make(), growing(0), epochs=1, run=tmp_path)
    with pytest.raises(InputError, match=r"workers=0.*workers=1"):
        quiet(make(), growing(1), epochs=1, run=tmp_path)


def test_a_state_without_the_number_of_workers_resumes(tmp_path, whole):
    """Earlier versions wrote such states, also without a checksum."""
    with pytest.raises(Stop):
        resumed(tmp_path, make(), interrupt=70)
    path = tmp_path / "training.safetensors"
    with safetensors.safe_open(path, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        header = json.loads(stored.metadata()["branchynet"])
    del header["settings"]["workers"], header["settings"]["batch_size"]
    safetensors.torch.save_file(tensors, path, {"branchynet": json.dumps(header)})
    assert equal(state(resumed(tmp_path, make(seed=9))[0]), whole[0])


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, functools.partial(torch.optim.SGD, momentum=0.9)])
@pytest.mark.parametrize("first", [1, 2])
def test_epochs_added_to_a_finished_run_are_those_of_a_longer_one(tmp_path, optimizer, first):
    """With a constant step size the two are equal."""
    recipe = {"schedule": Constant(), "optimizer": functools.partial(optimizer, lr=0.01)}
    quiet(long := make(), loader(), epochs=EPOCHS, **recipe)
    quiet(make(), loader(), epochs=first, run=tmp_path, **recipe)
    net, history = resumed(tmp_path, make(seed=9), **recipe)
    assert equal(state(net), state(long)) and len(history.rows) == EPOCHS


def test_added_epochs_have_the_step_sizes_of_the_schedule_of_all(tmp_path):
    whole = loader(batch_size=1000)  # one step per epoch
    long = quiet(make(), whole, epochs=5)
    quiet(make(), whole, epochs=2, run=tmp_path)
    history = quiet(make(), whole, epochs=5, run=tmp_path)
    assert [row.lr for row in history.rows[2:]] == [row.lr for row in long.rows[2:]]


def test_a_run_without_an_epoch_may_become_another(tmp_path):
    with pytest.raises(Stop):
        resumed(tmp_path, make(), interrupt=5)
    assert (tmp_path / "training.safetensors").exists()
    net, _ = resumed(tmp_path, make(width=5), seed=3)
    quiet(other := make(width=5), loader(), epochs=EPOCHS, seed=3)
    assert equal(state(net), state(other))


def full_disk(limit):
    """Limit the size of files to `limit` bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_leaves_the_last_good_state(tmp_path, whole):
    kept = {}

    def fill():
        kept.update({path.name: path.read_bytes() for path in tmp_path.iterdir()})
        full_disk(2000)

    try:
        with pytest.raises(FileError, match=r"cannot write .*training.safetensors.*space"):
            quiet(make(), loader(interrupt=fill, at=70), epochs=EPOCHS, run=tmp_path)
    finally:
        full_disk(resource.RLIM_INFINITY)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept
    assert equal(state(resumed(tmp_path, make(seed=9))[0]), whole[0])
