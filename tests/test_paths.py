"""Every verb that takes a path refuses, with an error of ours, what no file or folder can have as its path."""

import os

import numpy as np
import pytest
import torch
from torch import nn

from branchynet import Advice, Choice, ExitCost, ExitRecord, History, Policy, bench, data, export, fit, load, verify
from branchynet.errors import BranchyNetError, FileError, InputError
from branchynet.files import locked, read_json, write_json
from branchynet.folders import replacing_folder, replacing_with_weights
from branchynet.nn.network import BranchyNet
from branchynet.nn.weights import load_weights, save_weights
from branchynet.runs.run import create_run, open_run
from branchynet.runs.settings import Settings

X = torch.randn(8, 4)
RECORD = ExitRecord(np.zeros((2, 2, 3)), np.zeros(2, np.int64))


def network():
    return BranchyNet(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), {"1": nn.Linear(4, 3)})


def exported(path, **options):
    return export(network(), path, policy=Policy(thresholds=(0.5,)), example=X, **options)


def entered(context):
    with context:
        pytest.fail("the path was accepted")


VERBS = {
    "export": exported,
    "export stages": lambda path: exported(path, layout="stages"),
    "load": load,
    "load in OpenVINO": lambda path: load(path, runtime="openvino"),
    "verify": verify,
    "bench": lambda path: bench(path, network(), (X, torch.zeros(8, dtype=torch.int64))),
    "fit": lambda path: fit(network(), [(X, torch.zeros(8, dtype=torch.int64))], epochs=1, run=path, progress=False),
    "save weights": lambda path: save_weights(network(), path),
    "load weights": lambda path: load_weights(network(), path),
    "save a record": RECORD.save,
    "load a record": ExitRecord.load,
    "load a cost": ExitCost.load,
    "load a choice": Choice.load,
    "load a history": History.load,
    "load an advice": Advice.load,
    "save an image": lambda path: data.save_image(np.zeros((1, 3, 3)), path),
    "read an image": lambda path: data.read_image(path, (1, 3, 3)),
    "find data": lambda path: data.load_data("mnist", root=path, download=False),
    "open a run": open_run,
    "create a run": lambda path: create_run(path, Settings(network="b_lenet", data="digits")),
    "write JSON": lambda path: write_json(path, 1),
    "read JSON": read_json,
    "lock a folder": lambda path: entered(locked(path)),
    "write a folder": lambda path: entered(replacing_folder(path, "a", "b")),
    "write two files": lambda path: entered(replacing_with_weights(path)),
}


class BytesPath(os.PathLike):
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return os.fsencode(self.path)


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda base: f"{base}/a\0b.png", "null"),
        (lambda base: base / ("a" * 300 + ".png"), "too long"),
        (lambda base: str(base / ("a" * 300) / "b.png"), "too long"),
        (lambda base: f"{base}/\ud800.png", r"surrogates not allowed"),
        (lambda base: BytesPath(base / "a.png"), r"bytes|b'/"),
    ],
    ids=["null byte", "long name", "long folder", "no character", "bytes"],
)
def test_paths_of_no_file_are_refused(tmp_path, verb, make, match):
    with pytest.raises(BranchyNetError, match=match):
        verb(make(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["export", "export stages", "load", "load in OpenVINO", "verify"])
def test_paths_that_no_runtime_can_open_are_named(tmp_path, verb):
    with pytest.raises(FileError, match=r"caf\\xe9\.onnx is not valid UTF-8, so no runtime can open it; rename it"):
        VERBS[verb](tmp_path / "caf\udce9.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", ["nested", "stages"])
def test_paths_in_other_alphabets_work(tmp_path, layout):
    path = exported(tmp_path / "сеть 网络.onnx", layout=layout)
    assert load(path, threads=1)(X).label.shape == (8,) and verify(path).passed


def test_bytes_are_no_path(tmp_path):
    for path in (b"a.onnx", BytesPath(tmp_path / "a.onnx")):
        with pytest.raises(InputError, match=r"path must be .*b(ytes|')"):
            load(path)
