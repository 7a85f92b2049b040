"""Scores that are fitted on a record, as values: numbers that go into JSON and ONNX metadata, and that can be called.

They are made by `fit_temperature` and `fit_score`. Torch is imported only where one is called, so that an engine that
merely reads such a policy does without it.
"""

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import InputError, nearest
from .digests import is_sketch

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
_LARGEST = sys.float_info.max  # an integer of JSON may be larger than any float


class _DescribedScore:
    """A fitted score is told by its name wherever one's own callable is."""

    kind: ClassVar[str]

    @property
    def __name__(self) -> str:
        return self.kind

    def __repr__(self) -> str:
        return self.__name__


@dataclass(frozen=True, repr=False)
class TemperedScore(_DescribedScore):
    """A named score of logits that each exit's own temperature has divided; labels stay what they were.

    Attributes:
        score: a name in `branchynet.policy.record_scores`.
        temperatures: `(N,)`, above 0; above 1 where an exit was surer than it should be.
        fitted_on: the sketch (see `branchynet.policy.digests`) of the samples that it was fitted on, where known.

    Raises:
        InputError: a temperature that is not a positive number; when called, more exits than it was fitted on.

    Source: Guo et al. 2017, arXiv 1706.04599, section 4.2.
    """

    score: str
    temperatures: tuple[float, ...]
    fitted_on: str = ""
    kind: ClassVar[str] = "tempered"

    def __post_init__(self) -> None:
        temperatures = _floats("temperatures", self.temperatures)
        if not isinstance(self.score, str) or not temperatures or min(temperatures) <= 0:
            raise InputError(
                f"a tempered score needs a score's name and a temperature above 0 an exit; got {self.score!r} and "
                f"{self.temperatures!r}"
            )
        object.__setattr__(self, "temperatures", temperatures)
        _check_sketch(self.fitted_on)

    @property
    def __name__(self) -> str:
        return f"tempered {self.score}"

    @property
    def num_exits(self) -> int:
        """N, how many exits it was fitted on."""
        return len(self.temperatures)

    def __call__(self, outputs: "tuple[Tensor, ...]") -> "Tensor":
        """`(B,)` of the outputs so far."""
        from .scores import SCORES, cooled

        _check_exits(self, len(outputs))
        if self.score not in SCORES:
            raise InputError(f"unknown score {self.score!r}{nearest(self.score, SCORES)}")
        return SCORES[self.score](cooled(outputs, self.temperatures))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "kind": self.kind,
            "version": VERSION,
            "score": self.score,
            "temperatures": list(self.temperatures),
            "fitted_on": self.fitted_on,
        }


@dataclass(frozen=True, repr=False)
class LearnedScore(_DescribedScore):
    """A logistic regression an exit on how its answer and those before it look: the log-odds that the answer is wrong.

    Attributes:
        classes: C of the outputs that it was fitted on.
        earlier: whether it looks at earlier exits too; their branches then stay in the graph even where their threshold
            is *never*.
        weights: `(N, F)` for the F features of `branchynet.policy.scores.features`, one more an exit with `earlier`.
        bias: `(N,)`.
        fitted_on: the sketch of the samples that it was fitted on, where known.

    Raises:
        InputError: numbers that do not fit together; when called, outputs of more exits or other classes than fitted.

    Source: the future work of Teerapittayanon et al. 2016, section V-B (meta-recognition).
    """

    classes: int
    earlier: bool
    weights: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]
    fitted_on: str = ""
    kind: ClassVar[str] = "learned"

    def __post_init__(self) -> None:
        bias = _floats("bias", self.bias)
        try:
            weights = tuple(_floats("weights", row) for row in self.weights)
        except TypeError:
            raise InputError(f"weights of a learned score must be one list an exit; got {self.weights!r}") from None
        if type(self.classes) is not int or self.classes < 2 or type(self.earlier) is not bool:
            raise InputError(
                f"a learned score is of two classes or more, with earlier true or false; got {self.classes!r} and "
                f"{self.earlier!r}"
            )
        if not bias or len(weights) != len(bias):
            raise InputError(f"a learned score needs weights and a bias an exit; got {len(weights)} and {len(bias)}")
        for n, row in enumerate(weights, 1):
            wanted = 1 + self.classes + (n - 1) * self.earlier  # as `branchynet.policy.scores.features` makes them
            if len(row) != wanted:
                raise InputError(
                    f"a learned score of {self.classes} classes needs {wanted} weights at exit {n}; got {len(row)}"
                )
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "bias", bias)
        _check_sketch(self.fitted_on)

    @property
    def num_exits(self) -> int:
        """N, how many exits it was fitted on."""
        return len(self.bias)

    def __call__(self, outputs: "tuple[Tensor, ...]") -> "Tensor":
        """`(B,)` log-odds that the latest answer is wrong, of the outputs so far, each `(B, C)`."""
        import torch

        from .scores import answers, features

        _check_exits(self, len(outputs))
        latest = outputs[-1]
        if latest.dim() != 2 or latest.shape[1] != self.classes:
            raise InputError(
                f"this learned score was fitted on outputs (B, {self.classes}) and is given {tuple(latest.shape)}; fit "
                "one on a record of this network"
            )
        found = features(outputs, self.earlier)
        weights = found.new_tensor(self.weights[len(outputs) - 1])
        odds = (found @ weights.unsqueeze(1)).squeeze(1) + self.bias[len(outputs) - 1]
        return torch.where(answers(latest), odds, math.nan)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "kind": self.kind,
            "version": VERSION,
            "classes": self.classes,
            "earlier": self.earlier,
            "weights": [list(row) for row in self.weights],
            "bias": list(self.bias),
            "fitted_on": self.fitted_on,
        }


FittedScore = TemperedScore | LearnedScore
_KINDS: dict[str, type[FittedScore]] = {c.kind: c for c in (TemperedScore, LearnedScore)}


def from_json(value: Any) -> FittedScore:
    """The inverse of `to_json`. Raises `InputError` for another kind, a later version, or broken numbers."""
    kind = value.get("kind") if isinstance(value, dict) else value
    if not isinstance(kind, str) or kind not in _KINDS:
        raise InputError(f"a stored score must have a kind in {sorted(_KINDS)}; got {kind!r}: fit it again")
    version = value.get("version")
    if version != VERSION:
        raise InputError(f"the {kind} score has version {version!r}, and {VERSION} is known; upgrade, or fit it again")
    fields = {k: v for k, v in value.items() if k not in ("kind", "version")}
    try:
        return _KINDS[kind](**fields)
    except TypeError as error:
        raise InputError(f"the {kind} score cannot be read ({error}); fit it again") from error


def check_fitted(score: Any, exits: int) -> None:
    """Raises `InputError` where `score` was fitted on another number of exits."""
    if isinstance(score, FittedScore) and score.num_exits != exits:
        raise InputError(
            f"the {score} score was fitted on {score.num_exits} exits, but here are {exits}; fit one on a record of "
            "this network"
        )


def _check_exits(score: FittedScore, exits: int) -> None:
    if exits > score.num_exits:
        check_fitted(score, exits)


def _check_sketch(fitted_on: Any) -> None:
    if not is_sketch(fitted_on):
        raise InputError(f"fitted_on of a fitted score must be a sketch of samples, or empty; got {fitted_on!r}")


def _floats(name: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or not all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) <= _LARGEST for v in values
    ):
        raise InputError(f"{name} of a fitted score must be a list of finite numbers; got {values!r}")
    return tuple(float(v) for v in values)
