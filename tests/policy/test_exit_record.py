"""Records: shapes, parts, and files."""

import dataclasses
import math
import pickle
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from branchynet.errors import FileError, InputError
from branchynet.policy.exit_record import ExitRecord
from helpers.values import a_record, full_disk, npz


class TestExitRecord:
    def test_outputs_and_scores_are_not_both_taken(self):
        record = a_record()
        with pytest.raises(InputError, match="not both"):
            ExitRecord(record.outputs, record.labels, scores=np.zeros((6, 3)))

    def test_losses_are_wrong_answers(self):
        record = ExitRecord([[[0, 1], [1, 0]], [[5, 4], [1, 2]]], [1, 1])
        assert record.losses.tolist() == [[0, 1], [1, 0]]
        assert (record.samples, record.num_exits) == (2, 2)
        assert record.outputs.dtype == record.losses.dtype == np.float32 and record.labels.dtype == np.int64

    def test_from_scores(self):
        record = ExitRecord.from_scores([[0.5, math.nan]], [[0.25, 1]])
        assert record.scores.dtype == record.losses.dtype == np.float32
        assert record.losses.tolist() == [[0.25, 1]] and record.outputs is None and record.labels is None
        assert (record.samples, record.num_exits) == (1, 2)

    @pytest.mark.parametrize(
        ("outputs", "labels", "message"),
        [
            (np.zeros((0, 2, 3)), np.zeros(0, int), r"outputs must have shape \(S, N, C\).*\(0, 2, 3\)"),
            (np.zeros((2, 3)), [0, 0], r"\(S, N, C\).*\(2, 3\)"),
            (np.zeros((2, 2, 3)), [0], r"labels must be integers of shape \(2,\).*\(1,\)"),
            (np.zeros((2, 2, 3)), [0.0, 1.0], r"labels must be integers.*float64"),
            (np.zeros((2, 2, 3)), None, r"labels must be integers"),
            (np.zeros((2, 2, 3)), [0, 3], r"labels lie in 0\.\.3, but outputs have 3 classes"),
            (np.zeros((2, 2, 3)), [-1, 0], r"labels lie in -1\.\.0"),
            ([[[0, 1], [0, math.nan]]], [0], r"outputs holds nan at sample 0, exit 2"),
            ([[[0, 1]], [[-math.inf, -math.inf]]], [0, 0], r"outputs holds -inf at sample 1, exit 1"),
            ([[[0, 1e300]]], [0], r"outputs holds inf at sample 0"),
        ],
    )
    def test_wrong_outputs(self, outputs, labels, message):
        with pytest.raises(InputError, match=message):
            ExitRecord(outputs, labels)

    @pytest.mark.parametrize(
        ("scores", "losses", "message"),
        [
            (np.zeros((0, 2)), np.zeros((0, 2)), r"scores must have shape \(S, N\) with at least one sample"),
            (np.zeros((2, 2)), np.zeros((2, 3)), r"scores \(2, 2\) and losses \(2, 3\)"),
            (np.zeros((1, 1)), [[1.5]], r"losses must lie in \[0, 1\]; got 1.5..1.5"),
            (np.zeros((1, 1)), [[-0.5]], r"losses must lie in"),
            (np.zeros((1, 1)), [[math.nan]], r"losses holds nan at sample 0, exit 1"),
        ],
    )
    def test_wrong_scores(self, scores, losses, message):
        with pytest.raises(InputError, match=message):
            ExitRecord.from_scores(scores, losses)

    def test_nothing_given(self):
        with pytest.raises(InputError, match="outputs and labels, or scores and losses"):
            ExitRecord(None, None)

    def test_is_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            a_record().outputs = None

    def test_digest_depends_on_the_data(self):
        record = a_record()
        assert record.digest == a_record().digest
        changed = record.outputs.copy()
        changed[0, 0, 0] += 1
        zeros = ExitRecord.from_scores(np.zeros((2, 3)), np.zeros((2, 3)))
        others = [
            ExitRecord(changed, record.labels),
            ExitRecord(record.outputs, (record.labels + 1) % 4),
            ExitRecord(record.outputs[:5], record.labels[:5]),
            zeros,
            ExitRecord.from_scores(np.zeros((2, 3)), np.ones((2, 3))),
            ExitRecord.from_scores(np.zeros((3, 2)), np.zeros((3, 2))),
        ]
        assert len({record.digest, *(o.digest for o in others)}) == 7
        assert ExitRecord(np.asfortranarray(record.outputs), record.labels).digest == record.digest

    @settings(max_examples=25, deadline=None)
    @given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
    def test_round_trip(self, samples, exits, classes, seed):
        rng = np.random.default_rng(seed)
        record = ExitRecord(rng.normal(size=(samples, exits, classes)) * 1e3, rng.integers(0, classes, samples))
        with tempfile.TemporaryDirectory() as folder:
            record.save(f"{folder}/record.npz")
            again = ExitRecord.load(f"{folder}/record.npz")
        assert again.digest == record.digest and np.array_equal(again.losses, record.losses)

    def test_saves_and_loads_both_kinds(self, tmp_path):
        scored = ExitRecord.from_scores([[0.5, math.nan], [math.inf, 0]], [[0.25, 1], [0, 0]])
        for record in (a_record(), scored):
            record.save(tmp_path / "made" / "record.npz")
            again = ExitRecord.load(tmp_path / "made" / "record.npz")
            assert again.digest == record.digest and np.array_equal(again.losses, record.losses)
            assert (again.outputs is None) == (record.outputs is None)
        assert [p.name for p in (tmp_path / "made").iterdir()] == ["record.npz"]

    def test_damaged_files(self, tmp_path):
        """A truncated file or a flipped bit raises `FileError`; an unused bit changes nothing."""
        record, path = a_record(), tmp_path / "record.npz"
        record.save(path)
        good, rng = path.read_bytes(), np.random.default_rng(0)
        refused = 0
        for size in range(0, len(good), 7):
            path.write_bytes(good[:size])
            with pytest.raises(FileError, match=r"record\.npz"):
                ExitRecord.load(path)
        for _ in range(400):
            damaged = bytearray(good)
            damaged[rng.integers(len(good))] ^= 1 << rng.integers(8)
            path.write_bytes(damaged)
            try:
                assert ExitRecord.load(path).digest == record.digest
            except FileError:
                refused += 1
        assert refused > 200

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "make it again"),
            (b"hello", "make it again"),
            (pickle.dumps({"outputs": 1}), "make it again"),
            (npz(weights=np.zeros(3)), r"holds \['weights'\], which is no ExitRecord"),
            (npz(outputs=np.zeros((2, 3)), labels=np.zeros(2, int)), r"\(S, N, C\)"),
            (npz(outputs=np.array([[["a"]]]), labels=np.zeros(1, int)), "must be real numbers"),
            (npz(scores=np.zeros((2, 3)), losses=np.full((2, 3), 7)), "losses must lie"),
        ],
    )
    def test_foreign_files(self, tmp_path, content, message):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(FileError, match=message):
            ExitRecord.load(tmp_path / "x.npz")

    def test_a_bare_array(self, tmp_path):
        np.save(tmp_path / "x.npy", np.zeros(3))
        with pytest.raises(FileError, match="make it again"):
            ExitRecord.load(tmp_path / "x.npy")

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileError, match=r"none\.npz"):
            ExitRecord.load(tmp_path / "none.npz")

    def test_never_unpickles(self, tmp_path):
        class Trap:
            def __reduce__(self):
                return (TestExitRecord.spring, ())

        TestExitRecord.sprung = False
        np.savez(tmp_path / "x.npz", outputs=np.array([Trap()], object), labels=np.zeros(1, int))
        with pytest.raises(FileError, match="Object arrays cannot be loaded"):
            ExitRecord.load(tmp_path / "x.npz")
        assert not TestExitRecord.sprung
        np.load(tmp_path / "x.npz", allow_pickle=True)["outputs"]  # loading with pickle would run the code
        assert TestExitRecord.sprung

    sprung = False

    @staticmethod
    def spring():
        TestExitRecord.sprung = True

    def test_full_disk_leaves_the_old_file(self, tmp_path):
        path = tmp_path / "record.npz"
        old = a_record()
        old.save(path)
        with full_disk(2000), pytest.raises(FileError, match=r"cannot write .*record\.npz.*free some space"):
            a_record(samples=2000).save(path)
        assert ExitRecord.load(path).digest == old.digest
        assert [p.name for p in tmp_path.iterdir()] == ["record.npz"]
