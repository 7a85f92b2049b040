"""The ONNX Runtime engine: accepted calls, refused calls and files, and concurrent calls."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from branchynet.deploy.assembly import assemble
from branchynet.deploy.engine import FORMAT, METADATA_KEY
from branchynet.deploy.loading import load, verify
from branchynet.deploy.stored_samples import read_samples
from branchynet.errors import BranchyNetError, FileError, InputError
from branchynet.onnx_files import read_model
from branchynet.policy.prediction import Prediction
from branchynet.policy.values import Policy
from helpers.loop import same
from helpers.networks import draw, tokens, two_inputs
from helpers.onnx_graphs import Sketch, flat_lenet, flat_of, hasty_threads
from helpers.wrong_calls import IMAGE, VECTOR, WRONG_INPUTS, WRONG_THRESHOLDS

OWN = (0.9, 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engine")


def open_engine(folder, policy, name="model", flat=None, **options):
    flat = flat or flat_of(two_inputs)[2]
    ir.save(assemble(flat, policy, **options), folder / f"{name}.onnx")
    return load(folder / f"{name}.onnx", threads=1)


@pytest.fixture(scope="module")
def engine(folder):
    return open_engine(folder, Policy(thresholds=OWN))


@pytest.fixture(scope="module")
def model_file(engine, folder):
    """The file of `engine`."""
    return folder / "model.onnx"


def arrays(rows, seed=0):
    return [t.numpy() for t in draw(flat_of(two_inputs)[1], rows, seed)]


# Description and predictions


def test_inputs_are_described(engine):
    assert [(i.name, i.dtype, i.shape) for i in engine.inputs] == [
        ("image", np.float32, (2, 8, 8)),
        ("vector", np.float32, (5,)),
    ]
    assert [str(i) for i in engine.inputs] == ["image: float32 (B, 2, 8, 8)", "vector: float32 (B, 5)"]
    assert engine.num_exits == 3 and engine.labels == () and engine.policy == Policy(thresholds=OWN)


@pytest.mark.parametrize("rows", [0, 1, 2, 9])
def test_predictions_have_their_documented_shapes_and_types(engine, rows):
    answer = engine(*arrays(rows))
    assert isinstance(answer, Prediction)
    assert [a.shape for a in answer] == [(rows,), (rows,), (rows,), (rows, 4)]
    assert [a.dtype for a in answer] == [np.int64, np.int64, np.float32, np.float32]
    same(answer, engine.outputs(*arrays(rows)))


def test_flat_files_give_empty_batches_too(folder):
    engine = open_engine(folder, None, "flat")
    for rows in (0, 2):
        assert [a.shape for a in engine.outputs(*arrays(rows))] == [(rows,), (rows, 4), (rows, 4), (rows, 4)]
        assert [a.shape for a in engine(*arrays(rows))] == [(rows,), (rows,), (rows,), (rows, 4)]


def test_strided_arrays_are_read_correctly(engine):
    image, vector = arrays(6)
    views = np.asfortranarray(image), np.ascontiguousarray(vector[::-1])[::-1]
    assert not any(view.flags.c_contiguous for view in views)
    same(engine(*views), engine(image, vector))


@pytest.mark.parametrize(
    "given_as", [OWN, [0.3, None], (None, 1.2), [None, None], np.array([1.1, 0.7]), [np.inf, 0.0], [1e39, 0.0]]
)
@pytest.mark.parametrize("required", [False, True])
def test_thresholds_of_a_call_act_like_those_of_a_file(folder, given_as, required):
    how = {"thresholds": "input"} if required else {}
    free = open_engine(folder, Policy(thresholds=OWN), "free", **how)
    never = [-1.0 if t is None else min(t, 3e38) for t in given_as]  # entropies are not negative: never below -1
    baked = open_engine(folder, Policy(thresholds=never), "baked")
    x = arrays(24)
    same(free(*x, thresholds=given_as), baked(*x))
    same(free(*x), open_engine(folder, Policy(thresholds=OWN), "own")(*x))
    assert len({*free(*x).exit}) == 3


def test_an_exit_left_out_needs_none_as_its_threshold(folder):
    engine = open_engine(folder, Policy(thresholds=(None, 1.0)), "without")
    same(engine(*arrays(9)), engine(*arrays(9), thresholds=[None, 1.0]))
    assert 1 not in engine(*arrays(24)).exit
    with pytest.raises(InputError, match=r"exit 1 was left out.*None"):
        engine(*arrays(9), thresholds=[0.5, 1.0])


# Refused calls


@pytest.mark.parametrize(("given_as", "message"), WRONG_INPUTS)
def test_wrong_inputs_are_named(engine, given_as, message):
    for call in (engine, engine.outputs):
        with pytest.raises(InputError, match=message):
            call(*given_as)


def test_integer_types_are_distinguished(folder):
    engine = open_engine(folder, Policy(thresholds=OWN), "tokens", flat_of(tokens)[2])
    ids = np.zeros((2, 7), np.int64)
    assert len(engine(ids).exit) == 2
    with pytest.raises(InputError, match=r"'ids' is int32 .*ids: int64 \(B, 7\)"):
        engine(ids.astype(np.int32))


@pytest.mark.parametrize(("given_as", "message", "rows"), WRONG_THRESHOLDS)
def test_wrong_thresholds_are_named(engine, given_as, message, rows):
    with pytest.raises(InputError, match=message):
        engine(IMAGE[:rows], VECTOR[:rows], thresholds=given_as)


def test_a_flat_file_takes_no_thresholds(folder):
    with pytest.raises(InputError, match="policy=None"):
        open_engine(folder, None, "flat")(IMAGE, VECTOR, thresholds=OWN)


def test_a_file_for_one_sample_refuses_two(folder):
    sketch = Sketch(dynamic=False)
    x = sketch.input("x", 4)
    first = sketch.op("Relu", x, shape=[1, 4])
    last = sketch.op("Neg", first, shape=[1, 4])
    flat = sketch.flat([first, last], [sketch.total(first), sketch.total(last)])
    engine = open_engine(folder, Policy(thresholds=(4.0,)), "one", flat)
    assert engine(np.full((1, 4), 0.5, np.float32)).exit.tolist() == [1]
    assert engine(np.full((1, 4), 1.0, np.float32)).exit.tolist() == [2]
    assert engine(np.ones((0, 4), np.float32)).output.shape == (0, 4)
    with pytest.raises(InputError, match=r"one sample per call; got 2.*free='batch'"):
        engine(np.ones((2, 4), np.float32))
    rows = np.array([[0.5] * 4, [1.0] * 4, [0.25] * 4], np.float32)
    one_by_one = zip(*(engine(row[None]) for row in rows), strict=True)
    same(engine.answer_all(rows), Prediction(*map(np.concatenate, one_by_one)))
    assert engine.answer_all(rows[:0]).output.shape == (0, 4)


def test_answer_all_takes_any_number_of_samples(engine):
    generator = np.random.default_rng(0)
    images, vectors = (generator.normal(0, 2, (7, *a.shape[1:])).astype(np.float32) for a in (IMAGE, VECTOR))

    same(engine.answer_all(images, vectors, rows=3), engine(images, vectors))


# Files


def test_wrong_options_are_named(engine, model_file):
    path = model_file
    for threads in (0, -1, True, False, 2.0, "1"):
        with pytest.raises(InputError, match=rf"threads must be (at least 1|a whole number); got {threads!r}"):
            load(path, threads=threads)
    for threads in (1025, 10**12, 2**80):
        with pytest.raises(InputError, match=f"threads must be at most 1024; got {threads}"):
            load(path, threads=threads)
    for providers in (["AbacusExecutionProvider"], "AbacusExecutionProvider"):
        with pytest.raises(InputError, match=r"'AbacusExecutionProvider'.*CPUExecutionProvider"):
            load(path, providers=providers)
    for providers in (["CPUExecutionProvider"], "CPUExecutionProvider", (), None):
        same(load(path, threads=2, providers=providers)(IMAGE, VECTOR), engine(IMAGE, VECTOR))


def test_a_missing_gpu_is_reported_and_not_replaced_by_the_cpu(model_file, monkeypatch):
    path = model_file
    with pytest.raises(InputError, match=r"has no 'CUDAExecutionProvider'.*CPUExecutionProvider"):
        load(path, runtime="onnxruntime-cuda")
    # A GPU build on a machine without a GPU silently continues with the other providers.
    both, session = ["CUDAExecutionProvider", "CPUExecutionProvider"], onnxruntime.InferenceSession
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: both)
    monkeypatch.setattr(
        "onnxruntime.InferenceSession", lambda *args, providers: session(*args, providers=providers[1:])
    )
    with pytest.raises(InputError, match=r"cannot use 'CUDAExecutionProvider' on this machine"):
        load(path, runtime="onnxruntime-cuda")
    with pytest.raises(InputError, match="'onnxruntime-cuda' takes none"):
        load(path, runtime="onnxruntime-cuda", providers=both)


@pytest.mark.parametrize("ending", ["json", "txt", "textproto", "txtpb", "onnxtxt", "onnxjson", "ort", "pb", "x"])
def test_a_file_is_read_by_its_content_under_any_name(model_file, tmp_path, ending):
    for name, content in {"text": b"<ir_version: 8>", "json": b'{"irVersion": "8"}', "empty": b""}.items():
        path = tmp_path / f"{name}.{ending}"
        path.write_bytes(content)
        for read in (load, verify, read_samples, read_model):
            if content or read in (load, verify):  # an empty file is an empty protobuf message
                with pytest.raises(FileError, match=path.name):
                    read(path)
    path = tmp_path / f"sound.{ending}"
    path.write_bytes(model_file.read_bytes())
    assert read_model(path) == onnx.load(model_file)
    same(load(path)(IMAGE, VECTOR), load(model_file)(IMAGE, VECTOR))
    with pytest.raises(FileError, match="holds no samples"):
        verify(path)


def test_an_empty_path_is_no_file():
    for read in (load, verify):
        with pytest.raises(FileError, match="empty path"):
            read("")


def test_missing_and_foreign_files_are_refused(folder, model_file, tmp_path):
    with pytest.raises(FileError, match=r"no file .*none\.onnx.*export"):
        load(folder / "none.onnx")
    with pytest.raises(FileError, match=r"it is a folder; load the file in it, .*model.onnx"):
        load(folder)
    with pytest.raises(FileError, match=r"the folder has no stages\.json"):
        load(tmp_path)
    text = folder / "text.onnx"
    for content in ("", "This is no model.\n", "\x00" * 100, json.dumps({"format": 1})):
        text.write_text(content)
        with pytest.raises(FileError, match=r"text\.onnx.*export"):
            load(text)
    foreign = folder / "foreign.onnx"
    onnx.save(ir.to_proto(flat_lenet()[1].model), foreign)
    with pytest.raises(FileError, match=r"foreign\.onnx was not written by BranchyNet.*export"):
        load(foreign)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": FORMAT + 1}, f"format {FORMAT + 1}, newer than {FORMAT}; upgrade"),
        ({"version": "9", "format": FORMAT}, r"lacks \['batch', 'exits'.*export"),
        ({"version": "9"}, r"lacks .*'format'"),
        ("{", "cannot be read .*export"),
        ("[]", "lacks"),
        ("[1, 2]", "cannot be read"),
        ({"format": "one"}, "cannot be read"),
    ],
)
def test_unreadable_and_newer_metadata_are_refused(folder, model_file, metadata, message):
    model = onnx.load(model_file)
    value = metadata if isinstance(metadata, str) else json.dumps(metadata)
    onnx.helper.set_model_props(model, {METADATA_KEY: value})
    onnx.save(model, folder / "later.onnx")
    with pytest.raises(FileError, match=message) as raised:
        load(folder / "later.onnx")
    assert "later.onnx" in str(raised.value)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_truncated_file_is_never_opened(folder, model_file, data):
    content = model_file.read_bytes()
    # Weights fill the middle. At the ends a cut may fall between two fields of the model, so try these as often.
    near = st.integers(1, 800).map(lambda n: len(content) - n)
    length = data.draw(st.one_of(st.integers(0, len(content) - 1), near, st.integers(0, 100)))
    path = folder / "truncated.onnx"
    path.write_bytes(content[:length])
    with pytest.raises(FileError, match=r"truncated\.onnx"):
        load(path)


def test_every_error_is_a_branchynet_error(engine, model_file):
    for wrong in (lambda: engine(), lambda: load(model_file.parent / "none"), lambda: load(model_file, threads=0)):
        with pytest.raises(BranchyNetError):
            wrong()


# Threads


def test_threads_do_not_disturb_each_other(folder):
    """Concurrent calls of one engine with different inputs, batch sizes and thresholds."""
    engine = open_engine(folder, Policy(thresholds=OWN), "threads")
    numbers = np.random.default_rng(0)
    calls = []
    for _ in range(200):
        x = arrays(int(numbers.choice([0, 1, 2, 7, 33])), seed=int(numbers.integers(9)))
        calls.append((x, None if numbers.random() < 0.3 else numbers.uniform(0, 1.4, 2).tolist()))

    def answer(call):
        x, thresholds = call
        return engine(*x, thresholds=thresholds)

    expected = [answer(call) for call in calls]
    assert {int(n) for prediction in expected for n in prediction.exit} == {1, 2, 3}
    with hasty_threads(), ThreadPoolExecutor(12) as pool:
        for ours, theirs in zip(pool.map(answer, calls), expected, strict=True):
            same(ours, theirs)
