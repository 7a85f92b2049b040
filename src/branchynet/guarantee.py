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

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import binom

from .types import Floats, Ints

BOUNDS = ("betting", "binomial")
_FRACTIONS = (0.05, 0.1, 0.2, 0.4, 0.7, 0.95)  # of the largest bet


def halves(scores: Floats, losses: Floats) -> tuple[Ints, Ints]:
    """A random split of the samples `(S,)` into a tuning and a calibration half, as places in the record.

    It depends on the samples and not on their order: they are sorted, and their content seeds the draw. The calibration
    half comes in random order.
    """
    rows = np.ascontiguousarray(np.hstack([scores, losses]).astype(np.float32))
    order = np.lexsort(rows.T)
    seed = int.from_bytes(hashlib.sha256(rows[order].tobytes()).digest()[:8], "big")
    drawn = order[np.random.default_rng(seed).permutation(len(order))]
    return np.sort(drawn[: len(drawn) // 2]), drawn[len(drawn) // 2 :]


def fewest(limit: float, delta: float) -> int:
    """How many calibration samples a limit needs where none of them speaks against it: (1 - limit)^S <= delta."""
    return math.ceil(math.log(delta) / math.log1p(-limit)) if 0 < limit < 1 else 1


def binomial_p(differences: Floats, limit: float) -> float:
    """p-value `P(Bin(S, limit) <= harmed)` of "risk > limit", from the samples that are harmed.

    The share of samples with D > 0 is at least the mean of D <= 1, so a limit on it is one on the risk. Exact where D
    is 0 or 1, and blind to what leaving early puts right.

    Args:
        differences: `(S,)` of -1, 0 and 1.
        limit: of the risk.
    """
    return float(binom.cdf(int((differences > 0).sum()), len(differences), limit)) if limit > 0 else 1.0


def betting_p(differences: Floats, limit: float, bet: float) -> float:
    """p-value of "risk >= limit": the inverse of the most that a gambler makes who bets that it is smaller.

    The capital is multiplied by 1 + bet x (limit - D) at each sample, a supermartingale where the risk is the limit or
    more; so by Ville's inequality it ever reaches 1/p with probability at most p.

    Args:
        differences: `(S,)` D in [-1, 1], in random order.
        limit: of the risk.
        bet: the best bet on other data, from 0 to 1 / (1 - limit), which has half the capital; the rest is spread.
    """
    most = 1 / (1 - limit)
    bets = np.array([min(bet, 0.999 * most), *(f * most for f in _FRACTIONS)])
    shares = np.array([0.5, *(0.5 / len(_FRACTIONS),) * len(_FRACTIONS)])
    steps = np.log1p(bets[:, None] * (limit - differences[None, :]))
    paths = np.cumsum(steps, axis=1) + np.log(shares)[:, None]
    return float(min(1.0, np.exp(-np.logaddexp.reduce(paths, axis=0).max(initial=0.0))))


def best_bet(differences: Floats, limit: float) -> float:
    """The bet that makes capital grow fastest on `differences` (S,), on a grid."""
    bets = np.linspace(0.01, 0.999, 100) / (1 - limit)
    values, counts = np.unique(differences, return_counts=True)
    return float(bets[(np.log1p(bets[:, None] * (limit - values[None, :])) @ counts).argmax()])


def accepted(tuning: Sequence[Floats], calibration: Sequence[Floats], limit: float, delta: float, bound: str) -> int:
    """How many candidates hold, from the first on, tested in the order given until one fails.

    Args:
        tuning: each candidate's differences `(S,)` on the tuning half, which set the bets.
        calibration: those on the calibration half.
        limit: of the risk.
        delta: 1 - confidence.
        bound: one of `BOUNDS`; the binomial one needs differences of -1, 0 and 1.
    """
    limit = min(limit, 1 - 1e-9)
    for count, (before, differences) in enumerate(zip(tuning, calibration, strict=True)):
        if bound == "binomial":
            p = binomial_p(differences, limit)
        else:
            p = betting_p(differences, limit, best_bet(before, limit))
        if p > delta:
            return count
    return len(calibration)
