"""Conformal p-values and the test martingale."""

import math

import numpy as np
import pytest

from branchynet.monitor import martingale
from branchynet.monitor.martingale import ConformalRanks, _returns
from helpers.monitoring import p_values


@pytest.mark.parametrize("known", [0, 1, 7, 3000])
@pytest.mark.parametrize("levels", [3, 10**9])
def test_p_values_are_uniform_and_independent_for_any_calibration(known, levels):
    rng = np.random.default_rng(known)
    rows = []
    for _ in range(400):
        values = rng.integers(0, levels, known + 8).astype(float) ** 2
        rows.append(p_values(ConformalRanks(values[:known], rng), values[known:], rng))
    p = np.array(rows)
    for column in p.T:  # Kolmogorov-Smirnov, each at a level of 1e-4
        gap = np.abs(np.sort(column) - (np.arange(400) + 0.5) / 400).max()
        assert gap < math.sqrt(-math.log(1e-4 / 2) / 2 / 400) + 1 / 800
    assert np.abs(np.corrcoef(p.T) - np.eye(8)).max() < 0.25


def test_p_values_are_the_ranks_among_calibration_and_stream():
    rng = np.random.default_rng(0)
    known, stream = rng.normal(size=500), rng.normal(size=300)
    p = p_values(ConformalRanks(known, rng), stream, rng)
    for t in range(300):
        below = (known < stream[t]).sum() + (stream[:t] < stream[t]).sum()
        before = 501 + t
        inside = (
            1
            + (  # earlier values in the same gap between calibration values
                np.searchsorted(np.sort(known), stream[:t]) == np.searchsorted(np.sort(known), stream[t])
            ).sum()
        )
        assert abs(p[t] - below / before) <= inside / before


def test_every_bet_is_fair():
    """For uniform p-values a stake of 1 returns 1 on average, so stakes and cash are a martingale."""
    p = (np.arange(1000) + 0.5) / 1000
    np.testing.assert_allclose(_returns(p).mean(axis=0), 1)


def test_capital_is_the_sum_over_starts_and_bets():
    p = np.random.default_rng(1).random(40)
    cash = np.log(100) / np.log(100 + np.arange(41))
    returns = _returns(p)
    wanted = [
        sum((cash[s] - cash[s + 1]) * returns[s : t + 1].prod(axis=0).mean() for s in range(t + 1)) + cash[t + 1]
        for t in range(40)
    ]
    np.testing.assert_allclose(martingale.TestMartingale().update(p), wanted)
