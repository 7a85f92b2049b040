"""The command line on folders of the user's images."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from branchynet import load
from branchynet.cli.options import image_size, shares
from branchynet.data import load_data, read_image
from branchynet.errors import InputError
from branchynet.runs.run import open_run
from branchynet.runs.settings import data_of
from helpers.command import call

OWN = """
from torch import nn
from branchynet import BranchyNet

def make(num_classes):
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    branch = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
    return BranchyNet(nn.Sequential(*layers), {"1": branch})
"""
SHORT = ("--warm-start-epochs", 1, "--epochs", 1, "--augment", "none", "--network", "nets_of_folders:make")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with a network and with photographs of two sizes."""
    tmp_path = tmp_path.resolve()
    (tmp_path / "nets_of_folders.py").write_text(OWN)
    rng = np.random.default_rng(0)
    for c, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            height, width = (12, 10) if i % 3 else (30, 41)
            pixels = rng.integers(0, 86, (height, width, 3), np.uint8) + np.uint8(85 * c)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i:02}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_on_photographs_from_training_to_prediction(here, monkeypatch, capsys):
    options = ("--size", "8x9", "--split", "60/20/20", "--normalize")
    assert call(monkeypatch, "train", "run", "--data", "folder:photos", *options, *SHORT) == 0
    output = capsys.readouterr().err
    assert f"folder:{here / 'photos'}: 60 images of 3 x 8 x 9" in output.replace("\n", " ")
    assert [line.split()[0] for line in output.splitlines()[1:6]] == ["class", "ant", "bee", "cat", "all"]
    config = json.loads((here / "run" / "config.json").read_text())["settings"]
    assert config["data"] == f"folder:{here / 'photos'}" and config["size"] == [8, 9]
    expected = load_data(f"folder:{here / 'photos'}", size=(8, 9), split=(60, 20, 20), normalize=True)
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.syspath_prepend(here)
    data = data_of(open_run("../run", trust=True).settings)  # the module is not in the current folder now
    assert data.test.digest == expected.test.digest and data.test.normalization == expected.test.normalization
    for verb in (("choose", "--no-promise"), ("export",), ("report",)):
        assert call(monkeypatch, verb[0], "../run", *verb[1:], "--quiet") == 0
    engine = load("../run/model.onnx")
    normalization = expected.train.normalization
    about = engine.metadata["preprocessing"]
    assert about["mean"] == list(normalization.mean) and about["std"] == list(normalization.std)
    capsys.readouterr()
    files = sorted((here / "photos" / "bee").iterdir())
    assert call(monkeypatch, "predict", "../run", "../photos/bee", "--json") == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    prepared = normalization(np.concatenate([read_image(file, (3, 8, 9)) for file in files]))
    labels = engine(prepared).label
    assert [answer["label"] for answer in answers] == [expected.classes[n] for n in labels]


def test_a_folder_that_has_moved_is_named(here, monkeypatch, capsys):
    assert call(monkeypatch, "train", "run", "--data", "folder:photos", "--quiet", *SHORT) == 0
    shutil.move(here / "photos", here / "moved")
    capsys.readouterr()
    for verb in ("design", "report"):
        assert call(monkeypatch, verb, "run", "--quiet") == 1
        error = capsys.readouterr().err
        assert (
            "has no choice.json yet" in error
            if verb == "report"
            else f"{here / 'photos'}' does not name a folder" in error
        )


def test_a_run_resumes_for_any_spelling_of_its_data_folder(here, monkeypatch, capsys):
    train = ("train", here / "run", "--quiet", *SHORT, "--data")
    assert call(monkeypatch, *train, "folder:photos") == 0
    monkeypatch.syspath_prepend(here)
    (here / "sub").mkdir()
    monkeypatch.chdir(here / "sub")
    for same in ("folder:../photos", f"folder:{here / 'photos'}", f"folder:{here}/sub/../photos/"):
        assert call(monkeypatch, *train, same) == 0
    config = here / "run" / "config.json"
    config.write_text(config.read_text().replace(str(here / "photos"), "photos"))  # as earlier versions wrote it
    monkeypatch.chdir(here)
    assert call(monkeypatch, *train, "folder:photos") == 0
    assert json.loads(config.read_text())["settings"]["data"] == f"folder:{here / 'photos'}"
    shutil.move(here / "photos", here / "moved")
    assert call(monkeypatch, *train, "folder:moved") == 0
    assert json.loads(config.read_text())["settings"]["data"] == f"folder:{here / 'moved'}"
    before = config.read_bytes()
    capsys.readouterr()
    for other in (("folder:moved", "--size", 9), ("folder:moved", "--normalize"), ("digits",)):
        assert call(monkeypatch, *train, *other) == 1
        assert "was trained with" in capsys.readouterr().err
    (here / "moved" / "bee" / "05.png").unlink()
    assert call(monkeypatch, *train, "folder:moved") == 1
    assert "moved are not those that" in capsys.readouterr().err
    assert config.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--size", "0"), "--size 0 is not a size; give one side, such as 64"),
        (("--size", "-3"), "is not a size"),
        (("--size", "64x"), "--size 64x is not a size"),
        (("--size", "1e3"), "is not a size"),
        (("--size", "99999x99999"), "do not fit in memory; give a smaller size"),
        (("--split", "70/30"), "--split 70/30 is not a split; give three numbers"),
        (("--split", "a/b/c"), "is not a split"),
        (("--split", "80/20/0"), "split must be three numbers above 0"),
        (("--split", "nan/1/1"), "split must be three numbers above 0"),
        (("--data", "digits", "--size", "28"), "--size 28x28 is only for folder:PATH"),
        (("--data", "digits", "--split", "1/1/1"), "is only for folder:PATH"),
        (("--data", "folder:"), "does not name a folder"),
        (("--data", "folder:~nobody-of-this-name/x"), "does not name a folder"),
        (("--data", "folder:a\0b"), "does not name a folder"),
        (("--data", "folder:nothing"), "nothing' does not name a folder"),
    ],
)
def test_wrong_values_are_reported_before_anything_is_written(here, options, message, monkeypatch, capsys):
    assert call(monkeypatch, "train", "run", "--data", "folder:photos", *SHORT, *options) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith("error: ") and message in error and len(error.splitlines()) == 1 and "in Python" not in error
    )
    assert not (here / "run").exists()


def test_a_size_is_suggested_for_large_photographs(here, monkeypatch, capsys):
    for file in (here / "photos").rglob("*.png"):
        Image.new("1", (1200, 900)).save(file)
    assert call(monkeypatch, "train", "run", "--data", "folder:photos", *SHORT) == 1
    output = capsys.readouterr().err
    assert "is 900 x 1200 pixels" in output and output.rstrip().endswith("give a size, such as 224")


@pytest.mark.parametrize(
    ("network", "size", "message"),
    [
        ("b_lenet", 28, "gray images of 28 x 28; give --network b_resnet20-published --size 32"),
        ("b_alexnet", 64, "color images of 32 x 32; give --size 32, or a network of your own"),
        ("b_resnet20-published", 48, "color images of 32 x 32; give --size 32, or a network of your own"),
    ],
)
def test_networks_of_the_zoo_name_their_input_size(here, network, size, message, monkeypatch, capsys):
    data = ("--data", "folder:photos", "--size", size)
    assert call(monkeypatch, "train", "run", "--network", network, *data) == 1
    assert message in capsys.readouterr().err and not (here / "run").exists()


@pytest.mark.parametrize(("text", "size"), [("64", (64, 64)), ("48x64", (48, 64)), (" 3 X 5 ", (3, 5)), ("", None)])
def test_sizes(text, size):
    assert image_size(text) == size


@pytest.mark.parametrize("text", ["x", "3x4x5", "3.5", "٣", "9999999999", "0x3", "3x0"])
def test_wrong_sizes(text):
    with pytest.raises(InputError, match="is not a size"):
        image_size(text)


@pytest.mark.parametrize(("text", "split"), [("70/15/15", (70, 15, 15)), ("0.8, 0.1,.1", (0.8, 0.1, 0.1)), (" ", None)])
def test_splits(text, split):
    assert shares(text) == split
