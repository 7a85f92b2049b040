import functools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from branchynet.errors import InputError
from branchynet.policy import choosing
from branchynet.policy.coordinate_ascent import ascend
from branchynet.policy.evaluation import evaluate, frontier, wilson
from branchynet.policy.exit_cost import ExitCost
from branchynet.policy.exit_record import ExitRecord
from branchynet.policy.exit_rule import route
from branchynet.policy.search import SearchProblem, grid
from branchynet.policy.values import Policy
from helpers.policies import a_cost, costs, entropies, every_policy, logits_record, small_records

choose = functools.partial(choosing.choose, confidence=None)  # test_risk_tests.py and test_promise.py test promises
quick = settings(max_examples=60, deadline=None)


def figure_2(logits, thresholds):
    """Compute the paper's Figure 2 for one sample in float64, and the smallest distance from a threshold."""
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


class TestRoute:
    def test_first_exit_strictly_below_answers(self):
        scores = [[0.1, 0.0, 9], [0.5, 0.1, 9], [0.5, 0.5, 9]]
        assert route(np.array(scores), (0.5, 0.5)).tolist() == [1, 2, 3]

    def test_nan_and_never_do_not_leave(self):
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
        cost = a_cost(record.num_exits)
        outcome = evaluate(record, Policy("entropy", (None,) * (record.num_exits - 1)), cost)
        assert outcome.accuracy == outcome.last_accuracy == pytest.approx(1 - record.losses[:, -1].mean())
        assert outcome.exit_share == (0.0,) * (record.num_exits - 1) + (1.0,)
        assert outcome.worst_us == 20.0 * record.num_exits  # no branch costs anything

    @quick
    @given(small_records(exits=3), st.data())
    def test_looser_thresholds_never_cost_more(self, record, data):
        tight = data.draw(st.tuples(*[st.floats(-1, 2, width=32)] * 2))
        looser = tuple(t + data.draw(st.floats(0, 2, width=32)) for t in tight)
        cost = data.draw(costs(3))
        before, after = (evaluate(record, Policy("entropy", t), cost).mean_us for t in (tight, looser))
        assert after <= before + 1e-9

    @quick
    @given(small_records(), st.randoms(), st.data())
    def test_the_order_of_samples_does_not_matter(self, record, random, data):
        thresholds = data.draw(st.tuples(*[st.none() | st.floats(0, 2, width=32)] * (record.num_exits - 1)))
        order = list(range(record.samples))
        random.shuffle(order)
        shuffled = ExitRecord.from_scores(record.scores[order], record.losses[order])
        cost = data.draw(costs(record.num_exits))
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
        cost = data.draw(costs(record.num_exits))
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
            assert (outcome.mean_us, outcome.accuracy) == (found.mean_us[k], found.accuracy[k])  # exactly
            assert outcome.exit_share == tuple(found.share[k])

    @pytest.mark.parametrize("exits", [2, 3, 4, 6])
    def test_agrees_with_evaluate(self, exits):
        record, cost = logits_record(700, exits), a_cost(exits, 20.3, 4.7)
        found = frontier(record, cost, vectors=8000)
        assert found.thresholds.dtype == np.float32 and found.thresholds.shape == (len(found), exits - 1)
        assert len(found) > 25
        self.check(record, cost, found)

    def test_neighboring_floats(self):
        """The threshold between them equals the upper score, which must not leave."""
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
            """Return the area under the curve of the best accuracy up to each time."""
            grid = np.linspace(20, 60, 2000)
            best = np.searchsorted(front.mean_us, grid, side="right") - 1
            return np.where(best >= 0, front.accuracy[best], 0).mean()

        assert area(coarse) <= area(exact) <= area(coarse) + 0.004

    @pytest.mark.parametrize("exits", [3, 4])
    def test_coordinate_ascent_is_near_the_exact_answer(self, exits):
        record, cost = logits_record(90, exits, seed=5), a_cost(exits)
        problem = SearchProblem(entropies(record), record.losses.astype(np.float64), cost)
        exact, found = grid(problem, 10**6), ascend(problem)
        gaps = [found.us[found.loss <= loss].min() / us - 1 for loss, us in zip(exact.loss, exact.us, strict=True)]
        assert min(gaps) >= -1e-9  # no result beats the exact one
        assert max(gaps) < 0.03 and np.mean(gaps) < 0.01

    @pytest.mark.parametrize("kind", ["right and wrong", "fractions", "ties"])
    def test_two_thresholds_are_exact_over_all_distinct_scores(self, kind):
        """The result equals that of all pairs of thresholds, for any number of combinations in memory."""
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
        problem = SearchProblem(entropies(record), record.losses.astype(np.float64), cost)
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
    """Return (mean time, mean loss), rounded."""
    here, us, loss = np.ones(record.samples, bool), 0.0, 0.0
    each = cost.latency_us([t is not None for t in thresholds] + [True])
    for n, t in enumerate([*thresholds, np.inf]):
        leaves = here & (t is not None) & (record.scores[:, n] < (np.inf if t is None else t))
        us, loss = us + leaves.sum() * each[n], loss + record.losses[leaves, n].sum(dtype=np.float64)
        here &= ~leaves
    return round(float(us) / record.samples, 7), round(float(loss) / record.samples, 7)
