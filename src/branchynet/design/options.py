"""What a search for exits tries, and how long it learns and measures, as one value."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError
from ..policy.scores import resolve


@dataclass(frozen=True)
class SearchOptions:
    """Options of `advise`: ``advise(..., search=SearchOptions(epochs=6))``.

    Attributes:
        epochs: passes over the training data, for all branches together.
        final_epochs: more of them for the best two branches at each of the four best places, after which the choice
            among these is made again: large branches are still learning after a few passes, when small ones are not. So
            advice takes longer and promises more (as successive halving does, Jamieson and Talwalkar 2016).
        taps: places to try instead of those found, names as in ``named_modules()`` or ``"input"``.
        score: the name of the score by which samples leave.
        seconds: about how long to time.

    Raises:
        InputError: numbers of epochs that are too small, or an unknown score.
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
