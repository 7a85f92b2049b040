"""Names of classes and files may contain any text: the terminal shows it and does not interpret it."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from branchynet import export
from branchynet.cli import verbs
from branchynet.errors import printable
from branchynet.nn.network import BranchyNet
from branchynet.policy.values import Policy

MARKUP = ("[red]a[/red]", "[/]", ":smile:", "[link=https://x.y]z[/link]", "a\\[b", "[[x]]")
CONTROL = ("a\x1b[31mb", "bell\a", "caf\udce9", "half\ud800", "line\nbreak", "right\u202eleft")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("caf\udce9", r"caf\xe9"),
        ("\ud800", r"\ud800"),
        ("a\nb\tc\x7f", r"a\nb\tc\x7f"),
        ("right\u202eleft", r"right\u202eleft"),
        ("[red]café 漢字 🙂", "[red]café 漢字 🙂"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown and shown.encode()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a network of one class per name, and one image per class."""
    folder = tmp_path_factory.mktemp("names")
    names = MARKUP + CONTROL
    last = nn.Linear(len(names), len(names), bias=False)
    nn.init.eye_(last.weight)
    net = BranchyNet(nn.Sequential(nn.Flatten(), last), {"0": nn.Linear(len(names), len(names))})
    example = torch.rand(2, 1, 1, len(names))
    export(net, folder / "model.onnx", policy=Policy("entropy", (-1.0,)), example=example, labels=names)
    for i in range(len(names)):
        pixels = np.zeros((1, len(names)), np.uint8)
        pixels[0, i] = 255
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder, names


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["branchynet", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "300")
    verbs.app(standalone_mode=False)


def test_predict_shows_class_names_as_they_are(files, monkeypatch, capfd):
    folder, names = files
    call(monkeypatch, "predict", folder / "model.onnx", *(folder / f"{i}.png" for i in range(len(names))))
    shown = capfd.readouterr().out
    for name in names:
        assert printable(name) in shown
    assert "\x1b[31m" not in shown and "\a" not in shown


def test_predict_gives_json_the_names_themselves(files, monkeypatch, capfd):
    folder, names = files
    call(monkeypatch, "predict", "--json", folder / "model.onnx", *(folder / f"{i}.png" for i in range(len(names))))
    lines = capfd.readouterr().out.splitlines()
    assert [json.loads(line)["label"] for line in lines] == list(names)


def test_inspect_shows_class_names_as_they_are(files, monkeypatch, capfd):
    folder, _ = files
    call(monkeypatch, "inspect", folder / "model.onnx")
    shown = capfd.readouterr().out
    for name in MARKUP:
        assert name in shown
    assert "\x1b[31m" not in shown and r"caf\xe9" in shown


@pytest.mark.parametrize("name", ["[bold]x.png", "caf\udce9.png", "[x] :smile:.png"])
def test_names_of_files_are_shown_as_they_are(files, tmp_path, monkeypatch, capfd, name):
    folder, _ = files
    try:
        (tmp_path / name).write_bytes((folder / "0.png").read_bytes())
    except OSError:
        pytest.skip("this file system keeps no such names")
    call(monkeypatch, "predict", folder / "model.onnx", tmp_path / name)
    assert printable(name) in capfd.readouterr().out
