"""Hints and warnings of the command line that need no trained run."""

import warnings

import numpy as np
import pytest
import typer

from branchynet.cli import program, verbs
from branchynet.data import save_image
from branchynet.errors import InputError
from branchynet.report.console import in_options
from branchynet.runs.design import next_steps
from branchynet.training.history import EpochRow, History
from helpers.command import call


@pytest.mark.parametrize(
    ("network", "channels", "message"),
    [
        ("b_lenet", 3, "reads gray images of 28 x 28; give --network b_resnet20-published --size 32,"),
        ("b_lenet", 1, "reads gray images of 28 x 28; give --size 28,"),
        ("b_resnet20-published", 1, "reads color images of 32 x 32; give --network b_lenet --size 28,"),
        ("b_alexnet", 1, "reads color images of 32 x 32; give --network b_lenet --size 28,"),
    ],
)
def test_the_input_size_of_a_network_is_reported(network, channels, message, tmp_path, capsys):
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for n in range(8):
            image = np.random.default_rng(n).random((channels, 20, 20))
            save_image(image, tmp_path / "images" / name / f"{n}.png")
    arguments = ("train", tmp_path / "run", "--data", f"folder:{tmp_path / 'images'}", "--network", network, "--quiet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        assert call(patch, *arguments) == 1
    error = capsys.readouterr().err
    assert message in error and "Given groups" not in error


@pytest.mark.parametrize(
    ("losses", "asked", "message"),
    [
        ([1.0], (2, 1, 0), "--epochs 3 --final-epochs 3 --num-exits 4"),
        ([1.0, 0.5, 0.4], (4, 3, 0), "--epochs 6 --final-epochs 6`"),
        ([1.0, 0.5, 0.5], (3, 3, 0), "design RUN --num-exits 4`"),
        ([1.0, 0.5, 0.5], (4, 3, 0), ""),
    ],
)
def test_design_suggests_options_that_may_change_its_verdict(losses, asked, message, tmp_path):
    rows = tuple(EpochRow(n, 1.0, 0.1, 1.0, val_loss=loss) for n, loss in enumerate(losses, 1))
    (tmp_path / "candidates").mkdir()
    History(rows).save(tmp_path / "candidates" / "train.csv")
    found = next_steps(tmp_path / "design-1", *asked).replace(str(tmp_path), "RUN")
    assert message in found and bool(found) == bool(message)
    assert ("still improving" in found) == (len(losses) < 2 or losses[-1] < losses[-2])


@pytest.mark.parametrize("verb", [command for command in typer.main.get_command(verbs.app).commands])
@pytest.mark.filterwarnings("always")
def test_a_warning_is_one_line_in_every_verb(verb, monkeypatch, capsys, tmp_path):
    def warn(*_, **__):
        warnings.warn("max_drop=0.3 of\n  *[red]all[/red]*", stacklevel=2)
        raise InputError("stopped")

    steps = ("runs.run.open_run", "runs.run.create_run", "runs.predict.model_file", "reproduce.reproduce")
    for place in (*steps, "serve.server.serve"):
        monkeypatch.setattr(f"branchynet.{place}", warn)
    given = {"predict": [tmp_path, tmp_path], "demo": [], "reproduce": ["table1"]}.get(verb, [tmp_path])
    before = warnings.showwarning
    assert call(monkeypatch, verb, *given) == 1
    drop = "--max-drop 0.3" if verb in ("choose", "design") else "max_drop=0.3"
    assert capsys.readouterr().err == f"warning: {drop} of *[red]all[/red]*\nerror: stopped\n"
    assert warnings.showwarning is before


@pytest.mark.parametrize(
    "what",
    [
        "lower the limit, or train it longer",
        "10.0%: train it longer, because the best exits depend on it",
        "needs fewer: train it longer",
    ],
)
def test_a_refused_design_names_the_option_for_longer_training(what):
    options = program.called_options(verbs.app, ["design"])
    assert "in a new run folder with a larger --warm-start-epochs" in in_options(what, options)
