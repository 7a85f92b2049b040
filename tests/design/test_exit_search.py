"""The search over exits and thresholds, compared with all designs."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchynet.design.advising import _finalists
from branchynet.design.exit_search import CandidateScores, ExitSet, break_even, least_us, search_exit_sets
from branchynet.policy.exit_cost import ExitCost
from branchynet.policy.risk_tests import halves


@pytest.mark.parametrize("seed", range(4))
def test_the_search_finds_the_best_of_all_designs(seed):
    generator = np.random.default_rng(seed)
    samples, taps = 120, (0, 0, 1, 2)
    scores = generator.integers(0, 6, (samples, 5)).astype(np.float32)
    losses = (generator.random((samples, 5)) < scores / 8).astype(np.float64)
    branch_us, reach = generator.uniform(1, 4, 4), np.array([2.0, 9.0, 14.0, 30.0])

    def cost(chosen):
        trunk = np.diff([0.0, *reach[[taps[i] for i in chosen]], reach[-1]])
        return ExitCost(tuple(trunk), (*branch_us[list(chosen)], 0.0))

    recorded = CandidateScores(scores, losses, taps, cost)
    scores, losses = scores[recorded.tuning], losses[recorded.tuning]
    most = losses[:, -1].sum() + 2
    found, least = search_exit_sets(recorded, 2 * most, 4, lambda line: None)
    assert found[0].chosen == () and found[0].us == 30
    best, lowest = found[0].us, np.full(4, np.inf)
    for size in (1, 2, 3):
        for chosen in itertools.combinations(range(4), size):
            if len({taps[i] for i in chosen}) < size:
                continue
            each = cost(chosen).latency_us([True] * (size + 1))
            for thresholds in itertools.product(np.arange(0.5, 7), repeat=size):
                left = [next((n for n, i in enumerate(chosen) if s[i] < thresholds[n]), size) for s in scores]
                columns = [*chosen, 4]
                loss = sum(losses[k, columns[n]] for k, n in enumerate(left))
                if loss <= most:
                    best = min(best, us := float(np.mean([each[n] for n in left])))
                    lowest[list(chosen)] = np.minimum(lowest[list(chosen)], us)
        # The search skips sets with an unused exit: a smaller set does the same.
        assert min(f.us for f in found if len(f.chosen) <= size) == pytest.approx(best)
    assert (least >= lowest - 1e-9).all()  # skipped sets included: see above
    assert all(least[i] == pytest.approx(best) for f in found[1:] if f.us == pytest.approx(best) for i in f.chosen)
    assert [len(f.chosen) for f in found] == sorted({len(f.chosen) for f in found})
    assert all(len({taps[i] for i in f.chosen}) == len(f.chosen) == len(f.thresholds) for f in found)


@pytest.mark.parametrize("seed", range(4))
def test_the_search_among_some_candidates_equals_a_search_without_the_others(seed):
    """After some have learned on: their new answers, and of the others nothing."""
    generator = np.random.default_rng(seed)
    samples, taps, kept = 80, (0, 0, 1, 2, 2), [0, 2, 4]
    scores = generator.random((samples, 6)).astype(np.float32)
    losses = (generator.random((samples, 6)) < scores).astype(np.float64)
    new = scores[:, kept] / 2, losses[:, kept] * (generator.random((samples, 3)) < 0.5)
    branch_us, reach = generator.uniform(1, 4, 5), np.array([2.0, 9.0, 14.0, 30.0])

    def cost(chosen, positions=range(5)):
        chosen = [positions[i] for i in chosen]
        trunk = np.diff([0.0, *reach[[taps[i] for i in chosen]], reach[-1]])
        return ExitCost(tuple(trunk), (*branch_us[chosen], 0.0))

    some = CandidateScores(scores, losses, taps, cost).replaced(kept, *new)
    alone = CandidateScores(
        np.column_stack([new[0], scores[:, -1]]),
        np.column_stack([new[1], losses[:, -1]]),
        (0, 1, 2),
        lambda chosen: cost(chosen, kept),
    )
    most = losses[:, -1].sum()
    found, least = search_exit_sets(some, most, 4, lambda line: None, among=kept)
    expected, lowest = search_exit_sets(alone, most, 4, lambda line: None)
    assert [(f.chosen, f.thresholds) for f in found] == [
        (tuple(kept[i] for i in f.chosen), f.thresholds) for f in expected
    ]
    assert np.array_equal(least[kept], lowest) and np.isinf(least[[1, 3]]).all()
    assert np.isfinite(lowest).any() and len(found) > 1


@pytest.mark.parametrize("seed", range(20))
def test_two_branches_are_trained_further_at_each_of_the_best_places(seed, tmp_path):
    """The one in the best set there is, and the most accurate of those in any; none that no set has."""
    generator = np.random.default_rng(seed)
    taps = tuple(int(t) for t in np.sort(generator.integers(0, 6, 15)))
    losses, least = generator.random((30, 16)).round(), generator.permutation(15).astype(float)
    least[generator.random(15) < 0.3] = np.inf
    useful = [i for i in range(15) if least[i] < np.inf]
    best = {
        tap: min((i for i in useful if taps[i] == tap), key=lambda i: least[i]) for tap in {taps[i] for i in useful}
    }
    places = sorted(best, key=lambda tap: least[best[tap]])[:3]
    kept = _finalists(tmp_path / "kept.json", CandidateScores(losses, losses, taps, lambda chosen: None), least, 3)
    assert kept == sorted(set(kept)) and set(kept) <= set(useful) and {taps[i] for i in kept} == set(places)
    for tap in places:
        here, others = [i for i in kept if taps[i] == tap], [i for i in useful if taps[i] == tap]
        assert best[tap] in here and len(here) <= 2
        wrong = losses[halves(30)[0]].sum(axis=0)
        assert min(wrong[here]) == min(wrong[others])
    assert (
        _finalists(tmp_path / "kept.json", CandidateScores(losses, losses, taps, lambda chosen: None), -least, 3)
        == kept
    )


@pytest.mark.parametrize("seed", range(6))
def test_an_exit_saves_time_above_its_break_even_share(seed):
    """Beside the same design without it, sample by sample."""
    generator = np.random.default_rng(seed)
    samples, reach = 50, np.array([2.0, 9.0, 14.0, 30.0])
    every, branch_us = generator.random((2 * samples, 4)).astype(np.float32), generator.uniform(0, 9, 3)

    def cost(chosen):
        trunk = np.diff([0.0, *reach[list(chosen)], reach[-1]])
        return ExitCost(tuple(trunk), (*branch_us[list(chosen)], 0.0))

    recorded = CandidateScores(every, np.zeros((2 * samples, 4)), (0, 1, 2), cost)
    scores = every[recorded.tuning]
    thresholds = tuple(generator.uniform(0, 0.6, 3))

    def mean_and_first(chosen):
        each = cost(chosen).latency_us([True] * (len(chosen) + 1))
        left = [next((n for n, i in enumerate(chosen) if s[i] < thresholds[i]), len(chosen)) for s in scores]
        return np.mean([each[n] for n in left]), np.bincount(left, minlength=len(chosen) + 1) / samples

    mean, share = mean_and_first((0, 1, 2))
    needed = break_even(recorded, ExitSet((0, 1, 2), thresholds, mean))
    for n in range(3):
        without, _ = mean_and_first(tuple(i for i in range(3) if i != n))
        assert 0 <= needed[n] <= 1 and (share[n] >= needed[n]) == (mean <= without)


@given(st.integers(1, 4), st.integers(1, 5), st.data())
def test_the_bound_is_the_best_of_all_exit_rules(exits, samples, data):
    """And so no thresholds beat it: what they do is one of these ways."""
    each = np.cumsum(data.draw(st.lists(st.floats(0, 10), min_size=exits, max_size=exits)))
    wrong = st.lists(st.integers(0, 1), min_size=exits, max_size=exits)
    losses = np.array(data.draw(st.lists(wrong, min_size=samples, max_size=samples)), float)
    ways = [
        (losses[np.arange(samples), left].sum(), each[list(left)].mean())
        for left in itertools.product(range(exits), repeat=samples)
    ]
    most = data.draw(st.integers(int(min(loss for loss, _ in ways)), samples))
    best = min(us for loss, us in ways if loss <= most)
    assert least_us(each, losses, float(most)) == pytest.approx(best, abs=1e-9)
