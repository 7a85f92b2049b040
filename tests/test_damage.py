"""Reading a damaged file returns what was written, or raises an error that names the file."""

import io
import json
import os
import zipfile

import numpy as np
import onnx
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.lib import format as npy
from torch import nn

from branchynet import export, load, verify
from branchynet.data import read_image
from branchynet.deploy import checksum
from branchynet.deploy.engine import METADATA_KEY
from branchynet.deploy.onnx_file import model_metadata
from branchynet.deploy.stored_samples import read_samples
from branchynet.errors import DataError, FileError, InputError
from branchynet.files import read_json
from branchynet.nn.network import BranchyNet
from branchynet.nn.weights import load_weights, save_weights
from branchynet.policy.exit_record import ExitRecord
from branchynet.policy.values import Policy
from branchynet.training.checkpoint import RunFolder
from branchynet.training.history import EpochRow, History

often = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ROW = EpochRow(1, 0.5, 0.1, 2.0, (0.5, 0.5), 2.0, (0.5, 0.5))
SETTINGS = {"epochs": 1, "batches": 3}


def network():
    torch.manual_seed(0)
    return BranchyNet(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), {"0": nn.Linear(6, 3)})


def record():
    rng = np.random.default_rng(0)
    return ExitRecord(rng.normal(size=(40, 2, 3)), np.arange(40) % 3, network="abc-def")


def answered(path):
    return load(path, threads=1)(np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4))


def save_training(path):
    net = network()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(2, 4))[1].sum().backward()
    optimizer.step()
    RunFolder(path.parent, SETTINGS).save(net, optimizer, [ROW], {"steps": 3, "scaler": None})


def load_training(path):
    net = network()
    optimizer = torch.optim.Adam(net.parameters())
    rows, progress = RunFolder(path.parent, SETTINGS).load(net, optimizer)
    state = {f"{i}.{k}": v for i, entries in optimizer.state_dict()["state"].items() for k, v in entries.items()}
    return rows, progress, {**net.state_dict(), **state}


def load_weights_of(path):
    net = network()
    load_weights(net, path)
    return net.state_dict()


def same(one, other):
    if isinstance(one, ExitRecord):
        return one.digest == other.digest and one.network == other.network
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(np.array_equal(one, other))


KINDS = {
    "record.npz": (lambda path: record().save(path), ExitRecord.load),
    "weights.safetensors": (lambda path: save_weights(network(), path), load_weights_of),
    "training.safetensors": (save_training, load_training),
    "model.onnx": (
        lambda path: export(network(), path, policy=Policy("entropy", (0.9,)), example=torch.rand(4, 4)),
        answered,
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def kept(request, tmp_path_factory):
    """A file of each kind with a checksum: its path, its bytes, its reader, and the value read."""
    save, read = KINDS[request.param]
    path = tmp_path_factory.mktemp("kept") / request.param
    save(path)
    return path, path.read_bytes(), read, read(path)


def noticed(path, read, right):
    """The reader returns the same value as before the damage, or raises an error that names the file."""
    try:
        found = read(path)
    except FileError as error:
        assert path.name in str(error)
    else:
        assert same(found, right)


@often
@given(data=st.data())
def test_damage_is_noticed(kept, data):
    """One flipped bit anywhere: the same answers, or an error that names the file."""
    path, content, read, right = kept
    damaged = bytearray(content)
    damaged[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged)
    noticed(path, read, right)


@often
@given(data=st.data())
def test_missing_added_and_exchanged_bytes_are_noticed(kept, data):
    path, content, read, right = kept
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    path.write_bytes(content[:start] + data.draw(st.binary(max_size=40)) + content[end:])
    noticed(path, read, right)


@given(content=st.binary(max_size=200))
@often
def test_what_is_something_else_is_refused(kept, content):
    path, _, read, _ = kept
    path.write_bytes(content)
    with pytest.raises(FileError, match=path.name):
        read(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize(
    "read",
    [*(read for _, read in KINDS.values()), read_json, History.load, lambda path: load(path, runtime="openvino")],
)
def test_a_pipe_is_refused_at_once(tmp_path, read):
    path = tmp_path / "training.safetensors"
    os.mkfifo(path)
    with pytest.raises(FileError, match="pipe"):
        read(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_among_images_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(DataError, match="not a regular file"):
        read_image(tmp_path / "x.png", (1, 4, 4))


# Files of earlier versions, and of other writers, have no checksum


def test_records_without_a_checksum_still_load(tmp_path):
    made = record()
    np.savez(tmp_path / "x.npz", outputs=made.outputs, labels=made.labels, network=np.array("abc-def"))
    assert same(ExitRecord.load(tmp_path / "x.npz"), made)


def test_weights_without_a_checksum_still_load(tmp_path):
    safetensors.torch.save_file(network().state_dict(), tmp_path / "x.safetensors")
    assert same(load_weights_of(tmp_path / "x.safetensors"), network().state_dict())


def test_exported_files_that_a_tool_wrote_anew_still_load(tmp_path):
    KINDS["model.onnx"][0](tmp_path / "x.onnx")
    right, model = answered(tmp_path / "x.onnx"), onnx.load(tmp_path / "x.onnx")
    onnx.save(model, tmp_path / "same.onnx")
    model.producer_name = "another tool"
    onnx.save(model, tmp_path / "changed.onnx")
    del model.metadata_props[[p.key for p in model.metadata_props].index(checksum.KEY)]
    onnx.save(model, tmp_path / "unsealed.onnx")
    for name in ("same", "changed", "unsealed"):
        assert same(answered(tmp_path / f"{name}.onnx"), right)


# Wrong content in a sound file


def members(path, **arrays):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in arrays.items():
            archive.writestr(f"{name}.npy", content)


def header(shape, descr="<f4"):
    stream = io.BytesIO()
    npy.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


LABELS = header((4,), "<i8") + np.arange(4).tobytes()


@pytest.mark.parametrize(
    "outputs",
    [
        header((10**12, 2, 2)),
        header((2**31, 2**31, 2**31)),
        header((4, 2, 4), "<U1") + b"\0" * 128,
        header((4, 2, 4), "|O"),
        header((4, 2, 4), "<m8[s]") + b"\0" * 256,
        b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16,
        b"\x93NUMPY\x09\x00",
        b"",
    ],
)
def test_records_that_lie_about_their_arrays_are_refused(tmp_path, outputs):
    members(tmp_path / "x.npz", outputs=outputs, labels=LABELS)
    with pytest.raises(FileError, match=r"x\.npz"):
        ExitRecord.load(tmp_path / "x.npz")


@pytest.mark.parametrize("kind", [np.complex64, "<U3", object, "<M8[s]"])
def test_records_are_of_real_numbers(kind):
    with pytest.raises(InputError, match="real numbers"):
        ExitRecord(np.ones((2, 2, 2)).astype(kind), np.array([0, 1]))


STATE = {
    "settings": [None, [], "x"],
    "rows": [None, {}, [1], [{}], [{"epoch": "one"}], [{"epoch": 1e999}]],
    "groups": [None, {}, [], [1], [{"lr": 1}], [{"params": [0, 1, 2, 3, 4, 5, 6, 7, 8]}]],
    "numbers": [None, [], {"x": {}}, {"0": 1}, {"-1.5": {}}],
    "progress": [None, [], 3],
}


@pytest.mark.parametrize(("part", "value"), [(part, value) for part, values in STATE.items() for value in values])
def test_training_states_of_wrong_types_are_refused(tmp_path, part, value):
    path = tmp_path / "training.safetensors"
    save_training(path)
    with safetensors.safe_open(path, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        state = json.loads(stored.metadata()["branchynet"])
    safetensors.torch.save_file(tensors, path, {"branchynet": json.dumps(state)})
    assert load_training(path)[0] == [ROW]
    safetensors.torch.save_file(tensors, path, {"branchynet": json.dumps({**state, part: value})})
    with pytest.raises(FileError, match=r"training\.safetensors"):
        load_training(path)


@pytest.mark.parametrize("name", ["optimizer.99.exp_avg", "optimizer.x.exp_avg"])
def test_optimizer_tensors_of_no_parameter_are_refused(tmp_path, name):
    path = tmp_path / "training.safetensors"
    save_training(path)
    with safetensors.safe_open(path, framework="pt") as stored:
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}
        metadata = {"branchynet": stored.metadata()["branchynet"]}
    safetensors.torch.save_file({**tensors, name: torch.ones(2)}, path, metadata)
    with pytest.raises(FileError, match=r"training\.safetensors"):
        load_training(path)


@pytest.mark.parametrize(
    "change",
    [
        {"exits": "two"},
        {"exits": 0},
        {"exits": 3},
        {"labels": "cat"},
        {"labels": [1, 2]},
        {"batch": 7},
        {"thresholds": None},
        {"output_shape": [None]},
        {"output_shape": [-1]},
        {"format": "1"},
        {"sample_bytes": "x"},
        {"sample_bytes": None},
        {"sample_bytes": [1]},
        {"sample_bytes": -1},
        {"sample_bytes": 1.5},
        {"selected_on": "abc"},
        {"selected_on": [1]},
        {"network": 3},
        {"promise": ["x"]},
        {"precision": "int8"},
        {"precision": {}},
        {"quantize": "int8"},
        {"quantize": {}},
        {"policy": []},
        {"policy": {"score": 3, "thresholds": [0.5]}},
        {"policy": {"score": "entropy", "thresholds": 0.5}},
        {"policy": {"score": "entropy", "thresholds": [[0.5]]}},
        {"policy": {"score": {"kind": "learned", "version": 1}, "thresholds": [0.5]}},
    ],
)
def test_metadata_of_wrong_types_are_refused(tmp_path, change):
    path = tmp_path / "x.onnx"
    KINDS["model.onnx"][0](path)
    model = onnx.load(path)
    (entry,) = (p for p in model.metadata_props if p.key == METADATA_KEY)
    entry.value = json.dumps({**json.loads(entry.value), **change})
    onnx.save(model, path)
    with pytest.raises(FileError, match=r"x\.onnx"):
        load(path)


@pytest.mark.parametrize("read", [load, verify, model_metadata, read_samples])
def test_a_flipped_bit_at_the_end_is_ours_to_tell(tmp_path, read):
    """If the damage renames the checksum's entry, the metadata may no longer be text."""
    path = tmp_path / "x.onnx"
    KINDS["model.onnx"][0](path)
    sound, named = path.read_bytes(), 0
    for place in range(len(sound) - 110, len(sound)):
        damaged = bytearray(sound)
        damaged[place] ^= 0x80  # the byte alone is not valid UTF-8
        path.write_bytes(damaged)
        try:
            read(path)
        except FileError as error:
            named += "x.onnx" in str(error)
    assert named > 0


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "7", '"x"', "{}", "[[1, 2]]"])
def test_metadata_that_are_no_object_are_refused(tmp_path, text):
    path = tmp_path / "x.onnx"
    KINDS["model.onnx"][0](path)
    model = onnx.load(path)
    (entry,) = (p for p in model.metadata_props if p.key == METADATA_KEY)
    entry.value = text
    onnx.save(model, path)
    with pytest.raises(FileError, match=r"x\.onnx"):
        load(path)


@often
@given(data=st.data())
def test_a_damaged_history_is_whole_or_refused(tmp_path, data):
    History((ROW,) * 3).save(tmp_path / "train.csv")
    content = (tmp_path / "train.csv").read_bytes()
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    (tmp_path / "train.csv").write_bytes(content[:start] + data.draw(st.binary(max_size=20)) + content[end:])
    try:
        History.load(tmp_path / "train.csv")
    except FileError as error:
        assert "train.csv" in str(error)
