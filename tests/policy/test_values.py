import dataclasses
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from branchynet.design.advice import Advice, Design
from branchynet.errors import FileError, InputError
from branchynet.policy.exit_cost import ExitCost
from branchynet.policy.exit_record import ExitRecord
from branchynet.policy.fitted_scores import LearnedScore
from branchynet.policy.values import Choice, Outcome, Policy, Promise
from helpers.values import GOOD, a_choice, a_cost


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
