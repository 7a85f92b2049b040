"""Models with weights in a second file beside them: as beyond 2 GB, at a lower limit, and one of 2.2 GB."""

import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from branchynet import export, load, verify
from branchynet.deploy import model_file
from branchynet.errors import FileError, GraphError
from branchynet.folders import remove_weights
from helpers.verified_files import INT8, TWO, images, network

NAME = re.compile(r"m\.onnx\.[0-9a-f]{16}\.weights")
RUNTIMES = ("onnxruntime", "openvino")


@pytest.fixture
def low_limit(monkeypatch):
    monkeypatch.setattr(model_file, "LIMIT", 4000)


def made(folder, *, factor=1.0, **options):
    net = network()
    net.backbone.fc.weight.data *= factor
    return export(net, folder / "m.onnx", **{"policy": TWO, "example": images(), **options})


def names(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("options", [{}, {"free": "none"}, {"policy": None}, {"precision": "fp16"}, INT8], ids=str)
def test_two_files_answer_as_one(tmp_path, monkeypatch, runtime, options):
    pytest.importorskip(runtime)
    (tmp_path / "one").mkdir()
    whole = load(made(tmp_path / "one", **options), threads=1, runtime=runtime)
    monkeypatch.setattr(model_file, "LIMIT", 4000)
    path = made(tmp_path, **options)
    weights = [name for name in names(tmp_path) if NAME.fullmatch(name)]
    assert names(tmp_path) == ["m.onnx", *weights, "one"] and len(weights) == 1
    assert path.stat().st_size < (tmp_path / "one" / "m.onnx").stat().st_size
    engine = load(path, threads=1, runtime=runtime)
    assert engine.metadata["weights"].keys() == {"file", "bytes", "sha256"}
    assert verify(path, runtime=runtime).passed
    x = images(1 if "free" in options else 16, 3)
    for one, other in zip(engine.outputs(x), whole.outputs(x), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_stages_keep_their_weights_beside_them(tmp_path, low_limit, runtime):
    pytest.importorskip(runtime)
    path = made(tmp_path, layout="stages")
    found = {name.split(".onnx.")[0] for name in names(path) if name.endswith(".weights")}
    assert found == {"stage_1", "stage_2", "stage_3"}
    assert verify(path, runtime=runtime).passed
    next(path.glob("stage_2.onnx.*.weights")).write_bytes(b"")
    with pytest.raises(FileError, match=r"stage_2\.onnx"):
        load(path, runtime=runtime)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("damage", ["missing", "short", "changed", "other"])
def test_missing_and_damaged_weights_are_named(tmp_path, low_limit, damage, runtime):
    pytest.importorskip(runtime)
    path = made(tmp_path)
    engine = load(path)
    (weights,) = tmp_path.glob("*.weights")
    content = bytearray(weights.read_bytes())
    if damage == "missing":
        weights.unlink()
    elif damage == "short":
        weights.write_bytes(content[:-1])
    elif damage == "changed":
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    else:  # of another export
        (tmp_path / "other").mkdir()
        made(tmp_path / "other", factor=2.0)
        shutil.copyfile(next((tmp_path / "other").glob("*.weights")), weights)
    with pytest.raises(FileError, match=rf"m\.onnx.*{re.escape(weights.name)}|{re.escape(weights.name)}.*m\.onnx"):
        load(path, runtime=runtime)
    with pytest.raises(FileError):
        pickle.loads(pickle.dumps(engine))


def test_the_pair_moves_together(tmp_path, low_limit):
    path = made(tmp_path)
    place = tmp_path / "elsewhere"
    place.mkdir()
    for file in list(tmp_path.glob("m.onnx*")):
        file.rename(place / file.name)
    assert verify(place / path.name).passed


def test_an_export_replaces_the_pair(tmp_path, monkeypatch):
    monkeypatch.setattr(model_file, "LIMIT", 4000)
    path = made(tmp_path)
    before = names(tmp_path)
    assert made(tmp_path) == path and names(tmp_path) == before, "the same weights keep their name"
    made(tmp_path, factor=2.0)
    assert len(names(tmp_path)) == 2 and names(tmp_path) != before and verify(path).passed
    monkeypatch.setattr(model_file, "LIMIT", 1 << 30)
    made(tmp_path)
    assert names(tmp_path) == ["m.onnx"] and verify(path).passed


@pytest.mark.parametrize("moment", ["check", "weights", "model"])
def test_a_failed_export_leaves_the_earlier_pair(tmp_path, low_limit, monkeypatch, moment):
    path = made(tmp_path)
    before, content = names(tmp_path), path.read_bytes()
    replace = Path.replace

    def fail(*_, **__):
        raise GraphError("no")

    def full(self, target):
        if Path(target).parent == tmp_path and (Path(target).name == "m.onnx") == (moment == "model"):
            raise OSError(28, "No space left on device")
        return replace(self, target)

    if moment == "check":
        monkeypatch.setattr(sys.modules[export.__module__], "check_answers", fail)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(GraphError if moment == "check" else FileError):
        made(tmp_path, factor=2.0)
    assert names(tmp_path) == before and path.read_bytes() == content and verify(path).passed


def test_only_weights_of_this_model_are_removed(tmp_path):
    hexadecimal = "0123456789abcdef"
    others = ["m.onnx", f"n.onnx.{hexadecimal}.weights", "m.onnx.weights", f"m.onnx.{hexadecimal}.weights.txt"]
    for name in (*others, f"m.onnx.{hexadecimal}.weights", f"m.onnx.{hexadecimal[::-1]}.weights"):
        (tmp_path / name).touch()
    remove_weights(tmp_path / "m.onnx", {f"m.onnx.{hexadecimal[::-1]}.weights"})
    assert names(tmp_path) == sorted([*others, f"m.onnx.{hexadecimal[::-1]}.weights"])


# 2.2 GB

MEMORY, DISK = 8, 6  # GB that the test needs

LARGE = """
import resource, sys
import torch
from torch import nn
from branchynet import BranchyNet, Policy, export, verify, load

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(1_100_000, 500, _weight=torch.zeros(1_100_000, 500))
        with torch.no_grad():
            self.table.weight[-100:] = torch.randn(100, 500)
        self.body, self.last = nn.Linear(500, 8), nn.Linear(8, 3)

    def forward(self, ids):
        return self.last(torch.relu(self.body(self.table(ids).mean(1))))

torch.manual_seed(0)
net = BranchyNet(Words(), {"body": nn.Linear(8, 3)}).eval()
ids = torch.randint(1_099_900, 1_100_000, (8, 5))
layout, runtime, path = sys.argv[1:]
export(net, path, policy=Policy(thresholds=(0.9,)), example=ids, layout=layout)
answer, outputs = load(path)(ids), net(ids)
expected = torch.stack([outputs[n - 1][s] for s, n in enumerate(answer.exit)])
assert (torch.from_numpy(answer.output) - expected).abs().max() < 1e-4
assert verify(path, runtime=runtime).passed
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""


def short_of(folder):
    """What this machine lacks for the test, or an empty string."""
    try:
        pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
        memory = int(line.split()[1]) / 1e6
    except (OSError, StopIteration, ValueError):
        memory = pages if "pages" in locals() else 0.0
    if memory < MEMORY:
        return f"{memory:.0f} GB of free memory, {MEMORY} needed"
    disk = shutil.disk_usage(folder).free / 1e9
    return "" if disk > DISK else f"{disk:.0f} GB of free disk, {DISK} needed"


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("layout", "runtime"), [("nested", "onnxruntime"), ("nested", "openvino"), ("stages", "onnxruntime")]
)
def test_a_network_of_more_than_two_gigabytes(tmp_path, layout, runtime):
    pytest.importorskip(runtime)
    if lack := short_of(tmp_path):
        pytest.skip(f"a network of 2.2 GB: {lack}")
    path = tmp_path / "large"
    try:
        done = subprocess.run(
            [sys.executable, "-c", LARGE, layout, runtime, str(path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        folder = path if layout == "stages" else tmp_path
        (weights,) = folder.glob("*.weights")
        assert weights.stat().st_size > 2.19e9
        assert float(done.stdout.split()[-1]) < MEMORY
    finally:
        shutil.rmtree(tmp_path)
