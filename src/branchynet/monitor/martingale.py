"""Test whether a stream is distributed like its calibration sample: conformal p-values, and a test martingale.

`ConformalRanks` turns values into p-values, which are independent and uniform if calibration and stream are
exchangeable. `TestMartingale` bets on the p-values, and grows if they are not. Shape letters: M calibration values, B
new values, K bets.
"""

import numpy as np

from ..policy.values import Floats

BINS = 1024
"""The maximum number of bins for calibration ranks, which bounds the time per value."""

CHUNK = 128
"""The maximum number of values per call of `ConformalRanks` and `TestMartingale`: products of bets stay in float64."""

# The bets: every cut with every odds ratio. Their densities integrate to 1.
_ODDS, _CUTS = (
    grid.ravel()
    for grid in np.meshgrid(
        [1 / 16, 1 / 4, 1 / 2, 1 / 1.3, 1.3, 2, 4, 16],
        [0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.995],
    )
)
_HIGH = 1 / (1 - _CUTS + _ODDS * _CUTS)
_LOW = _ODDS * _HIGH
_PATIENCE = 100.0


class ConformalRanks:
    """The rank of each new value of a stream among the calibration values and the stream before it.

    Equal values get a random order. The M calibration values leave M + 1 gaps. As in Polya's urn, a new value falls
    into a gap with a probability proportional to one plus the number of earlier values in that gap. Gaps are joined
    into at most `BINS` bins, whose probabilities add up, and a p-value is drawn uniformly within its bin. So the
    p-values are independent and uniform for any M and any number of values, and memory does not grow.

    Args:
        values: `(M,)` float64 calibration values without NaN; M may be 0.
        rng: gives the order of equal calibration values.

    Source: Vovk, Gammerman and Shafer 2005, *Algorithmic Learning in a Random World*, chapters 7 and 8 (smoothed
    conformal p-values of an exchangeable sequence are independent and uniform).
    """

    def __init__(self, values: Floats, rng: np.random.Generator) -> None:
        self.values, order = np.unique(values, return_inverse=True)
        keys = np.sort(2 * order + rng.random(len(values)))
        kept = np.unique(np.linspace(1, len(keys), min(len(keys), BINS - 1)).astype(np.int64))  # ranks, from 1
        self._edges = keys[kept - 1]
        self._weights = np.diff(np.concatenate([[0], kept, [len(keys) + 1]]))

    def p_values(self, values: Floats, chance: Floats) -> Floats:
        """Return the p-values `(B,)` in [0, 1] of the next `values` `(B,)`, small for small values; B <= `CHUNK`.

        Args:
            values: without NaN.
            chance: `(B, 2)` new uniform numbers: for the order of equal values, and for the position within a bin.
        """
        above = np.searchsorted(self.values, values)
        equal = np.zeros(len(values), bool)
        inside = above < len(self.values)
        equal[inside] = self.values[above[inside]] == values[inside]
        keys = 2.0 * above + np.where(equal, chance[:, 0], -0.5)
        bins = np.searchsorted(self._edges, keys, side="right")
        below = np.cumsum(self._weights) - self._weights
        earlier = np.tri(len(bins), k=-1, dtype=bool)
        lower = ((bins[None, :] < bins[:, None]) & earlier).sum(axis=1)
        same = ((bins[None, :] == bins[:, None]) & earlier).sum(axis=1)
        total = below[-1] + self._weights[-1] + np.arange(len(bins))
        p = (below[bins] + lower + chance[:, 1] * (self._weights[bins] + same)) / total
        self._weights += np.bincount(bins, minlength=len(self._weights))
        return p


class TestMartingale:
    """The capital of bets against uniform p-values. It starts at 1, and ever exceeds 1/a with probability at most a.

    A bet is a density that is constant below and above a cut, with mean 1 under uniformity: it wins if more, or fewer,
    p-values lie below the cut than expected. Each of K bets starts again at every value with a small part of the
    capital. These parts sum to 1 over all time; the part not yet staked is cash. So the total is a martingale. After
    a change at value t, new bets start from about 1 / (t log(t)^2), whatever the earlier losses.

    Sources: Ville 1939 (the bound); Vovk 2021, *Testing Randomness Online*, doi:10.1214/20-STS817 (conformal test
    martingales, and Shiryaev-Roberts procedures on them); Shin, Ramdas and Rinaldo 2024, *E-detectors*,
    arXiv:2203.03532 (sums over starting times, with baseline increments from mixtures of bets); Waudby-Smith and Ramdas
    2024, doi:10.1093/jrsssb/qkad009 (betting).
    """

    def __init__(self) -> None:
        self._staked = np.zeros(len(_CUTS))
        self._seen = 0

    def update(self, p: Floats) -> Floats:
        """Return the capital `(B,)` after each of the next p-values `(B,)`; B <= `CHUNK`."""
        growth = np.cumprod(_returns(p), axis=0)
        cash = np.log(_PATIENCE) / np.log(_PATIENCE + self._seen + np.arange(len(p) + 1))
        starts = (cash[:-1] - cash[1:])[:, None]
        before = np.concatenate([np.ones((1, growth.shape[1])), growth[:-1]])
        staked = growth * (self._staked + np.cumsum(starts / before, axis=0))
        self._staked = staked[-1]
        self._seen += len(p)
        return staked.mean(axis=1) + cash[1:]


def suspect(p: Floats) -> tuple[int, float]:
    """Return the start in the latest p-values `(B,)` from which a bet would have won most, and its cut in (0, 1)."""
    gains = np.cumsum(np.log(_returns(p))[::-1], axis=0)[::-1]
    start, bet = np.unravel_index(gains.argmax(), gains.shape)
    return int(start), float(_CUTS[bet])


def _returns(p: Floats) -> Floats:
    """Return the payoff of each bet `(B, K)` for a stake of 1."""
    return np.where(p[:, None] < _CUTS, _LOW, _HIGH)
