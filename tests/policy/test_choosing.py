import functools
import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from branchynet.errors import InfeasibleError, InputError
from branchynet.policy import choosing
from branchynet.policy.evaluation import evaluate, frontier
from branchynet.policy.exit_cost import ExitCost
from branchynet.policy.exit_record import ExitRecord
from branchynet.policy.values import Choice, Policy
from helpers.policies import a_cost, costs, entropies, every_policy, logits_record, small_records

choose = functools.partial(choosing.choose, confidence=None)  # test_risk_tests.py and test_promise.py test promises


class TestChoose:
    def best(self, record, cost, constraint):
        """Return the best outcome of all thresholds, or None."""
        outcomes = [evaluate(record, policy, cost) for policy in every_policy(record)]
        if "max_latency_us" in constraint:
            fit = [o for o in outcomes if o.mean_us <= constraint["max_latency_us"] + 1e-9]
            return min(fit, key=lambda o: (-round(o.accuracy, 9), o.mean_us), default=None)
        least = constraint.get("min_accuracy", outcomes[0].last_accuracy - constraint.get("max_drop", 0))
        fit = [o for o in outcomes if o.accuracy >= least - 1e-9]
        return min(fit, key=lambda o: (round(o.mean_us, 9), -o.accuracy), default=None)

    @settings(max_examples=150, deadline=None)
    @given(small_records(), st.data())
    def test_equals_exhaustive_search(self, record, data):
        cost = data.draw(costs(record.num_exits))
        constraint = data.draw(
            st.one_of(
                st.fixed_dictionaries({"max_drop": st.sampled_from([-0.1, 0, 0.1, 0.2, 0.5])}),
                st.fixed_dictionaries({"min_accuracy": st.sampled_from([0, 0.5, 0.7, 0.9, 1])}),
                st.fixed_dictionaries({"max_latency_us": st.integers(0, 40)}),
            )
        )
        expected = self.best(record, cost, constraint)
        if expected is None:
            with pytest.raises(InfeasibleError):
                choose(record, cost, **constraint)
        else:
            found = choose(record, cost, **constraint).outcome
            assert found.accuracy == pytest.approx(expected.accuracy)
            assert found.mean_us == pytest.approx(expected.mean_us)

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("drop", [0.0, 0.01, 0.1])
    def test_one_threshold_of_continuous_scores(self, seed, drop):
        full, cost = logits_record(150, 2, seed=seed), a_cost(2)
        record = ExitRecord.from_scores(entropies(full), full.losses)
        found, expected = choose(record, cost, max_drop=drop).outcome, self.best(record, cost, {"max_drop": drop})
        assert (found.accuracy, found.mean_us) == (expected.accuracy, pytest.approx(expected.mean_us))

    def test_refines_a_coarse_grid(self):
        """The choice is at least as good as the frontier, sometimes better, and close to the exact result."""
        saved = []
        for seed in range(6):
            record, cost = logits_record(300, 4, seed=seed), a_cost(4)
            coarse = frontier(record, cost, vectors=4)
            enough = coarse.accuracy >= coarse.accuracy[-1] - 0.02
            chosen = choose(record, cost, min_accuracy=coarse.accuracy[-1] - 0.02, vectors=4).outcome.mean_us
            exact = choose(record, cost, min_accuracy=coarse.accuracy[-1] - 0.02).outcome.mean_us
            assert exact <= chosen <= exact * 1.1
            saved.append(coarse.mean_us[enough].min() - chosen)
        assert min(saved) >= 0 and max(saved) > 0

    def test_more_than_three_thresholds(self):
        rng = np.random.default_rng(0)
        wrong = rng.random((40, 5)) < np.linspace(0.5, 0.1, 5)
        record = ExitRecord.from_scores(np.round(rng.random((40, 5)) + wrong, 0), wrong)
        cost = a_cost(5, 10, 1)
        for constraint in ({"max_drop": 0.05}, {"min_accuracy": 0.9}, {"max_latency_us": 30}):
            found, expected = choose(record, cost, **constraint).outcome, self.best(record, cost, constraint)
            if "max_latency_us" in constraint:
                assert found.mean_us <= 30 and found.accuracy >= expected.accuracy - 0.026
            else:
                assert expected.mean_us - 1e-9 <= found.mean_us <= expected.mean_us * 1.05
                assert found.accuracy >= constraint.get("min_accuracy", found.last_accuracy - 0.05) - 1e-9

    def test_text_of_a_choice(self):
        record, cost = logits_record(300, 3), a_cost(3)
        choice = choose(record, cost, max_drop=0.02)
        assert choice.constraint == {"max_drop": 0.02}
        assert choice.record_digest == record.digest
        assert choice.outcome == evaluate(record, choice.policy, cost)
        assert choice.outcome.accuracy >= choice.outcome.last_accuracy - 0.02 - 1e-9
        assert choice.outcome.mean_us < 60

    def test_rounding_and_json_keep_the_side_of_a_threshold(self, tmp_path):
        """The midpoint of neighboring floats rounds to one of them; engines compare in float32."""
        low = np.float32(0.3)
        high = np.nextafter(low, np.float32(1))
        for scores in ([[low, 0], [high, 0]], [[high, 0], [low, 0]]):
            for a, b in ((low, high), (high, np.nextafter(high, np.float32(1)))):
                record = ExitRecord.from_scores(
                    [[a if s[0] == low else b, 0] for s in scores], [[s[0] != low, 0] for s in scores]
                )
                choice = choose(record, a_cost(2), max_drop=0)
                assert choice.outcome.exit_share == (0.5, 0.5)
                choice.save(tmp_path / "choice.json")
                threshold = Choice.load(tmp_path / "choice.json").policy.thresholds[0]
                leaves = torch.tensor(record.scores[:, 0]) < torch.tensor(threshold, dtype=torch.float32)
                assert leaves.tolist() == [s[0] == low for s in scores]
        assert isinstance(json.loads((tmp_path / "choice.json").read_text())["policy"]["thresholds"][0], float)

    def test_threshold_lies_midway_among_the_samples_that_arrive(self):
        scores = [[0.0, 0.9], [0.4, 0.0], [1.0, 0.0]]
        choice = choose(ExitRecord.from_scores(scores, [[0, 0], [0, 0], [1, 0]]), a_cost(2), max_drop=0)
        assert choice.policy.thresholds == (float(np.float32(0.7)),)
        three = ExitRecord.from_scores([[0, 0.3, 0], [1, 0.2, 0], [1, 0.6, 0]], [[0, 1, 0], [1, 0, 0], [1, 1, 0]])
        assert choose(three, a_cost(3, 20, 1), max_drop=0).policy.thresholds == (0.5, float(np.float32(0.4)))

    def test_all_may_leave_and_none_may_leave(self):
        good = ExitRecord.from_scores([[0.2, 0], [0.7, 0]], [[0, 0], [0, 0]])
        (threshold,) = choose(good, a_cost(2), max_drop=0).policy.thresholds
        assert threshold is not None and math.isfinite(threshold) and threshold > 0.7 + 1e-4
        bad = ExitRecord.from_scores([[0.2, 0], [0.7, 0]], [[1, 0], [1, 0]])
        assert choose(bad, a_cost(2), max_drop=0).policy.thresholds == (None,)
        blind = ExitRecord.from_scores([[math.nan, 0], [math.inf, 0]], [[0, 0], [0, 0]])
        assert choose(blind, a_cost(2), max_drop=0).policy.thresholds == (None,)
        certain = ExitRecord.from_scores([[-math.inf, 0], [math.nan, 0]], [[0, 0], [0, 0]])
        assert choose(certain, a_cost(2, branch=0), max_drop=0).outcome.exit_share == (0.5, 0.5)

    def test_a_branch_that_costs_more_than_it_saves_is_left_out(self):
        record = ExitRecord.from_scores([[0, 0]] * 9 + [[1, 0]], [[0, 0]] * 10)
        assert choose(record, ExitCost((10, 10), (9.9, 0)), max_drop=0).policy.thresholds != (None,)
        assert choose(record, ExitCost((10, 10), (10.1, 0)), max_drop=0).policy.thresholds == (None,)

    def test_ties_are_cheaper_then_more_accurate(self):
        record = ExitRecord.from_scores([[0, 0, 0]], [[1, 0, 0]])
        free = ExitCost((5, 0, 5), (0, 0, 0))  # both early exits cost 5; the second is right
        assert choose(record, free, min_accuracy=0).outcome.exit_share == (0, 1, 0)
        assert choose(record, free, max_latency_us=100).outcome.exit_share == (
            0,
            1,
            0,
        )  # right, and cheaper than the last
        assert (
            choose(record, free, min_accuracy=0).policy.thresholds[0] is None
        )  # of equal policies, the one with fewer exits

    def test_decimal_limits_mean_what_they_say(self):
        record = ExitRecord.from_scores(np.zeros((10, 2)), np.stack([np.arange(10) < 8, np.arange(10) < 7], axis=1))
        assert choose(record, a_cost(2), max_drop=0.1).outcome.exit_share == (1, 0)  # 0.3 - 0.1 > 0.2 in floats
        many = ExitRecord.from_scores(np.zeros((100, 2)), np.stack([np.arange(100) < 29, np.zeros(100)], axis=1))
        assert choose(many, a_cost(2), max_drop=0.29).outcome.exit_share == (1, 0)  # 0.29 * 100 < 29 in floats
        third = ExitCost((0.1, 0.2), (0, 0))
        assert choose(record, third, max_latency_us=0.3).outcome.accuracy == pytest.approx(0.3)  # 0.1 + 0.2 > 0.3

    def test_without_cost_the_mean_exit_is_minimized(self):
        record = logits_record(300, 3)
        choice = choose(record, max_drop=0.05)
        assert choice.outcome.mean_us is None
        assert choice.policy == choose(record, ExitCost((1, 1, 1), (0, 0, 0)), max_drop=0.05).policy
        assert choice.outcome.exit_share[0] > 0.1

    def test_one_exit(self):
        record = ExitRecord.from_scores([[0.5]], [[0]])
        assert choose(record, ExitCost((3,), (0,)), max_drop=0).policy.thresholds == ()

    def test_infeasible_names_the_best(self):
        record = ExitRecord.from_scores([[0, 0], [1, 0]], [[0, 1], [1, 1]])
        with pytest.raises(
            InfeasibleError, match=r"min_accuracy=0.9 .* 2 samples; the most accurate .* accuracy 0\.5000"
        ):
            choose(record, a_cost(2), min_accuracy=0.9)
        with pytest.raises(InfeasibleError, match=r"max_latency_us=24 .*; the cheapest .* accuracy 0\.5000 .* 25 us"):
            choose(record, a_cost(2), max_latency_us=24)
        with pytest.raises(InfeasibleError, match=r"max_drop=-0.6"):
            choose(record, a_cost(2), max_drop=-0.6)
        for confidence in (None, 0.95):
            record = ExitRecord.from_scores([[0, 0], [1, 0]] * 100, [[0, 1], [1, 0]] * 100)
            with pytest.raises(
                InfeasibleError, match=r"max_drop=-0.6 .*, and the last exit has 0\.\d+: .*raise the lim"
            ):
                choose(record, a_cost(2), max_drop=-0.6, confidence=confidence)

    @pytest.mark.parametrize(
        ("limits", "message"),
        [
            ({}, r"exactly one of max_drop, min_accuracy, max_disagreement, max_latency_us, max_macs; got none"),
            ({"max_drop": 0.1, "max_latency_us": 3}, r"got max_drop=0.1 and max_latency_us=3"),
            ({"min_accuracy": 99}, r"min_accuracy=99 is out of range.*fraction"),
            ({"min_accuracy": -0.5}, r"min_accuracy=-0.5 is out of range: give a fraction from 0 to 1, such as 0.99 "),
            ({"max_drop": -1}, r"max_drop=-1 is out of range: .* between -1 and 1, such as 0.01 for one point less"),
            ({"max_disagreement": -0.1}, r"max_disagreement=-0.1 is out of range: give a fraction from 0 to below 1"),
            ({"max_disagreement": 1}, r"max_disagreement=1 limits nothing.*give 0.01 for 1%"),
            ({"max_drop": 2}, r"max_drop=2 limits nothing.*give 0.02 for 2%"),
            ({"max_latency_us": math.nan}, r"max_latency_us must be a finite number; got nan"),
        ],
    )
    def test_wrong_limits(self, limits, message):
        with pytest.raises(InputError, match=message):
            choose(logits_record(5, 2), a_cost(2), **limits)

    def test_latency_needs_a_cost(self):
        with pytest.raises(InputError, match="max_latency_us needs a cost"):
            choose(logits_record(5, 2), max_latency_us=5)

    def test_unknown_score(self):
        with pytest.raises(InputError, match="unknown score 'entropi'; did you mean 'entropy'"):
            choose(logits_record(5, 2), a_cost(2), max_drop=0, score="entropi")


@pytest.mark.parametrize("seed", range(3))
def test_nearest_to_an_accuracy(seed):
    """The choice is the cheapest with that accuracy, or the most accurate one, among all thresholds."""
    generator = np.random.default_rng(seed)
    scores = generator.random((40, 2)).astype(np.float32)
    losses = (generator.random((40, 2)) < [[0.5, 0.3]]).astype(np.float32)
    record, cost = ExitRecord.from_scores(scores, losses), ExitCost((2.0, 5.0), (1.0, 0.0))
    tried = {}
    for t in (None, *np.sort(scores[:, 0]) + 1e-7):
        outcome = evaluate(record, Policy("entropy", (t if t is None else float(t),)), cost)
        tried[outcome.accuracy] = min(tried.get(outcome.accuracy, np.inf), outcome.mean_us)
    for wanted in (max(tried), np.median(list(tried)), max(tried) + 0.01):
        choice, reached = choosing.nearest_to(record, cost, float(wanted))
        assert reached == (wanted <= max(tried))
        if reached:
            assert choice.outcome.mean_us == pytest.approx(min(us for a, us in tried.items() if a >= wanted - 1e-9))
        else:
            assert choice.outcome.accuracy == pytest.approx(max(tried))


@pytest.mark.parametrize("exits", [3, 5])
def test_an_exit_at_which_no_sample_leaves_is_disabled(exits):
    """All samples leave at the first exit, so later thresholds have no effect."""
    rng = np.random.default_rng(0)
    scores = np.sort(rng.random((200, exits)), axis=1)[:, ::-1].copy()
    losses = np.zeros((200, exits))
    cost = ExitCost((10.0,) * exits, (1.0,) * (exits - 1) + (0.0,))
    found = choosing.choose(ExitRecord.from_scores(scores, losses), cost, min_accuracy=0.8, confidence=None)
    assert found.outcome.exit_share[0] == 1.0
    assert found.policy.thresholds[1:] == (None,) * (exits - 2)


FIVE = ExitRecord(np.eye(2, dtype=np.float32)[np.array([[0, 0], [1, 0], [0, 0], [1, 1], [0, 1]])], [0, 0, 0, 1, 1])


@pytest.mark.parametrize(
    ("limit", "give"),
    [({"max_drop": 0.5}, "0.005"), ({"max_disagreement": 0.25}, "0.0025")],
)
def test_a_limit_that_may_be_meant_in_percent_warns(limit, give):
    with pytest.warns(UserWarning, match=f"points give {give}$"):
        choose(FIVE, **limit, confidence=None)


@pytest.mark.parametrize("limit", [{"max_drop": 0.2}, {"max_disagreement": 0.2}, {"min_accuracy": 0.5}])
def test_other_limits_do_not_warn(limit):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose(FIVE, **limit, confidence=None)
