"""What an engine answers: Prediction.

Shape letters: B samples in a batch, C classes.
"""

from typing import NamedTuple

from .values import Floats, Ints


class Prediction(NamedTuple):
    """What an engine answers for a batch of B samples; numpy arrays.

    Attributes:
        label: `(B, ...)` int64, the index of the largest output along dimension 1; it means nothing for regression and
            for several labels a sample, where `output` is the answer.
        exit: `(B,)` int64, the exit that answered, from 1.
        score: `(B,)` float32, that exit's score; smaller = surer.
        output: `(B, C, ...)` float32, that exit's output.
    """

    label: Ints
    exit: Ints
    score: Floats
    output: Floats
