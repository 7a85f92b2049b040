"""The exit rule: a sample leaves at the first exit whose score is strictly below its threshold.

Shape letters: S samples, N exits.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from .values import Floats, Ints


def route(scores: Floats, thresholds: Sequence[float | None]) -> Ints:
    """Return the exit `(S,)`, from 1, of each sample: the first whose score is below its threshold, else the last.

    Args:
        scores: `(S, N)`, smaller = surer. Scores of the last exit are not used; a sample with NaN does not leave.
        thresholds: N-1 thresholds, rounded to float32; None means never.

    Raises:
        InputError: the number of thresholds is not N-1.

    Source: Teerapittayanon et al. 2016, Figure 2.
    """
    scores = np.asarray(scores, np.float32)
    if scores.ndim != 2 or len(thresholds) != scores.shape[1] - 1:
        raise InputError(
            f"{len(thresholds)} thresholds need scores of shape (S, {len(thresholds) + 1}), one column per exit; "
            f"got {scores.shape}"
        )
    return exit_positions(scores, as_deployed(thresholds)) + 1


def stays(scores: Any, threshold: Any) -> Any:
    """Return whether samples continue to later exits: their scores, an array or a tensor, are not below, or NaN."""
    return ~(scores < threshold)


def as_deployed(thresholds: Sequence[float | None]) -> Floats:
    """Return the thresholds of a `Policy` as the float32 numbers of the deployed network; NaN for never."""
    with np.errstate(over="ignore"):  # a threshold beyond float32 is infinite in the deployed network too
        return np.array([np.nan if t is None else t for t in thresholds], np.float64).astype(np.float32)


def exit_positions(scores: Floats, thresholds: Floats) -> Ints:
    """Return the exit `(S,)`, from 0, at which each sample leaves, for thresholds `(N-1,)` with NaN for never."""
    used = np.nonzero(~np.isnan(thresholds))[0]
    passed = np.zeros(len(scores), np.min_scalar_type(scores.shape[1]))  # of the exits in use, how many a sample passes
    stay = np.ones(len(scores), bool)
    for n in used:  # in bytes and without branches: far faster than masks, or positions in int64
        stay &= stays(scores[:, n], thresholds[n])
        passed += stay.view(np.uint8)
    return np.append(used, scores.shape[1] - 1).take(passed)
