"""Help, names, version and completion of the command line."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer

from branchynet import __version__
from branchynet.cli import verbs
from branchynet.data import archives
from branchynet.deploy.loading import RUNTIMES
from branchynet.policy.scores import SCORES
from branchynet.profiling.target import TARGET_RUNTIMES
from branchynet.runs.settings import AUGMENTS
from branchynet.zoo import NETWORKS
from helpers.command import call


def test_the_names_of_options_equal_their_sources():
    assert verbs.RUNTIMES == RUNTIMES and verbs.TARGET_RUNTIMES == TARGET_RUNTIMES
    assert verbs.NETWORKS == tuple(NETWORKS) and verbs.AUGMENTS == tuple(AUGMENTS)
    assert set(verbs.DATA) == {"digits", *archives.ARCHIVES}
    assert set(verbs.SCORES) == {*SCORES, "learned"}


COMMANDS = list(typer.main.get_command(verbs.app).commands)


@pytest.mark.parametrize("width", [80, 132])
@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_is_complete_and_fits(command, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    assert call(monkeypatch, *[command] * (command is not None), "-h") == 0
    output = capsys.readouterr().out
    assert "…" not in output
    assert all(len(line) <= width for line in output.splitlines())
    group = typer.main.get_command(verbs.app)
    for parameter in (group.commands[command] if command else group).params:
        assert [word for word in parameter.help.split() if word not in output.split()] == []


def test_every_command_has_one_line_of_help(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert call(monkeypatch, "--help") == 0
    output = capsys.readouterr().out.split("Commands:")[1]
    assert [line.split()[0] for line in output.strip().splitlines()] == COMMANDS and "..." not in output


def test_zoo_networks_are_in_help_and_in_the_docs(monkeypatch, capsys):
    assert call(monkeypatch, "train", "--help") == 0
    output, page = capsys.readouterr().out, (Path(__file__).parents[2] / "docs" / "networks.md").read_text()
    for name in NETWORKS:
        assert name in output and f"`{name}`" in page


def test_version_and_python_m():
    command = [sys.executable, "-m", "branchynet", "--version"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == f"branchynet {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("branchynet pre", ["predict"]),
        ("branchynet train run --network b_resnet1", ["b_resnet110", "b_resnet110-published"]),
        ("branchynet train run --augment fl", ["flip-crop"]),
        ("branchynet choose run --score m", ["max_probability", "margin"]),
        ("branchynet bench run --runtime open", ["openvino"]),
        ("branchynet design run --runtime torch", ["torch", "torch-cuda"]),
    ],
)
def test_the_shell_completes(typed, completed, monkeypatch, capsys):
    monkeypatch.setenv("_BRANCHYNET_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    assert call(monkeypatch) == 0
    assert capsys.readouterr().out.split() == completed
