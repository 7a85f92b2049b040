"""A promise about accuracy, from a finite calibration sample: Learn then Test with exact and betting bounds.

Candidates come from one half of a record and are tested, in an order fixed by that half, on the other. Each test's null
hypothesis is that a candidate's risk exceeds the limit; testing stops where one is not rejected. So with probability
1 - delta, over the draw of the calibration half, no candidate that breaks the limit is accepted.

The risk is the mean of a signed loss D in [-1, 1]: the loss of the early answer less that of the last exit, which
credits answers that leaving early put right; or of the loss alone, for an absolute limit. Shape letters: S samples.

Sources: Angelopoulos et al., Learn then Test, arXiv 2110.01052 (fixed-sequence testing); Waudby-Smith and Ramdas,
Estimating means of bounded random variables by betting, arXiv 2010.09686; Jazbec et al., Fast yet Safe, arXiv
2405.20915.
"""

import bisect
import math
from collections.abc import Iterable

import numpy as np
from scipy.stats import binom

from .values import Floats, Ints

_MOST = 0.999  # of the largest bet, which would lose everything at once
_BLOCK = 4096  # samples whose capital is in memory at once
_SEED = 1709_01686  # unlike those that data are drawn with
_FRACTIONS = (0.05, 0.1, 0.2, 0.4, 0.7, 0.95)  # of the largest bet


def halves(samples: int) -> tuple[Ints, Ints]:
    """A random split of so many samples into a tuning and a calibration half, as places in the record.

    The draw depends on the number of samples alone. A split that their content decides, such as one seeded by a digest
    of it, leaves nothing to chance where a law has few distinct samples, and the promise does not hold. The calibration
    half comes in random order.
    """
    # RandomState's stream is frozen for good (NEP 19): a record that is split again is split alike.
    drawn = np.random.RandomState(_SEED).permutation(samples).astype(np.int64)
    return np.sort(drawn[: samples // 2]), drawn[samples // 2 :]


def fewest(limit: float, delta: float, bound: str) -> int:
    """How many calibration samples a bound needs to keep a limit where leaving early changes no answer."""
    if not 0 < limit < 1:
        return 1
    if bound == "binomial":
        return math.ceil(math.log(delta) / math.log1p(-limit))  # (1 - limit)^S <= delta
    bets, shares = _spread(limit, 1 / (1 - limit))
    steps = np.log1p(bets * limit)

    def enough(samples: int) -> bool:
        return bool(np.logaddexp.reduce(samples * steps + np.log(shares)) >= -math.log(delta))

    return bisect.bisect_left(range(math.ceil(math.log(2 / delta) / steps[0]) + 1), True, key=enough)


def binomial_p(differences: Floats, limit: float) -> float:
    """p-value `P(Bin(S, limit) <= harmed)` of "risk > limit", from the samples that are harmed.

    The share of samples with D > 0 is at least the mean of D <= 1, so a limit on it is one on the risk. Exact where D
    is 0 or 1, and blind to what leaving early puts right.

    Args:
        differences: `(S,)` of -1, 0 and 1.
        limit: of the risk.
    """
    return float(binom.cdf(int((differences > 0).sum()), len(differences), limit)) if limit > 0 else 1.0


def betting_p(differences: Floats, limit: float, bet: float, enough: float = 0.0) -> float:
    """p-value of "risk >= limit": the inverse of the most that a gambler makes who bets that it is smaller.

    The capital is multiplied by 1 + bet x (limit - D) at each sample, a supermartingale where the risk is the limit or
    more; so by Ville's inequality it ever reaches 1/p with probability at most p.

    Args:
        differences: `(S,)` D in [-1, 1], in random order.
        limit: of the risk.
        bet: the best bet on other data, from 0 to 1 / (1 - limit), which has half the capital; the rest is spread.
        enough: stop at the first block of samples after which p is at most this.
    """
    bets, shares = _spread(limit, bet)
    capital, most = np.log(shares)[:, None], 0.0
    for start in range(0, len(differences), _BLOCK):
        block = differences[None, start : start + _BLOCK]
        paths = capital + np.cumsum(np.log1p(bets[:, None] * (limit - block)), axis=1)
        most = max(most, float(np.logaddexp.reduce(paths, axis=0).max()))
        capital = paths[:, -1:]
        if np.exp(-most) <= enough:
            break
    return float(np.exp(-most))


def _spread(limit: float, bet: float) -> tuple[Floats, Floats]:
    """Bets, the best one first, and the share of the capital that each has."""
    most = 1 / (1 - limit)
    bets = np.array([min(bet, _MOST * most), *(f * most for f in _FRACTIONS)])
    return bets, np.array([0.5, *(0.5 / len(_FRACTIONS),) * len(_FRACTIONS)])


def best_bet(differences: Floats, limit: float) -> float:
    """The bet that makes capital grow fastest on `differences` (S,), on a grid."""
    bets = np.linspace(0.01, _MOST, 100) / (1 - limit)
    values, counts = np.unique(differences, return_counts=True)
    return float(bets[(np.log1p(bets[:, None] * (limit - values[None, :])) @ counts).argmax()])


def fixed_sequence_test(
    tuning: Iterable[Floats], calibration: Iterable[Floats], limit: float, delta: float, bound: str
) -> int:
    """How many candidates hold, from the first on, tested in the order given until one fails.

    Args:
        tuning: each candidate's differences `(S,)` on the tuning half, which set the bets.
        calibration: those on the calibration half.
        limit: of the risk.
        delta: 1 - confidence.
        bound: one of `BOUNDS`; the binomial one needs differences of -1, 0 and 1.
    """
    limit = min(limit, 1 - 1e-9)
    held = 0
    for before, differences in zip(tuning, calibration, strict=True):
        if bound == "binomial":
            p = binomial_p(differences, limit)
        else:
            p = betting_p(differences, limit, best_bet(before, limit), enough=delta)
        if p > delta:
            break
        held += 1
    return held
