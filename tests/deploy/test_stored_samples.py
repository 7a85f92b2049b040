"""The samples in a file: how many it holds, and damaged ones."""

import base64
import io

import numpy as np
import onnx
import pytest

from branchynet import export, load, verify
from branchynet.deploy import stored_samples as stored_samples
from branchynet.deploy.stored_samples import SAMPLES_KEY, Samples, pack, read_samples
from branchynet.errors import FileError, InputError
from helpers.verified_files import TWO, changed, every_kind, images, network, with_arrays


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return every_kind(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize(("given", "rows"), [(0, 0), (1, 1), (3, 3), (8, 8)])
def test_the_requested_number_of_samples_is_stored(tmp_path, given, rows):
    path = export(network(), tmp_path / "m.onnx", policy=TWO, example=images(12), samples=given)
    if rows:
        assert len(read_samples(path)) == rows and verify(path).samples == rows
        return
    assert SAMPLES_KEY not in {p.key for p in onnx.load(path).metadata_props}
    for call in (verify, lambda path: load(path, verify=True)):
        with pytest.raises(FileError, match=r"m\.onnx holds no samples.*samples=8"):
            call(path)


@pytest.mark.parametrize(
    ("given", "message"),
    [(-1, "not be negative; got -1"), (9, "at most 8; got 9"), (2.5, "got 2.5"), (None, "got None"), ("8", "got '8'")],
)
def test_another_number_is_refused(tmp_path, given, message):
    with pytest.raises(InputError, match=f"samples must .*{message}"):
        export(network(), tmp_path / "m.onnx", policy=TWO, example=images(), samples=given)
    assert not list(tmp_path.iterdir())


def test_fewer_large_samples_are_stored_and_none_of_the_largest(tmp_path, monkeypatch):
    each = images(1).numpy().nbytes + 3 * (5 + 1) * 4
    for budget, most, rows in ((4 * each, 100 * each, 4), (each // 2, each, 1)):
        monkeypatch.setattr(stored_samples, "_BYTES", budget)
        monkeypatch.setattr(stored_samples, "_MOST_BYTES", most)
        assert len(read_samples(export(network(), tmp_path / "m.onnx", policy=TWO, example=images()))) == rows
    monkeypatch.setattr(stored_samples, "_MOST_BYTES", each - 1)
    with pytest.raises(FileError, match="no samples"):
        verify(export(network(), tmp_path / "m.onnx", policy=TWO, example=images()))


@pytest.mark.parametrize("damage", [lambda t: "?" + t, lambda t: t[: len(t) // 8 * 4], lambda t: "AAAA", lambda t: "é"])
def test_damaged_samples_are_reported(files, tmp_path, damage):
    def change(model):
        entry = next(p for p in model.metadata_props if p.key == SAMPLES_KEY)
        entry.value = damage(entry.value)

    path = changed(files["nested"], tmp_path, change)
    assert load(path).num_exits == 3
    with pytest.raises(FileError, match=r"samples in .*changed\.onnx cannot be read.*export it again"):
        verify(path)


def each(name, function):
    """Change the arrays with this prefix."""
    return lambda arrays: arrays.update({k: function(a) for k, a in arrays.items() if k.startswith(name)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (each("slack", lambda a: np.float64(0)), r"slack is float64 \(\)"),
        (each("score_slack", lambda a: a[:1]), "slack for 3 exits and 1 scores"),
        (lambda a: (each("slack", lambda s: s[:2])(a), each("score_slack", lambda s: s[:2])(a)), "slack for 2 exits"),
        (each("slack", lambda a: a + np.nan), "slack is"),
        (each("slack", lambda a: a - 1), "slack is"),
        (each("slack", lambda a: a + 1e9), "slack is .*metadata"),
        (each("slack", lambda a: a + 0.1), "slack is .*metadata"),
        (each("score_slack", lambda a: a + 1e9), "slack of score 1 is 1e\\+09"),
        (each("output_2", lambda a: a[:3]), r"output 2 is float32 \(3, 5\)"),
        (each("output_2", lambda a: a[:, :3]), r"output 2 is float32 \(8, 3\)"),
        (each("output_3", lambda a: np.array(["x"] * len(a))), "output 3 is <U1"),
        (each("output_1", lambda a: a[0, 0]), r"output 1 is float32 \(\)"),
        (each("score_1", lambda a: a[:2]), r"score 1 is float32 \(2,\)"),
        (each("score_2", lambda a: a.astype("U4")), "score 2 is <U4"),
        (lambda a: a.pop("score_2"), "score 2 is"),
        (lambda a: a.pop("output_1"), "output 1 is"),
        (lambda a: a.pop("input_0"), "they have 0 inputs"),
        (lambda a: a.update(input_1=a["input_0"]), "they have 2 inputs"),
        (each("input_0", lambda a: a.astype("f8")), "input 'x' is float64"),
        (each("input_0", lambda a: a[:, :1]), "input 'x' is float32"),
        (
            lambda a: [each(name, lambda v: v[:0])(a) for name in ("input", "output", "score_1", "score_2", "score_3")],
            "0",
        ),
        (lambda a: a.clear(), "slack"),
    ],
)
@pytest.mark.parametrize("kind", ["nested", "int8"])
def test_samples_of_another_kind_are_damage(files, tmp_path, kind, change, message):
    path = with_arrays(files[kind], tmp_path, change)
    with pytest.raises(FileError, match=rf"samples in .*changed\.onnx cannot be read \(.*{message}.*export it again"):
        verify(path)
    with pytest.raises(FileError, match="cannot be read"):
        load(path, verify=True)


@pytest.mark.parametrize(
    ("kind", "other", "message"), [("nested", "flat", "a flat file"), ("flat", "nested", "early exits")]
)
def test_samples_of_another_file_are_damage(files, tmp_path, kind, other, message):
    text = next(p.value for p in onnx.load(files[other]).metadata_props if p.key == SAMPLES_KEY)

    def swap(model):
        next(p for p in model.metadata_props if p.key == SAMPLES_KEY).value = text

    with pytest.raises(FileError, match=message):
        verify(changed(files[kind], tmp_path, swap))


def test_samples_that_unpack_to_far_more_than_export_writes_are_not_unpacked(files, tmp_path, monkeypatch):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, slack=np.zeros(2**25), score_slack=np.zeros(1))

    def change(model):
        entry = next(p for p in model.metadata_props if p.key == SAMPLES_KEY)
        entry.value = base64.b64encode(buffer.getvalue()).decode()

    path = changed(files["nested"], tmp_path, change)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(FileError, match=r"would unpack to 268435.* bytes, more than 67108864"):
        read_samples(path)


def test_the_largest_samples_that_are_stored_can_be_read(monkeypatch):
    """One sample of the largest size, nearly all of it outputs, for each of which slack has a float64."""
    monkeypatch.setattr(stored_samples, "_MOST_BYTES", 2**14)
    monkeypatch.setattr(stored_samples, "_MOST_UNPACKED", 2**16)
    columns = 2**12 - 2
    outputs = (np.zeros((1, columns), np.float32),)
    slack = np.zeros((1, columns))
    text = pack(Samples((np.zeros((1, 1), np.float32),), outputs, (np.zeros(1, np.float32),), slack, (0.0,)), [1], 8)
    assert text
    assert stored_samples._unpack(base64.b64decode(text)).slack.shape == (1, columns)
