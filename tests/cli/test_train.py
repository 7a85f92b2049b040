"""`branchynet train`: the user's networks, and runs with changed settings."""

import json
import sys

import pytest

from branchynet import ExitRecord, reproduce
from branchynet.runs import run, steps
from branchynet.training import context
from branchynet.training.history import History
from helpers.command import PAPER, call

# Networks of the user

OWN = """
from torch import nn
from branchynet import BranchyNet

def make(num_classes):
    return of(num_classes)

def fixed():
    return of(10)

def seven():
    return of(7)

def broken():
    return 1 / 0

def needy(width):
    return of(width)

def bare():
    return nn.Flatten()

def of(classes):
    layers = nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, classes)
    return BranchyNet(nn.Sequential(*layers), {"1": nn.Linear(8, classes)})

not_one = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with a module."""
    (tmp_path / "own_networks.py").write_text(OWN)
    (tmp_path / "unfinished.py").write_text("import nothing_of_this_name")
    (tmp_path / "wrong.py").write_text("def make(:")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    for module in ("own_networks", "unfinished", "wrong"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return tmp_path


SHORT = ("--warm-start-epochs", 1, "--epochs", 1, "--batch-size", 64, "--augment", "none", "--quiet")


@pytest.mark.parametrize("function", ["make", "fixed"])
def test_a_network_of_the_current_folder_is_trained(here, function, monkeypatch):
    assert call(monkeypatch, "train", "run", "--network", f"own_networks:{function}", *SHORT) == 0
    assert ExitRecord.load("run/record-val.npz").num_exits == 2


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("own_networks:seven", "has 10 classes"),
        ("own_networks:broken", "own_networks.py:15: ZeroDivisionError"),
        ("own_networks:needy", "missing 1 required positional argument: 'width'"),
        ("own_networks:bare", "returned a Flatten"),
        ("own_networks:not_one", "no function 'not_one'"),
        ("own_networks:mak", "did you mean 'make'"),
        ("own_network:make", "no module 'own_network', neither installed nor in the current folder"),
        ("unfinished:make", "nothing_of_this_name"),
        ("wrong:make", "SyntaxError"),
        ("own_networks", "module:function"),
        ("own_networks:", "module:function"),
    ],
)
def test_faulty_networks_are_reported_before_anything_is_written(here, network, message, monkeypatch, capsys):
    assert call(monkeypatch, "train", "run", "--network", network, *SHORT) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1
    assert not (here / "run").exists()


def test_training_may_be_compiled_and_resumes_compiled(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(context.torch, "compile", lambda forward: compiled.append(forward) or forward)
    options = (tmp_path / "run", *PAPER, *SHORT)
    assert call(monkeypatch, "train", *options) == 0 and not compiled
    assert call(monkeypatch, "train", *options, "--compile") == 1  # other kernels, so another training
    assert call(monkeypatch, "train", tmp_path / "other", *PAPER, *SHORT, "--compile") == 0 and compiled
    assert json.loads((tmp_path / "other" / "config.json").read_text())["settings"]["compile"] is True


def test_a_stopped_training_prints_how_to_resume(tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "fit", stopped)
        assert call(monkeypatch, "train", tmp_path / "run", *PAPER, *SHORT) == 130
    assert "stopped; run the same command again" in capsys.readouterr().err
    assert call(monkeypatch, "train", tmp_path / "run", *PAPER, *SHORT) == 0


@pytest.mark.parametrize(
    ("arguments", "where", "resumes"),
    [
        (("demo", "--run", "{tmp}/run"), (steps, "train_run"), True),
        (("demo", "--run", "{tmp}/run"), (run, "create_run"), True),
        (("design", "{tmp}/run"), (run, "open_run"), True),
        (("reproduce", "all", "--from-nothing", "--output", "{tmp}/out"), (reproduce, "reproduce"), True),
        (("reproduce", "all", "--output", "{tmp}/out"), (reproduce, "reproduce"), False),
        (("choose", "{tmp}/run"), (run, "open_run"), False),
    ],
)
def test_stopped_commands_print_how_to_resume(arguments, where, resumes, tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(*where, stopped)
    assert call(monkeypatch, *(a.format(tmp=tmp_path) for a in arguments)) == 130
    assert ("run the same command again" in capsys.readouterr().err) == resumes


# Runs with changed settings


def test_the_settings_of_an_untrained_run_can_change(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "fit", fail)
        call(monkeypatch, "train", folder, *PAPER, *SHORT)
    assert (folder / "config.json").exists()
    assert call(monkeypatch, "train", folder, *PAPER, *SHORT, "--seed", 3, "--loss-weights", "1,0.5") == 0
    settings = json.loads((folder / "config.json").read_text())["settings"]
    assert settings["seed"] == 3 and settings["loss_weights"] == [1, 0.5]


def fail(*_, **__):
    raise RuntimeError


@pytest.mark.heavy
def test_a_trained_run_accepts_more_epochs_and_a_plain_network(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    train = ("train", folder, *PAPER, "--warm-start-epochs", 1, "--batch-size", 64, "--augment", "none", "--quiet")
    assert call(monkeypatch, *train, "--epochs", 1, "--no-plain") == 0
    assert call(monkeypatch, "choose", folder, "--no-promise", "--quiet") == 0
    before = ExitRecord.load(folder / "record-val.npz"), ExitRecord.load(folder / "record-plain.npz")
    assert call(monkeypatch, *train, "--epochs", 2) == 0
    after = ExitRecord.load(folder / "record-val.npz"), ExitRecord.load(folder / "record-plain.npz")
    assert [History.load(folder / part / "train.csv").last.epoch for part in (".", "plain", "warm-start")] == [2, 2, 1]
    assert all(old.digest != new.digest for old, new in zip(before, after, strict=True))
    capsys.readouterr()
    assert call(monkeypatch, "export", folder) == 1  # the choice was made for another network
    assert "branchynet choose" in capsys.readouterr().err
    for verb in (("choose", "--no-promise"), ("export",)):
        assert call(monkeypatch, verb[0], folder, *verb[1:], "--quiet") == 0
    for other in (("--epochs", 1), ("--epochs", 2, "--no-plain"), ("--epochs", 2, "--seed", 1)):
        assert call(monkeypatch, *train, *other) == 1
        assert "was trained with" in capsys.readouterr().err
