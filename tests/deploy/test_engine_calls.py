"""Calls of an engine in every runtime: order and names of inputs, tensors, and many samples."""

import copy
import importlib.util
import os
import pickle
from collections import UserDict

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from branchynet import Policy, attach, export, load
from branchynet.deploy import checksum, input_checks
from branchynet.deploy.assembly import assemble
from branchynet.deploy.torch_engine import TorchEngine
from branchynet.errors import FileError, InputError
from branchynet.graph.activation_memory import sample_bytes
from branchynet.graph.onnx_flat import flatten
from helpers.loop import same
from helpers.networks import draw, two_inputs
from helpers.onnx_graphs import Sketch, flat_of

OWN = (0.9, 1.0)
RUNTIMES = ["onnxruntime"] + ["openvino"] * (importlib.util.find_spec("openvino") is not None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("calls")


@pytest.fixture(scope="module")
def file(folder):
    ir.save(assemble(flat_of(two_inputs)[2], Policy(thresholds=OWN)), folder / "model.onnx")
    return folder / "model.onnx"


@pytest.fixture(scope="module", params=[*RUNTIMES, "torch"])
def engine(request, file):
    net, example, _ = flat_of(two_inputs)
    if request.param == "torch":
        return TorchEngine(net, Policy(thresholds=OWN), example)
    return load(file, threads=1, runtime=request.param)


@pytest.fixture(scope="module", params=RUNTIMES)
def opened(request, file):
    return load(file, threads=1, runtime=request.param)


def tensors(rows):
    return draw(flat_of(two_inputs)[1], rows, 0)


# One call


def test_inputs_may_come_by_name_in_a_mapping_and_as_tensors(engine):
    image, vector = tensors(7)
    want = engine(image.numpy(), vector.numpy())
    assert len({*want.exit}) > 1
    same(engine(vector=vector.numpy(), image=image.numpy()), want)
    same(engine(image.numpy(), vector=vector.numpy()), want)
    same(engine({"vector": vector, "image": image}), want)
    same(engine(UserDict(image=image), vector=vector.numpy()), want)
    same(engine(image.requires_grad_(), vector), want)
    same(engine({"image": image, "vector": vector}, thresholds=OWN), want)


@pytest.mark.parametrize(
    ("positional", "named", "message"),
    [
        (
            ["image"],
            {"vectors": "vector"},
            r"1 inputs .* by position and \['vectors'\] by name.*vector: float32 \(B, 5\)",
        ),
        (["image", "vector"], {"image": "image"}, r"2 inputs .* by position and \['image'\] by name"),
        (["image"], {"image": "image"}, r"1 inputs .* by position and \['image'\] by name"),
        ([], {"vector": "vector"}, r"0 inputs .* by position and \['vector'\] by name"),
        (["image", "vector"], {"threshold": "vector"}, r"\['threshold'\] by name"),
    ],
)
def test_wrong_names_are_reported(engine, positional, named, message):
    given = dict(zip(("image", "vector"), tensors(3), strict=True))
    with pytest.raises(InputError, match=message):
        engine(*(given[name] for name in positional), **{name: given[value] for name, value in named.items()})
    if not positional:
        with pytest.raises(InputError, match=message):
            engine({name: given[value] for name, value in named.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: image.double(), r"float64 \(3, 2, 8, 8\).*\.to\(torch\.float32\)"),
        (lambda image: image.bfloat16(), r"bfloat16 .*\.to\(torch\.float32\)"),
        (lambda image: (image * 255).to(torch.uint8).numpy(), r"uint8 .*\.astype\(numpy\.float32\)"),
        (lambda image: image[0], r"float32 \(2, 8, 8\).*batch dimension: array\[None\]"),
        (lambda image: image[0].numpy(), r"array\[None\]"),
        (lambda image: image.tolist(), r"is list.*numpy\.asarray\(\.\.\., numpy\.float32\)"),
        (lambda image: image.to_sparse(), "image"),
        (lambda image: image.permute(0, 2, 3, 1), r"float32 \(3, 8, 8, 2\); the network reads image: float32"),
        (lambda image: image.sum(), r"'image' is float32 \(\)"),
        (lambda image: None, "'image' is NoneType"),
    ],
)
def test_wrong_inputs_are_reported_with_a_remedy(engine, change, message):
    image, vector = tensors(3)
    if engine.__class__ is TorchEngine and message == "image":
        return  # PyTorch refuses it
    with pytest.raises(InputError, match=message):
        engine(change(image), vector)


def test_right_inputs_are_checked_once(opened, monkeypatch):
    monkeypatch.delattr(input_checks, "_mended")
    image, vector = (t.numpy() for t in tensors(5))
    for rows in (0, 1, 5):
        opened(image[:rows], vector[:rows])


# Many samples


@pytest.mark.parametrize("rows", [-1, 0, -5, 2.5, "64", (3,), np.float32(4), True])
def test_wrong_numbers_of_rows_are_refused(opened, rows):
    with pytest.raises(InputError, match="rows must be"):
        opened.answer_all(*tensors(4), rows=rows)


def test_unequal_batch_sizes_are_refused_before_any_call(opened):
    image, vector = (t.numpy() for t in tensors(600))
    for samples in ((512, 600), (600, 512), (256, 0)):
        with pytest.raises(InputError, match=rf"batch sizes \[{samples[0]}, {samples[1]}\]"):
            opened.answer_all(image[: samples[0]], vector[: samples[1]], rows=256)


def test_answer_all_takes_every_form_of_inputs(opened):
    image, vector = tensors(11)
    for thresholds in (None, (0.3, None)):
        want = opened(image, vector, thresholds=thresholds)
        for given, named in (
            ((image, vector), {}),
            ((image,), {"vector": vector}),
            (({"image": image, "vector": vector},), {}),
        ):
            answer = opened.answer_all(*given, **named, rows=np.int64(3), thresholds=thresholds)
            assert answer.exit.tolist() == want.exit.tolist()
            np.testing.assert_allclose(answer.output, want.output, atol=1e-5)


@pytest.mark.parametrize(("bytes_each", "most"), [(1, 256), (1 << 20, 256), (1 << 25, 8), (1 << 40, 1)])
def test_rows_are_chosen_by_memory(file, folder, bytes_each, most):
    model = onnx.load(file)
    for entry in model.metadata_props:
        if entry.key == "branchynet":
            known = f'"sample_bytes": {sample_bytes(flat_of(two_inputs)[2])}'
            assert known in entry.value
            entry.value = entry.value.replace(known, f'"sample_bytes": {bytes_each}')
    onnx.save(model, folder / "large.onnx")
    engine = load(folder / "large.onnx", threads=1)
    sizes, run = [], engine._run
    engine._run = lambda feeds: sizes.append(len(feeds["image"])) or run(feeds)
    samples = 2 * most + 1
    assert len(engine.answer_all(*tensors(samples)).exit) == samples
    assert sizes == [most, most, 1]


def test_sample_bytes_are_the_peak_in_use():
    sketch = Sketch()
    x = sketch.input("x", 100)  # 400 bytes
    wide = sketch.op("Concat", x, x, x, shape=[sketch.batch, 300], axis=1)  # 1200 bytes, while x is still needed
    narrow = sketch.op("Slice", wide, shape=[sketch.batch, 10])
    first = sketch.op("Neg", narrow, shape=[sketch.batch, 10])
    last = sketch.op("Slice", x, shape=[sketch.batch, 10])
    flat = sketch.flat([first, last], [sketch.total(first), sketch.total(last)])
    assert sample_bytes(flat) == 400 + 1200 + 40
    flat.model.graph.outputs.append(wide)  # kept to the end, while narrow and then last are computed
    assert sample_bytes(flat) == 400 + 1200 + 40 + 40


def test_sample_bytes_do_not_depend_on_the_batch_of_the_example():
    flat = flat_of(two_inputs)[2]
    inputs = 4 * (2 * 8 * 8 + 5)
    assert inputs < sample_bytes(flat) < 100 * inputs
    assert sample_bytes(flatten(flat_of(two_inputs)[0], tuple(tensors(5)), dynamic=False)) <= sample_bytes(flat)


# Copies


def copies(engine):
    return [pickle.loads(pickle.dumps(engine)), copy.deepcopy(engine), copy.copy(engine)]


@pytest.mark.parametrize("other", ["exported", "truncated", "gone"])
def test_a_copy_of_an_engine_refuses_a_changed_file(file, tmp_path, other):
    path = tmp_path / "model.onnx"
    path.write_bytes(file.read_bytes())
    checksum.seal(path)
    sealed = path.read_bytes()
    engine = load(path)
    stored = pickle.dumps(engine)
    path.unlink()
    if other == "exported":
        ir.save(assemble(flat_of(two_inputs)[2], Policy(thresholds=(0.5, 0.6))), path)
        checksum.seal(path)
        assert load(path).policy != engine.policy
    elif other == "truncated":
        path.write_bytes(sealed[:-10])
    for again in (lambda: pickle.loads(stored), lambda: copy.copy(engine), lambda: copy.deepcopy(engine)):
        with pytest.raises(FileError, match="has changed since" if other == "exported" else r"model\.onnx"):
            again()
    path.write_bytes(sealed)
    same(pickle.loads(stored)(*tensors(3)), engine(*tensors(3)))


def test_an_engine_pickles_and_copies_by_its_path(file, folder, monkeypatch):
    monkeypatch.chdir(folder)
    x = tensors(9)
    for how in ({}, {"threads": 1}, {"providers": [("CPUExecutionProvider", {})]}, *({"runtime": r} for r in RUNTIMES)):
        engine = load(file.name, **how)
        assert len(pickle.dumps(engine)) < 1000 + len(os.fspath(file))
        monkeypatch.chdir("/")
        for other in copies(engine):
            assert other is not engine and other.runtime == engine.runtime and other.policy == engine.policy
            same(other(*x), engine(*x))
        monkeypatch.chdir(folder)


def test_a_copy_reports_a_missing_file(file, folder):
    passing = folder / "passing.onnx"
    passing.write_bytes(file.read_bytes())
    engine = load(passing)
    stored = pickle.dumps(engine)
    passing.unlink()
    engine(*tensors(1))
    with pytest.raises(FileError, match=r"no file .*passing\.onnx"):
        pickle.loads(stored)


# Files that other tools have changed


def without_inputs(path, folder, gone):
    """A copy of the file with some default inputs turned into constants, as simplifiers do."""
    model = onnx.load(path)
    held = {t.name for t in model.graph.initializer} & gone
    kept = [i for i in model.graph.input if i.name not in held]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    onnx.save(model, folder / "simplified.onnx")
    return folder / "simplified.onnx"


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("policy", "gone", "free", "fixed"),
    [
        (OWN, {"threshold_1", "threshold_2"}, [], [OWN, (0.1, None), (0.9, 1.0)]),
        (OWN, {"threshold_2"}, [], [OWN, (None, None)]),
        ((None, 1.0), {"threshold_2"}, [], [(None, 0.5), (None, 1.0)]),
        (OWN, set(), [OWN, (0.3, None)], []),
    ],
)
def test_constant_thresholds_are_used_and_others_are_refused(folder, runtime, policy, gone, free, fixed):
    path = folder / "whole.onnx"
    ir.save(assemble(flat_of(two_inputs)[2], Policy(thresholds=policy)), path)
    x = tensors(24)
    whole = load(path, threads=1, runtime=runtime)
    engine = load(without_inputs(path, folder, gone), threads=1, runtime=runtime)
    assert engine.policy == whole.policy and engine(*x).exit.tolist() == whole(*x).exit.tolist()
    for thresholds in free:
        assert engine(*x, thresholds=thresholds).exit.tolist() == whole(*x, thresholds=thresholds).exit.tolist()
    for thresholds in fixed:
        with pytest.raises(InputError, match=rf"{min(gone)} is a constant in this file.*export again"):
            engine(*x, thresholds=thresholds)


class Unread(torch.nn.Module):
    """Reads `x`, and the named other inputs only in its last layer."""

    def __init__(self, *late):
        super().__init__()
        self.late, self.a, self.f = late, torch.nn.Linear(6, 8), torch.nn.Linear(8, 4)

    def forward(self, x, ids=None, mask=None):
        h = self.a(x).tanh()
        return self.f(h) + sum((given.sum(1, keepdim=True) * 0.1 for given in (ids, mask)[: len(self.late)]), 0.0)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("policy", [None, Policy(thresholds=(1.3,)), Policy(thresholds=(None,))], ids=str)
def test_unused_inputs_are_still_inputs(folder, runtime, policy):
    batch = {"x": torch.randn(8, 6), "ids": torch.arange(16).reshape(8, 2), "mask": torch.rand(8, 3)}
    net = attach(Unread(), ["a"], example=batch)
    path = export(net, folder / "unread.onnx", policy=policy, example=batch)
    engine = load(path, threads=1, runtime=runtime)
    assert [i.name for i in engine.inputs] == ["x", "ids", "mask"]
    only = export(net, folder / "only.onnx", policy=policy, example=batch["x"])
    np.testing.assert_allclose(engine(batch).output, load(only, threads=1)(batch["x"]).output, atol=1e-4)
    with pytest.raises(InputError, match="2 inputs given"):
        engine(batch["x"], batch["ids"])


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_external_weights_are_read_and_named_if_missing(file, folder, runtime):
    model = onnx.load(file)
    onnx.save(model, folder / "apart.onnx", save_as_external_data=True, location="apart.bin", size_threshold=64)
    assert (folder / "apart.bin").stat().st_size > 0
    x = tensors(9)
    same(load(folder / "apart.onnx", threads=1, runtime=runtime)(*x), load(file, threads=1, runtime=runtime)(*x))
    os.truncate(folder / "apart.bin", 100)
    with pytest.raises(FileError, match=r"apart\.onnx keeps in another file.*next to it"):
        load(folder / "apart.onnx", runtime=runtime)
    (folder / "apart.bin").unlink()
    with pytest.raises(FileError, match=r"apart\.onnx.*apart\.bin.*next to it"):
        load(folder / "apart.onnx", runtime=runtime)
