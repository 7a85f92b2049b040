"""Large records: results equal those of simple code, and memory holds the data about once."""

import math
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from branchynet import ExitCost, ExitRecord, Policy, choose, evaluate, record
from branchynet.policy import coordinate_ascent, risk_tests
from branchynet.policy.exit_rule import exit_positions
from branchynet.policy.risk_tests import best_bet, betting_p, fixed_sequence_test
from branchynet.policy.search import SearchPoints, SearchProblem, best_of, grid, join, sweep
from branchynet.policy.values import BOUNDS
from helpers.networks import build, draw, residual


def a_problem(samples, exits, seed, ties=False):
    rng = np.random.default_rng(seed)
    scores = rng.random((samples, exits)).astype(np.float32)
    if ties:
        scores = (scores * 9).round() / 9
        scores[rng.random(scores.shape) < 0.05] = np.nan
    losses = (rng.random((samples, exits)) < scores * np.linspace(0.8, 0.3, exits)).astype(np.float64)
    return SearchProblem(scores, losses, a_cost(exits))


def a_cost(exits):
    return ExitCost(tuple(range(5, 5 + exits)), (1.0,) * (exits - 1) + (0.0,))


def figures(problem, thresholds):
    """Return (mean us, summed loss), one sample after another."""
    each = problem.cost.latency_us([*(not math.isnan(t) for t in thresholds), True])
    us = loss = 0.0
    for scores, losses in zip(problem.scores, problem.losses, strict=True):
        n = next((n for n, t in enumerate(thresholds) if scores[n] < t), len(scores) - 1)
        us, loss = us + each[n], loss + losses[n]
    return us / len(problem.scores), loss


@pytest.mark.parametrize("exits", [2, 3, 5])
@pytest.mark.parametrize("ties", [False, True])
def test_samples_leave_at_the_first_exit_below_its_threshold(exits, ties):
    problem = a_problem(200, exits, 0, ties)
    rng = np.random.default_rng(1)
    for _ in range(20):
        thresholds = np.where(rng.random(exits - 1) < 0.3, np.nan, rng.random(exits - 1)).astype(np.float32)
        expected = [next((n for n, t in enumerate(thresholds) if row[n] < t), exits - 1) for row in problem.scores]
        assert exit_positions(problem.scores, thresholds).tolist() == expected


@pytest.mark.parametrize("exits", [2, 3, 5])
@pytest.mark.parametrize("ties", [False, True])
def test_a_sweep_returns_every_threshold_that_no_looser_one_beats(exits, ties):
    problem = a_problem(60, exits, 2, ties)
    rng = np.random.default_rng(3)
    for n in range(exits - 1):
        held = np.where(rng.random(exits - 1) < 0.3, np.nan, rng.random(exits - 1)).astype(np.float32)
        found = sweep(problem, held, n)
        for row, us, loss, counts in zip(found.thresholds, found.us, found.loss, found.counts, strict=True):
            assert (us, loss) == pytest.approx(figures(problem, row), abs=1e-9)
            assert counts.tolist() == np.bincount(exit_positions(problem.scores, row), minlength=exits).tolist()
        for threshold in [np.nan, *np.unique(problem.scores[:, n]), 2.0]:
            row = held.copy()
            row[n] = threshold
            us, loss = figures(problem, row)
            assert ((found.us <= us + 1e-9) & (found.loss <= loss + 1e-9)).any(), "nothing as good was found"


def test_ascent_on_some_samples_is_evaluated_on_all(monkeypatch):
    problem = a_problem(90, 4, 4)
    monkeypatch.setattr(coordinate_ascent, "CLIMBED", 60)
    found, exact = coordinate_ascent.ascend(problem), grid(problem, 10**6)
    for k in np.linspace(0, len(found.us) - 1, 20).astype(int):
        assert (found.us[k], found.loss[k]) == pytest.approx(figures(problem, found.thresholds[k]), abs=1e-9)
    assert found.loss.min() <= exact.loss.min() + 2  # of 90 samples: thresholds climb one at a time
    reached = exact.take(np.nonzero(exact.loss >= found.loss.min())[0])
    gaps = [found.us[found.loss <= loss].min() / us - 1 for loss, us in zip(reached.loss, reached.us, strict=True)]
    assert min(gaps) >= -1e-9 and np.mean(gaps) < 0.05


@pytest.mark.parametrize("sets", [1, 2, 7])
def test_the_best_of_sets_one_by_one_are_the_best_of_all(sets):
    rng = np.random.default_rng(sets)
    made = []
    for size in rng.integers(1, 30, sets):
        loss, us = rng.integers(0, 12, (2, size)).astype(np.float64)  # with ties
        made.append(SearchPoints(rng.random((size, 2)).astype(np.float32), loss, us, rng.random((size, 3))))
    one_by_one, at_once = best_of(iter(made)), join(made).pareto()
    for name in ("thresholds", "loss", "us", "counts"):
        np.testing.assert_array_equal(getattr(one_by_one, name), getattr(at_once, name))


@pytest.mark.parametrize("samples", [1, 7, 8, 100])
def test_capital_is_the_same_in_blocks(samples, monkeypatch):
    rng = np.random.default_rng(samples)
    differences = rng.choice([-1.0, 0.0, 1.0, 0.3], samples, p=[0.02, 0.9, 0.03, 0.05])
    bet = best_bet(differences, 0.05)
    whole = betting_p(differences, 0.05, bet)
    monkeypatch.setattr(risk_tests, "_BLOCK", 8)
    assert betting_p(differences, 0.05, bet) == pytest.approx(whole, rel=1e-9)  # sums of logarithms, regrouped
    for enough in (0.9, 0.5, 1e-3):
        assert (betting_p(differences, 0.05, bet, enough) <= enough) == (whole <= enough)


def test_candidates_are_computed_one_at_a_time_until_one_fails():
    made = []

    def differences(worse):
        for k, share in enumerate(worse):
            made.append(k)
            yield np.where(np.arange(2000) % 100 < 100 * share, 1.0, 0.0)

    tried = [0.0, 0.0, 0.5, 0.0]
    for bound in BOUNDS:
        made.clear()
        assert fixed_sequence_test(differences(tried), differences(tried), 0.05, 0.05, bound) == 2
        assert max(made) == 2


@pytest.mark.parametrize("exits", [3, 6])
def test_a_promise_on_a_large_record_takes_little_memory(exits):
    problem = a_problem(60_000, exits, 5)
    large = ExitRecord.from_scores(problem.scores, problem.losses)
    tracemalloc.start()
    choice = choose(large, problem.cost, max_drop=0.05)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert choice.promise is not None and evaluate(large, choice.policy, problem.cost) == choice.outcome
    assert peak < 300e6  # 128 candidates at once would need 60 MB more per half, and copies of it


def test_a_record_holds_its_outputs_about_once():
    """There is no second copy of the batches, and none for the digest."""
    net, example = build(residual, 0)
    inputs = draw(example, 8, 0)[0]
    wide = torch.zeros(500, 20_000)

    class Wide(torch.nn.Module):
        def forward(self, x):
            return tuple(wide + x.mean() + n for n in range(3))

    batches = [(inputs[:1].expand(500, *inputs.shape[1:]), torch.zeros(500, dtype=torch.int64)) for _ in range(4)]
    before = SimpleNamespace(total=4 * 500 * 3 * 20_000 * 4)
    tracemalloc.start()
    found = record(Wide(), batches, progress=False)
    held, peak = tracemalloc.get_traced_memory()
    assert found.digest == found.digest
    assert tracemalloc.get_traced_memory()[1] < 1.5 * before.total, "batches are let go while they are joined"
    tracemalloc.stop()
    assert found.outputs.nbytes == before.total and net is not None and held <= peak


def test_the_digest_is_that_of_the_bytes():
    import hashlib

    rng = np.random.default_rng(0)
    outputs, labels = rng.standard_normal((20, 3, 4)).astype(np.float32), rng.integers(0, 4, 20)
    one = ExitRecord(outputs, labels)
    plain = b"(20, 3, 4)" + outputs.tobytes() + b"(20,)" + labels.astype(np.int64).tobytes()
    assert one.digest == hashlib.sha256(plain).hexdigest()
    assert ExitRecord(np.asfortranarray(outputs), labels).digest == one.digest
    assert Policy().thresholds == ()


def test_the_orders_of_a_record_take_half_the_memory_of_64_bit_positions():
    samples, exits = 100_000, 8
    problem = a_problem(samples, exits, 0, ties=True)
    tracemalloc.start()
    orders = problem.order
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1.1 * 4 * samples * (exits - 1)
    assert most - held < 4 * 8 * samples, "what one column needs, not all of them"
    for column, order in zip(problem.scores[:, :-1].T, orders, strict=True):
        assert (np.diff(column[order]) >= 0).all() and len(order) == (column < np.inf).sum()
