import functools
import itertools
import json
import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from branchynet import choosing
from branchynet.decide import evaluate, frontier, route, wilson
from branchynet.errors import InfeasibleError, InputError
from branchynet.exit_record import ExitRecord
from branchynet.search import Problem, ascend, grid
from branchynet.types import Choice, ExitCost, Policy

choose = functools.partial(choosing.choose, confidence=None)  # test_guarantee.py is about promises
quick = settings(max_examples=60, deadline=None)


def figure_2(logits, thresholds):
    """The paper's Figure 2 for one sample, in plain Python and float64; also how near a threshold the entropy came."""
    near = math.inf
    for n, z in enumerate(logits):
        p = [math.exp(v - max(z)) for v in z]
        p = [v / sum(p) for v in p]
        e = -sum(v * math.log(v) for v in p if v > 0)
        if n + 1 < len(logits) and thresholds[n] is not None:
            near = min(near, abs(e - thresholds[n]))
        if n + 1 == len(logits) or (thresholds[n] is not None and e < thresholds[n]):
            return n + 1, int(np.argmax(z)), near
    raise AssertionError


def logits_record(samples, exits, classes=4, seed=0):
    """Deeper exits are better, and hard samples are hard for all."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, samples)
    outputs = rng.normal(size=(samples, exits, classes))
    outputs[np.arange(samples), :, labels] += 1.5 + np.arange(exits) - 1.5 * rng.normal(size=(samples, 1))
    return ExitRecord(2 * outputs, labels)


def a_cost(exits, trunk=20.0, branch=5.0):
    return ExitCost((trunk,) * exits, (branch,) * (exits - 1) + (0.0,), (100.0,) * exits, (7.0,) * (exits - 1) + (0.0,))


@st.composite
def small_records(draw, exits=None, most=10, levels=4):
    """Few samples with few distinct scores, so that all thresholds can be tried; NaN and infinity among them."""
    exits = draw(st.integers(1, 4)) if exits is None else exits
    samples = draw(st.integers(1, most))
    values = st.sampled_from([*np.linspace(0, 1, levels), math.nan, math.inf])
    rows = st.lists(st.lists(values, min_size=exits, max_size=exits), min_size=samples, max_size=samples)
    wrong = st.lists(
        st.lists(st.sampled_from([0.0, 1.0]), min_size=exits, max_size=exits), min_size=samples, max_size=samples
    )
    return ExitRecord.from_scores(draw(rows), draw(wrong))


@st.composite
def costs(draw, exits):
    each = st.lists(st.sampled_from([0, 1, 2, 9]), min_size=exits, max_size=exits)
    return ExitCost(tuple(draw(each)), tuple(draw(each)))


def every_policy(record):
    """All thresholds that can route this record differently."""
    for_each = []
    for column in record.scores[:, :-1].T:
        values = np.unique(column[np.isfinite(column)])
        middles = [float(v) for v in (values[:-1] + values[1:]) / 2]
        for_each.append([None, *middles, *([float(values[-1]) + 1] if len(values) else [])])
    return [Policy("entropy", thresholds) for thresholds in itertools.product(*for_each)]


class TestRoute:
    def test_first_exit_strictly_below_answers(self):
        scores = [[0.1, 0.0, 9], [0.5, 0.1, 9], [0.5, 0.5, 9]]
        assert route(np.array(scores), (0.5, 0.5)).tolist() == [1, 2, 3]

    def test_nan_and_never_go_deeper(self):
        scores = np.array([[math.nan, 0.0, 0], [-math.inf, 0.0, 0]])
        assert route(scores, (9, None)).tolist() == [3, 1]
        assert route(scores, (None, 9)).tolist() == [2, 2]

    def test_thresholds_act_as_float32(self):
        score = np.float32(0.1)  # above the float64 0.1, so a float64 comparison would keep 0.1 + 1e-9 above it
        assert float(score) > 0.1
        assert route(np.array([[score, 0]]), (0.1,)).tolist() == [2]
        assert float(score) < 0.1 + 2e-9
        assert route(np.array([[score, 0]]), (0.1 + 2e-9,)).tolist() == [2]
        assert route(np.array([[score, 0]]), (1e300,)).tolist() == [1]

    def test_dtype(self):
        assert route(np.zeros((2, 1)), ()).dtype == np.int64

    def test_wrong_count(self):
        with pytest.raises(InputError, match=r"2 thresholds need scores of shape \(S, 3\).*\(5, 4\)"):
            route(np.zeros((5, 4)), (0.1, 0.2))


class TestEvaluate:
    @quick
    @given(st.integers(0, 10**6), st.integers(1, 4), st.data())
    def test_is_figure_2(self, seed, exits, data):
        record = logits_record(12, exits, seed=seed)
        thresholds = data.draw(st.tuples(*[st.none() | st.floats(0, 1.5, width=32)] * (exits - 1)))
        expected = [figure_2(z.tolist(), thresholds) for z in record.outputs.astype(np.float64)]
        assume(min(near for _, _, near in expected) > 1e-5)
        cost = a_cost(exits)
        outcome = evaluate(record, Policy("entropy", thresholds), cost)
        left = [n for n, _, _ in expected]
        right = [label == y for (_, label, _), y in zip(expected, record.labels, strict=True)]
        assert outcome.samples == 12
        assert outcome.accuracy == pytest.approx(np.mean(right))
        assert outcome.exit_share == pytest.approx([left.count(n) / 12 for n in range(1, exits + 1)])
        for n in range(1, exits + 1):
            mine = [r for r, m in zip(right, left, strict=True) if m == n]
            assert outcome.exit_accuracy[n - 1] == (pytest.approx(np.mean(mine)) if mine else None)
        used = [t is not None for t in thresholds]
        us = [n * 20 + 5 * sum(used[:n]) for n in left]
        assert outcome.mean_us == pytest.approx(np.mean(us))
        assert outcome.p95_us == sorted(us)[math.ceil(0.95 * 12) - 1]
        assert outcome.worst_us == max(us)
        assert outcome.mean_macs == pytest.approx(np.mean([n * 100 + 7 * sum(used[:n]) for n in left]))

    @quick
    @given(small_records())
    def test_never_is_the_last_exit(self, record):
        cost = a_cost(record.exits)
        outcome = evaluate(record, Policy("entropy", (None,) * (record.exits - 1)), cost)
        assert outcome.accuracy == outcome.last_accuracy == pytest.approx(1 - record.losses[:, -1].mean())
        assert outcome.exit_share == (0.0,) * (record.exits - 1) + (1.0,)
        assert outcome.worst_us == 20.0 * record.exits  # no branch is paid for

    @quick
    @given(small_records(exits=3), st.data())
    def test_looser_is_never_dearer(self, record, data):
        tight = data.draw(st.tuples(*[st.floats(-1, 2, width=32)] * 2))
        looser = tuple(t + data.draw(st.floats(0, 2, width=32)) for t in tight)
        cost = data.draw(costs(3))
        before, after = (evaluate(record, Policy("entropy", t), cost).mean_us for t in (tight, looser))
        assert after <= before + 1e-9

    @quick
    @given(small_records(), st.randoms(), st.data())
    def test_order_of_samples_is_no_matter(self, record, random, data):
        thresholds = data.draw(st.tuples(*[st.none() | st.floats(0, 2, width=32)] * (record.exits - 1)))
        order = list(range(record.samples))
        random.shuffle(order)
        shuffled = ExitRecord.from_scores(record.scores[order], record.losses[order])
        cost = data.draw(costs(record.exits))
        policy = Policy("entropy", thresholds)
        assert evaluate(shuffled, policy, cost) == evaluate(record, policy, cost)
        assert choose(shuffled, cost, max_drop=0.1).policy == choose(record, cost, max_drop=0.1).policy

    def test_unused_exit_costs_nothing(self):
        record = ExitRecord.from_scores([[0.9, 0.1, 0.5]] * 2, [[0, 0, 0]] * 2)
        cost = ExitCost((10, 20, 40), (1, 2, 4))
        assert evaluate(record, Policy("entropy", (None, 0.5)), cost).mean_us == 32
        assert evaluate(record, Policy("entropy", (0.5, 0.5)), cost).mean_us == 33
        assert evaluate(record, Policy("entropy", (0.5, None)), cost).mean_us == 75

    def test_without_cost(self):
        outcome = evaluate(logits_record(5, 2), Policy("entropy", (0.5,)))
        assert (outcome.mean_us, outcome.p95_us, outcome.worst_us, outcome.mean_macs) == (None,) * 4

    def test_uses_the_policys_score(self):
        record = ExitRecord([[[2.0, 1.0, 0.0], [0.0, 0.0, 9.0]]], [2])  # entropy 0.83, margin 0.58
        assert evaluate(record, Policy("entropy", (0.7,))).exit_share == (0.0, 1.0)
        assert evaluate(record, Policy("margin", (0.7,))).exit_share == (1.0, 0.0)
        assert evaluate(record, Policy(lambda outputs: outputs[-1][:, 2], (0.1,))).exit_share == (1.0, 0.0)

    def test_fractional_losses(self):
        outcome = evaluate(ExitRecord.from_scores([[0, 0], [1, 0]], [[0.25, 0], [1, 0.5]]), Policy("entropy", (0.5,)))
        assert outcome.accuracy == 1 - 0.375
        assert outcome.exit_accuracy == (0.75, 0.5)
        assert outcome.last_accuracy == 0.75

    def test_wilson(self):
        # Newcombe 1998, table I: 81 of 263 and 0 of 20.
        assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
        assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
        assert wilson(1, 20) == pytest.approx((1 - 0.1611, 1), abs=5e-5)
        record = ExitRecord.from_scores(np.zeros((263, 1)), np.arange(263)[:, None] >= 81)
        assert evaluate(record, Policy("entropy", ())).accuracy_interval == pytest.approx(wilson(81 / 263, 263))

    def test_wrong_counts(self):
        record = logits_record(5, 3)
        with pytest.raises(InputError, match=r"the policy has 1 thresholds, but a record of 3 exits needs 2"):
            evaluate(record, Policy("entropy", (0.5,)))
        with pytest.raises(InputError, match=r"the cost has 2 exits, but the record has 3"):
            evaluate(record, Policy("entropy", (0.5, 0.5)), a_cost(2))
        for function in (frontier, lambda r, c: choose(r, c, max_drop=0.1)):
            with pytest.raises(InputError, match=r"the cost has 2 exits, but the record has 3"):
                function(record, a_cost(2))


class TestFrontier:
    @quick
    @given(small_records(), st.data())
    def test_is_the_pareto_set_of_all_policies(self, record, data):
        cost = data.draw(costs(record.exits))
        found = frontier(record, cost)
        tried = {
            (round(o.mean_us, 9), round(o.accuracy, 9))
            for o in (evaluate(record, p, cost) for p in every_policy(record))
        }
        pareto = sorted((u, a) for u, a in tried if not any(v <= u and b >= a and (v, b) != (u, a) for v, b in tried))
        assert list(zip(found.mean_us.round(9), found.accuracy.round(9), strict=True)) == pareto

    def check(self, record, cost, found):
        assert (np.diff(found.mean_us) > 0).all() and (np.diff(found.accuracy) > 0).all()
        for k in np.linspace(0, len(found) - 1, 25).astype(int):
            outcome = evaluate(record, found.policy(k), cost)
            assert (outcome.mean_us, outcome.accuracy) == (found.mean_us[k], found.accuracy[k])  # to the bit
            assert outcome.exit_share == tuple(found.share[k])

    @pytest.mark.parametrize("exits", [2, 3, 4, 6])
    def test_says_what_evaluate_says(self, exits):
        record, cost = logits_record(700, exits), a_cost(exits, 20.3, 4.7)
        found = frontier(record, cost, vectors=8000)
        assert found.thresholds.dtype == np.float32 and found.thresholds.shape == (len(found), exits - 1)
        assert len(found) > 25
        self.check(record, cost, found)

    def test_neighbouring_floats(self):
        """The threshold between them is the upper one, which must not let it leave."""
        low = np.float32(0.3)
        for _ in range(2):
            high = np.nextafter(low, np.float32(1))
            found = frontier(ExitRecord.from_scores([[low, 0], [high, 0]], [[0, 0], [1, 0]]), a_cost(2))
            assert found.accuracy.tolist() == [0.5, 1] and found.share.tolist() == [[1, 0], [0.5, 0.5]]
            assert found.policy(1).thresholds == (float(high),)
            low = high

    def test_other_scores(self):
        record, cost = logits_record(200, 3), a_cost(3)
        for score in ("margin", "max_probability", lambda outputs: -outputs[-1].amax(dim=1)):
            found = frontier(record, cost, score)
            assert found.score is score
            self.check(record, cost, found)

    def test_a_finer_grid_is_no_worse_and_gaps_are_filled(self):
        record, cost = logits_record(120, 3, seed=3), a_cost(3)
        exact, coarse = frontier(record, cost), frontier(record, cost, vectors=400)

        def area(front):
            """Under the curve of the best accuracy up to each time."""
            grid = np.linspace(20, 60, 2000)
            best = np.searchsorted(front.mean_us, grid, side="right") - 1
            return np.where(best >= 0, front.accuracy[best], 0).mean()

        assert area(coarse) <= area(exact) <= area(coarse) + 0.004

    @pytest.mark.parametrize("exits", [3, 4])
    def test_coordinate_ascent_is_near_the_exact_answer(self, exits):
        record, cost = logits_record(90, exits, seed=5), a_cost(exits)
        problem = Problem(entropies(record), record.losses.astype(np.float64), cost)
        exact, found = grid(problem, 10**6), ascend(problem)
        gaps = [found.us[found.loss <= loss].min() / us - 1 for loss, us in zip(exact.loss, exact.us, strict=True)]
        assert min(gaps) >= -1e-9  # nothing beats the exact answer
        assert max(gaps) < 0.03 and np.mean(gaps) < 0.01

    @pytest.mark.parametrize("kind", ["right and wrong", "fractions", "ties"])
    def test_two_thresholds_are_exact_over_all_distinct_scores(self, kind):
        """Beside every pair of thresholds, however few combinations are held in memory at once."""
        rng = np.random.default_rng(7)
        scores = rng.random((250, 3)).astype(np.float32)
        losses = rng.random((250, 3)) < scores * [0.6, 0.4, 0.3]
        if kind == "ties":
            scores = (scores * 20).round() / 20
        elif kind == "fractions":
            losses = (rng.random((250, 3)) * (0.2 + scores)).clip(0, 1)
        record, cost = ExitRecord.from_scores(scores, losses), a_cost(3)
        ladders = [np.append(np.unique(c), np.inf).astype(np.float32) for c in record.scores[:, :2].T]
        tried = {evaluate_fast(record, cost, (None, None))}
        for n, ladder in enumerate(ladders):
            tried |= {evaluate_fast(record, cost, (t, None) if n == 0 else (None, t)) for t in ladder}
        tried |= {evaluate_fast(record, cost, (a, b)) for a in ladders[0] for b in ladders[1]}
        best, least = [], math.inf
        for us, loss in sorted(tried):
            if loss < least - 1e-9:
                best.append((us, loss))
                least = loss
        found = frontier(record, cost, vectors=1000)
        np.testing.assert_allclose(found.mean_us, [us for us, _ in best], atol=1e-6)
        np.testing.assert_allclose(1 - found.accuracy, [loss for _, loss in best], atol=1e-6)

    def test_a_million_vectors_take_little_memory(self):
        record, cost = logits_record(10_000, 3, classes=10), a_cost(3)
        problem = Problem(entropies(record), record.losses.astype(np.float64), cost)
        tracemalloc.start()
        found = grid(problem, 1_000_000)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 200e6
        for k in np.linspace(0, len(found.us) - 1, 10).astype(int):
            policy = Policy("entropy", tuple(None if np.isnan(t) else t for t in found.thresholds[k]))
            scored = ExitRecord.from_scores(problem.scores, record.losses)
            assert evaluate(scored, policy, cost).mean_us == found.us[k]


def evaluate_fast(record, cost, thresholds):
    """(mean time, mean loss), each rounded a little."""
    here, us, loss = np.ones(record.samples, bool), 0.0, 0.0
    each = cost.latency_us([t is not None for t in thresholds] + [True])
    for n, t in enumerate([*thresholds, np.inf]):
        leaves = here & (t is not None) & (record.scores[:, n] < (np.inf if t is None else t))
        us, loss = us + leaves.sum() * each[n], loss + record.losses[leaves, n].sum(dtype=np.float64)
        here &= ~leaves
    return round(float(us) / record.samples, 7), round(float(loss) / record.samples, 7)


def entropies(record):
    z = record.outputs.astype(np.float64)
    p = np.exp(z - z.max(axis=2, keepdims=True))
    p /= p.sum(axis=2, keepdims=True)
    return (-(p * np.log(p)).sum(axis=2)).astype(np.float32)


class TestChoose:
    def best(self, record, cost, constraint):
        """By trying everything: the outcome, or None."""
        outcomes = [evaluate(record, policy, cost) for policy in every_policy(record)]
        if "max_latency_us" in constraint:
            fit = [o for o in outcomes if o.mean_us <= constraint["max_latency_us"] + 1e-9]
            return min(fit, key=lambda o: (-round(o.accuracy, 9), o.mean_us), default=None)
        least = constraint.get("min_accuracy", outcomes[0].last_accuracy - constraint.get("max_drop", 0))
        fit = [o for o in outcomes if o.accuracy >= least - 1e-9]
        return min(fit, key=lambda o: (round(o.mean_us, 9), -o.accuracy), default=None)

    @settings(max_examples=150, deadline=None)
    @given(small_records(), st.data())
    def test_equals_trying_everything(self, record, data):
        cost = data.draw(costs(record.exits))
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
        """Never worse than the best of the frontier, sometimes better, and near the exact answer."""
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

    def test_what_it_says(self):
        record, cost = logits_record(300, 3), a_cost(3)
        choice = choose(record, cost, max_drop=0.02)
        assert choice.constraint == {"max_drop": 0.02}
        assert choice.record_digest == record.digest
        assert choice.outcome == evaluate(record, choice.policy, cost)
        assert choice.outcome.accuracy >= choice.outcome.last_accuracy - 0.02 - 1e-9
        assert choice.outcome.mean_us < 60

    def test_thresholds_separate_what_they_separated_after_rounding_and_json(self, tmp_path):
        """Neighbouring floats, where a midpoint rounds onto a neighbour; compared as an engine does, in float32."""
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
        assert choose(record, free, min_accuracy=0).policy.thresholds[0] is None  # of equals the one with fewer exits

    def test_decimal_limits_mean_what_they_say(self):
        record = ExitRecord.from_scores(np.zeros((10, 2)), np.stack([np.arange(10) < 8, np.arange(10) < 7], axis=1))
        assert choose(record, a_cost(2), max_drop=0.1).outcome.exit_share == (1, 0)  # 0.3 - 0.1 > 0.2 in floats
        many = ExitRecord.from_scores(np.zeros((100, 2)), np.stack([np.arange(100) < 29, np.zeros(100)], axis=1))
        assert choose(many, a_cost(2), max_drop=0.29).outcome.exit_share == (1, 0)  # 0.29 * 100 < 29 in floats
        third = ExitCost((0.1, 0.2), (0, 0))
        assert choose(record, third, max_latency_us=0.3).outcome.accuracy == pytest.approx(0.3)  # 0.1 + 0.2 > 0.3

    def test_without_cost_the_mean_exit_is_least(self):
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

    @pytest.mark.parametrize(
        ("limits", "message"),
        [
            ({}, r"exactly one of max_drop, min_accuracy, max_disagreement, max_latency_us, max_macs; got none"),
            ({"max_drop": 0.1, "max_latency_us": 3}, r"got max_drop=0.1 and max_latency_us=3"),
            ({"min_accuracy": 99}, r"min_accuracy=99 is out of range.*fraction"),
            ({"max_drop": 2}, r"max_drop=2 is out of range"),
            ({"max_latency_us": math.nan}, r"max_latency_us=nan is not a finite number"),
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
    """The cheapest thresholds that reach it, or the most accurate ones, among all that matter."""
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
