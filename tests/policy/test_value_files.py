"""Files of values: damaged, foreign, and written on a full disk."""

import json
import math

import pytest

from branchynet.errors import BranchyNetError, FileError
from branchynet.files import read_json, replacing, write_json
from branchynet.policy.exit_cost import ExitCost
from branchynet.policy.values import Choice
from helpers.values import GOOD, a_choice, a_cost, full_disk


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
