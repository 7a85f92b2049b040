"""Options of the search for exits."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError
from ..policy.scores import resolve


@dataclass(frozen=True)
class SearchOptions:
    """Options of `advise`.

    Attributes:
        epochs: passes over the training data, for all branches together.
        final_epochs: further passes for the best two branches at each of the four best places, before a second
            choice among these. The advice takes longer and finds faster designs, because large branches need more
            passes than small ones (compare successive halving, Jamieson and Talwalkar 2016).
        taps: places to try, names as in ``named_modules()`` or ``"input"``; by default they are found.
        score: the name of the score by which samples leave.
        seconds: approximate duration of the timing.

    Raises:
        InputError: numbers of epochs that are too small, or an unknown score.

    Example:
        >>> from branchynet import SearchOptions
        >>> SearchOptions(epochs=6, taps=["input", "pool1"]).score
        'entropy'
    """

    epochs: int = 3
    final_epochs: int = 0
    taps: Sequence[str] | None = None
    score: str = "entropy"
    seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.final_epochs < 0:
            raise InputError(f"epochs must be at least 1 and final_epochs 0; got {self.epochs} and {self.final_epochs}")
        resolve(self.score)
