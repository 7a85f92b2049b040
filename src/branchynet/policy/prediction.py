"""The result of an engine.

Shape letters: B samples in a batch, C classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .values import Floats, Ints


class Prediction(NamedTuple):
    """The result of an engine for a batch of B samples, as numpy arrays.

    Attributes:
        label: `(B, ...)` int64, the index of the largest output along dimension 1. For regression and for several
            labels per sample it has no meaning; use `output`.
        exit: `(B,)` int64, the exit at which the sample left, from 1.
        score: `(B,)` float32, the score at that exit; smaller = surer.
        output: `(B, C, ...)` float32, the output of that exit.

    Example:
        >>> import numpy as np
        >>> found = Prediction(np.array([3]), np.array([1]), np.array([0.25]), np.array([[0.0, 0.5, 1.0, 4.0]]))
        >>> label, exit, score, output = found
        >>> int(label[0]), int(exit[0])
        (3, 1)
    """

    label: Ints
    exit: Ints
    score: Floats
    output: Floats


def concatenated(parts: Sequence[Prediction]) -> Prediction:
    """Return the predictions of consecutive batches as one."""
    if len(parts) == 1:
        return parts[0]
    return Prediction(*(np.concatenate(each) for each in zip(*parts, strict=True)))
