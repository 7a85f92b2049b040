"""Test a limit on the risk with a finite calibration sample: Learn then Test with exact and betting bounds.

One half of a record, the tuning half, finds candidates and fixes their order. The calibration half tests them in this
order. The null hypothesis of each test is that the risk of the candidate exceeds the limit. Testing stops at the first
hypothesis that is not rejected. So with probability 1 - delta, over the draw of the calibration half, no candidate that
breaks the limit is accepted.

The risk is the mean of a signed loss D in [-1, 1]: the loss of the early answer minus the loss of the last exit, which
credits answers that leaving early corrects. For an absolute limit D is the loss alone. Shape letters: S samples.

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

_MOST = 0.999  # share of the largest bet, which could lose all capital at once
_BLOCK = 4096  # samples in memory at once
_SEED = 1709_01686  # unlikely to be the seed of a data set
_FRACTIONS = (0.05, 0.1, 0.2, 0.4, 0.7, 0.95)  # shares of the largest bet


def halves(samples: int) -> tuple[Ints, Ints]:
    """Return a random split into a tuning and a calibration half, as positions in the record.

    The split depends only on the number of samples: one that depends on their content is not random for distributions
    with few distinct samples, and a promise then does not hold. The calibration half is in random order.
    """
    # The stream of RandomState never changes (NEP 19), so a record is always split the same way.
    drawn = np.random.RandomState(_SEED).permutation(samples).astype(np.int64)
    return np.sort(drawn[: samples // 2]), drawn[samples // 2 :]


def samples_needed(limit: float, delta: float, bound: str) -> int:
    """Return how many calibration samples a bound needs to prove a limit if the loss that it tests is 0 for all."""
    if not 0 < limit < 1:
        return 1
    if bound == "binomial":
        return math.ceil(math.log(delta) / math.log1p(-limit))  # (1 - limit)^S <= delta
    bets, shares = _spread(limit, 1 / (1 - limit))
    steps = np.log1p(bets * limit)
    log_capital = lambda samples: np.logaddexp.reduce(samples * steps + np.log(shares))  # noqa: E731
    return bisect.bisect_left(range(math.ceil(math.log(2 / delta) / steps[0]) + 1), -math.log(delta), key=log_capital)


def binomial_p(differences: Floats, limit: float) -> float:
    """Return the p-value `P(Bin(S, limit) <= harmed)` of "risk > limit", if D > 0 for `harmed` of `differences` `(S,)`.

    The share of samples with D > 0 is at least the mean of D <= 1, so a limit on the share is a limit on the risk. The
    test is exact if D is 0 or 1, and gives no credit for answers that leaving early corrects.
    """
    return float(binom.cdf(int((differences > 0).sum()), len(differences), limit)) if limit > 0 else 1.0


def betting_p(differences: Floats, limit: float, bet: float, enough: float = 0.0) -> float:
    """Return the p-value of "risk >= limit": 1 / the largest capital of bets that the risk is smaller.

    Each sample multiplies the capital by 1 + bet x (limit - D). If the risk is at least the limit, the capital is a
    supermartingale, and by Ville's inequality it ever reaches 1/p with probability at most p.

    Args:
        differences: `(S,)` D in [-1, 1], in random order.
        limit: of the risk.
        bet: the best bet on other data, from 0 to 1 / (1 - limit). It has half of the capital; others share the rest.
        enough: stop after the first block of samples with p at most this.
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
    """Return the bets, the best one first, and the share of the capital of each."""
    most = 1 / (1 - limit)
    bets = np.array([min(bet, _MOST * most), *(f * most for f in _FRACTIONS)])
    return bets, np.array([0.5, *(0.5 / len(_FRACTIONS),) * len(_FRACTIONS)])


def best_bet(differences: Floats, limit: float) -> float:
    """Return the bet on a grid whose capital grows fastest on `differences` `(S,)`."""
    bets = np.linspace(0.01, _MOST, 100) / (1 - limit)
    values, counts = np.unique(differences, return_counts=True)
    return float(bets[(np.log1p(bets[:, None] * (limit - values[None, :])) @ counts).argmax()])


def fixed_sequence_test(
    tuning: Iterable[Floats], calibration: Iterable[Floats], limit: float, delta: float, bound: str
) -> int:
    """Test candidates in the given order until one fails, and return how many pass.

    Args:
        tuning: the differences `(S,)` of each candidate on the tuning half, which set the bets.
        calibration: the differences on the calibration half.
        limit: of the risk.
        delta: 1 - confidence.
        bound: one of `BOUNDS`; the binomial bound needs differences of -1, 0 and 1.
    """
    limit = min(limit, 1 - 1e-9)
    passed = 0
    for before, differences in zip(tuning, calibration, strict=True):
        if bound == "binomial":
            p = binomial_p(differences, limit)
        else:
            p = betting_p(differences, limit, best_bet(before, limit), enough=delta)
        if p > delta:
            break
        passed += 1
    return passed
