import contextlib
import dataclasses
import io
import json
import math
import pickle
import re
import resource
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from branchynet.design.advice import Advice, Design
from branchynet.errors import BranchyNetError, FileError, InputError
from branchynet.files import read_json, replacing, write_json
from branchynet.policy.exit_cost import ExitCost
from branchynet.policy.exit_record import ExitRecord
from branchynet.policy.fitted_scores import LearnedScore
from branchynet.policy.values import Choice, Outcome, Policy, Promise


def a_record(samples=6, exits=3, classes=4):
    rng = np.random.default_rng(0)
    return ExitRecord(rng.normal(size=(samples, exits, classes)), rng.integers(0, classes, samples))


def a_cost():
    return ExitCost((1.5, 2.0), (0.25, 0.0), (100, 200), (10, 0), batch_size=8, threads=2)


def a_choice():
    outcome = Outcome(4, 0.75, (0.3, 0.95), 0.75, (1.0, 0.0), (0.75, None), mean_us=1.75, mean_macs=110.0)
    return Choice(Policy("entropy", (0.1, None)), {"max_drop": 0.01}, outcome, "00ff")


@contextlib.contextmanager
def full_disk(limit):
    """Limit the size of files to `limit` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def npz(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


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


class TestExitCost:
    def test_stages_add_up_and_unused_branches_cost_nothing(self):
        cost = ExitCost((1, 2, 4), (10, 20, 40), (100, 200, 400), (1, 2, 3))
        assert cost.num_exits == 3
        assert cost.latency_us((True, True, True)).tolist() == [11, 33, 77]
        assert cost.latency_us((False, True, True)).tolist() == [1, 23, 67]
        assert cost.latency_us((False, False, True)).tolist() == [1, 3, 7]  # the plain network has no score
        assert cost.macs((True, False, True)).tolist() == [101, 301, 704]
        assert ExitCost((1,), (0,)).macs((True,)).tolist() == [0]

    def test_round_trip(self, tmp_path):
        a_cost().save(tmp_path / "cost.json")
        assert ExitCost.load(tmp_path / "cost.json") == a_cost()
        assert json.loads((tmp_path / "cost.json").read_text())["trunk_us"] == [1.5, 2.0]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (((1, 2), (1,)), "branch_us has 1 numbers but trunk_us has 2"),
            (((1, 2), (1, 2), (3,)), "trunk_macs has 1 numbers but trunk_us has 2"),
            (((), ()), "0 numbers"),
            (((1, -2), (1, 2)), "trunk_us must not be negative"),
            (((1, math.nan), (1, 2)), "trunk_us must be a finite"),
            (((1, 2), (1, math.inf)), "branch_us must be a finite"),
        ],
    )
    def test_wrong_numbers(self, arguments, message):
        with pytest.raises(InputError, match=message):
            ExitCost(*arguments)

    def test_wrong_flags(self):
        with pytest.raises(InputError, match="enabled has 1 flags for 2 exits"):
            a_cost().latency_us((True,))


class TestPolicy:
    def test_exits_and_enabled(self):
        policy = Policy("margin", (1, None))
        assert policy.thresholds == (1.0, None) and isinstance(policy.thresholds[0], float)
        assert policy.num_exits == 3 and policy.enabled == (True, False, True)

    def test_json(self):
        policy = Policy("margin", (0.5, None))
        assert policy.to_json() == {"score": "margin", "thresholds": [0.5, None]}
        assert Policy.from_json(policy.to_json()) == policy

        def my_score(outputs):
            return outputs[-1][:, 0]

        assert Policy(my_score, ()).to_json()["score"] == "my_score"

    @pytest.mark.parametrize("threshold", [math.nan, math.inf, -math.inf])
    def test_thresholds_must_be_finite(self, threshold):
        with pytest.raises(InputError, match="finite numbers, or None for never"):
            Policy("entropy", (threshold,))

    def test_score_must_be_a_name_or_callable(self):
        with pytest.raises(InputError, match="score must be a name or a callable; got 3"):
            Policy(3, ())


class TestChoice:
    def test_round_trip(self, tmp_path):
        a_choice().save(tmp_path / "choice.json")
        again = Choice.load(tmp_path / "choice.json")
        assert again == a_choice()
        assert isinstance(again.outcome, Outcome) and isinstance(again.outcome.exit_share, tuple)
        assert json.loads((tmp_path / "choice.json").read_text())["policy"]["thresholds"] == [0.1, None]

    @pytest.mark.parametrize(
        ("place", "value"),
        [
            (("policy", "thresholds"), [0.2, None]),
            (("constraint", "max_drop"), 0.001),
            (("record_digest",), "other"),
            (("samples",), "0" * 16),
            (("sha256",), None),
        ],
    )
    def test_an_edited_choice_is_refused(self, tmp_path, place, value):
        path = tmp_path / "choice.json"
        a_choice().save(path)
        content = json.loads(path.read_text())
        path.write_text(json.dumps(dict(reversed(content.items()))))  # the order of keys does not matter
        assert Choice.load(path) == a_choice()
        part = content
        for name in place[:-1]:
            part = part[name]
        assert part[place[-1]] != value
        part[place[-1]] = value
        path.write_text(json.dumps(content))
        with pytest.raises(FileError, match=r"choice\.json .*was edited.*make it again with `branchynet choose`"):
            Choice.load(path)
        del content["sha256"]  # as in the files of earlier versions
        path.write_text(json.dumps(content))
        assert (Choice.load(path) == a_choice()) == (place == ("sha256",))

    @pytest.mark.parametrize(
        ("name", "value"),
        [("trunk_us", [1.0, 3.0]), ("branch_macs", [5.0, 0.0]), ("network", "b"), ("batch_size", 2), ("sha256", None)],
    )
    def test_an_edited_cost_is_refused(self, tmp_path, name, value):
        path, cost = tmp_path / "cost.json", ExitCost((1.0, 2.0), (0.5, 0.0), (3.0, 4.0), (6.0, 0.0), network="a")
        cost.save(path)
        content = json.loads(path.read_text())
        path.write_text(json.dumps(dict(reversed(content.items()))))  # the order of keys does not matter
        assert ExitCost.load(path) == cost and content[name] != value
        path.write_text(json.dumps({**content, name: value}))
        with pytest.raises(FileError, match=r"cost\.json .*was edited.*measure it again"):
            ExitCost.load(path)
        del content["sha256"]  # as in the files of earlier versions
        path.write_text(json.dumps(content))
        assert ExitCost.load(path) == cost

    @pytest.mark.parametrize(
        ("name", "value"), [("limit", "x"), ("limit", "max_macs"), ("limit", ""), ("bound", "b"), ("bound", "Betting")]
    )
    def test_a_promise_has_a_known_limit_and_bound(self, tmp_path, name, value):
        fields = dataclasses.asdict(Promise("max_drop", 0.1, 0.95, "betting", 2, 2))
        assert "With 95% confidence" in str(Promise(**fields))
        with pytest.raises(InputError, match=f"unknown {name} '{value}' of a promise; take one of"):
            Promise(**{**fields, name: value})
        (tmp_path / "c.json").write_text(json.dumps({**GOOD, "promise": {**fields, name: value}}))
        with pytest.raises(FileError, match=rf"c\.json is no Choice .*unknown {name}"):
            Choice.load(tmp_path / "c.json")

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=4))
    def test_float32_thresholds_survive_json(self, thresholds):
        policy = Policy("entropy", tuple(thresholds))
        assert Policy.from_json(json.loads(json.dumps(policy.to_json()))) == policy


GOOD = {**dataclasses.asdict(a_choice()), "policy": a_choice().policy.to_json()}


class TestJsonFiles:
    @pytest.mark.parametrize("kind", [ExitCost, Choice])
    @pytest.mark.parametrize("content", ["", "[]", "{}", "3", "null", '"x"', '{"a": 1}', '{"trunk_us": [1', "\xff\xfe"])
    def test_foreign(self, tmp_path, kind, content):
        (tmp_path / "x.json").write_text(content, encoding="latin-1")
        with pytest.raises(FileError, match=r"x\.json"):
            kind.load(tmp_path / "x.json")

    @pytest.mark.parametrize(
        "content",
        [
            {"trunk_us": ["a"], "branch_us": [1]},
            {"trunk_us": 3, "branch_us": [1]},
            {"trunk_us": [[1]], "branch_us": [1]},
            {"trunk_us": [1], "branch_us": [-1]},
            {"trunk_us": [math.nan], "branch_us": [1]},
            {"trunk_us": [1], "branch_us": [1], "color": 1},
        ],
    )
    def test_wrong_cost(self, tmp_path, content):
        (tmp_path / "x.json").write_text(json.dumps(content))
        with pytest.raises(FileError, match=r"x\.json is (no ExitCost|not valid JSON)"):
            ExitCost.load(tmp_path / "x.json")

    @pytest.mark.parametrize(
        "change",
        [
            {"policy": 3},
            {"policy": {"score": "entropy"}},
            {"policy": {"score": "entropy", "thresholds": ["x"]}},
            {"policy": {"score": 3, "thresholds": [1]}},
            {"policy": {"score": "entropy", "thresholds": 3}},
            {"outcome": {}},
            {"outcome": 3},
            {"color": 1},
        ],
    )
    def test_wrong_choice(self, tmp_path, change):
        (tmp_path / "x.json").write_text(json.dumps({**GOOD, **change}))
        with pytest.raises(FileError, match=r"x\.json is no (Choice|Outcome)"):
            Choice.load(tmp_path / "x.json")
        (tmp_path / "x.json").write_text(json.dumps(GOOD))
        assert Choice.load(tmp_path / "x.json") == a_choice()

    def test_cut_short(self, tmp_path):
        path = tmp_path / "x.json"
        a_choice().save(path)
        good = path.read_text().rstrip()
        for size in range(0, len(good), 11):
            path.write_text(good[:size])
            with pytest.raises(FileError, match=r"x\.json"):
                Choice.load(path)

    def test_missing(self, tmp_path):
        with pytest.raises(FileError, match=r"cannot read .*none\.json: No such file"):
            ExitCost.load(tmp_path / "none.json")

    @pytest.mark.parametrize("value", [a_cost(), a_choice()])
    def test_full_disk_leaves_the_old_file(self, tmp_path, value):
        path = tmp_path / "x.json"
        path.write_text("old")
        with full_disk(50), pytest.raises(FileError, match=r"cannot write .*x\.json"):
            value.save(path)
        assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


class TestReplacing:
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_a_failed_block_leaves_the_old_file(self, tmp_path, error):
        path = tmp_path / "x.json"
        path.write_text("old")
        with pytest.raises(error), replacing(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "old"  # as after a kill
            raise error
        assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1

    def test_the_old_file_is_replaced_and_not_written_over(self, tmp_path):
        path, link = tmp_path / "x.json", tmp_path / "link"
        path.write_text("old")
        link.hardlink_to(path)  # as a reader has it open
        with replacing(path) as temporary:
            temporary.write_text("new")
        assert (path.read_text(), link.read_text()) == ("new", "old")

    def test_creates_folders_and_keeps_the_suffix_and_permissions(self, tmp_path):
        usual = tmp_path / "usual"
        usual.touch()
        with replacing(tmp_path / "a" / "b" / "x.npz") as temporary:
            assert temporary.suffix == ".npz"
            temporary.write_text("new")
        assert (tmp_path / "a" / "b" / "x.npz").read_text() == "new"
        assert (tmp_path / "a" / "b" / "x.npz").stat().st_mode == usual.stat().st_mode

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(FileError, match=r"cannot write .*choose another folder") as caught:
            write_json(tmp_path / "file" / "x.json", {})
        assert isinstance(caught.value, BranchyNetError) and isinstance(caught.value, OSError)

    def test_json_round_trip(self, tmp_path):
        value = {"a": [1, None, "é"], "b": 0.1}
        write_json(tmp_path / "x.json", value)
        assert read_json(tmp_path / "x.json") == value


@pytest.mark.parametrize("thresholds", [("x",), ([0.1],), (math.nan,)])
def test_a_policy_names_thresholds_that_are_no_numbers(thresholds):
    with pytest.raises(InputError, match="thresholds must be"):
        Policy(thresholds=thresholds)


def test_no_repr_shows_a_digest():
    digest, outcome = "0123456789abcdef" * 4, Outcome(10, 0.9, (0.8, 1.0), 0.9, (0.5, 0.5), (0.9, 0.9))
    promise = Promise("max_drop", 0.1, 0.95, "betting", 5, 5)
    score = LearnedScore(2, False, ((0.0,) * 3,) * 2, (0.0, 0.0), fitted_on=digest)
    policy = Policy(score, (0.5,))
    plain = Design((), (), (), 90.0, (85.0, 95.0), 0.9, (1.0,), (90.0,), (0.0,), (), 90.0)
    rows = np.arange(20.0).reshape(10, 2) / 20
    for value in (
        promise,
        policy,
        Choice(policy, {"max_drop": 0.1}, outcome, digest, promise, "0123456789ab-0123456789ab", digest * 100),
        Advice(1, 1, "entropy", 90.0, 0.9, 0.9, 500, (plain,), (), 0, "0123456789ab-0123456789ab", digest * 100),
        ExitRecord.from_scores(rows, rows, score, inputs=np.arange(10, dtype=np.uint64), selected_on=(digest,)),
    ):
        assert not re.search("[0-9a-f]{16}", repr(value)), repr(value)
    made = Choice(policy, {"max_drop": 0.1}, outcome, digest)
    assert made.record_digest == digest and made != dataclasses.replace(made, record_digest="1" * 64)
