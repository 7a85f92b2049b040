"""Scores that are fitted on a record: callable values of numbers, which JSON and ONNX metadata can store.

`fit_temperature` and `fit_score` create them. PyTorch is imported only when a score is called, so an engine reads such
a policy without it.
"""

import json
import math
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import InputError
from ..stored_values import from_fields
from .sample_digests import is_sketch
from .score_names import check_score

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1


class _DescribedScore:
    """What the kinds share. A fitted score is identified by its name, as a user's callable is."""

    kind: ClassVar[str]
    fitted_on: str

    @property
    def __name__(self) -> str:
        return self.kind

    def __repr__(self) -> str:
        return self.__name__

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        fields = json.loads(json.dumps(asdict(self)))  # type: ignore[call-overload]  # tuples become lists
        return {"kind": self.kind, "version": VERSION, **fields}


@dataclass(frozen=True, repr=False)
class TemperedScore(_DescribedScore):
    """A named score of the logits, divided by one temperature per exit. Labels do not change.

    Attributes:
        score: a name in `branchynet.policy.scores`.
        temperatures: `(N,)`, above 0; above 1 if an exit was too confident.
        fitted_on: the sketch (see `branchynet.policy.sample_digests`) of the samples of the fit; empty if unknown.

    Raises:
        InputError: a temperature is not a positive number, or the score is unknown; when called, more exits than at
            the fit.

    Source: Guo et al. 2017, arXiv 1706.04599, section 4.2.
    """

    score: str
    temperatures: tuple[float, ...]
    fitted_on: str = ""
    kind: ClassVar[str] = "tempered"

    def __post_init__(self) -> None:
        _check(self.fitted_on, self.temperatures)
        if not self.temperatures or min(self.temperatures) <= 0:
            raise InputError(f"a tempered score needs a temperature above 0 per exit; got {self.temperatures!r}")
        check_score(self.score)

    @property
    def __name__(self) -> str:
        return f"tempered {self.score}"

    @property
    def num_exits(self) -> int:
        """N, the number of exits of the fit."""
        return len(self.temperatures)

    def __call__(self, outputs: "tuple[Tensor, ...]") -> "Tensor":
        """Return the score `(B,)` of the outputs so far."""
        from .scores import SCORES, cooled

        if len(outputs) > self.num_exits:
            check_fitted(self, len(outputs))
        return SCORES[self.score](cooled(outputs, self.temperatures))


@dataclass(frozen=True, repr=False)
class LearnedScore(_DescribedScore):
    """One logistic regression per exit, on its outputs and those of earlier exits: the log-odds that it is wrong.

    Attributes:
        classes: C of the outputs of the fit.
        earlier: whether the score also reads earlier exits. Their branches then stay in the graph, even with the
            threshold *never*.
        weights: `(N, F)` for the F features of `branchynet.policy.scores.features`. With `earlier`, F grows by one per
            exit.
        bias: `(N,)`.
        fitted_on: the sketch of the samples of the fit; empty if unknown.

    Raises:
        InputError: numbers that do not fit together; when called, outputs with more exits or other classes than at the
            fit.

    Source: the future work of Teerapittayanon et al. 2016, section V-B (meta-recognition).
    """

    classes: int
    earlier: bool
    weights: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]
    fitted_on: str = ""
    kind: ClassVar[str] = "learned"

    def __post_init__(self) -> None:
        _check(self.fitted_on, self.bias, *self.weights)
        if self.classes < 2 or not self.bias or len(self.weights) != len(self.bias):
            raise InputError(
                f"a learned score needs two classes or more, and weights and a bias per exit; got {self.classes} "
                f"classes, {len(self.weights)} rows of weights and {len(self.bias)} biases"
            )
        for n, row in enumerate(self.weights, 1):
            wanted = 1 + self.classes + (n - 1) * self.earlier  # as in `branchynet.policy.scores.features`
            if len(row) != wanted:
                raise InputError(
                    f"a learned score of {self.classes} classes needs {wanted} weights at exit {n}; got {len(row)}"
                )

    @property
    def num_exits(self) -> int:
        """N, the number of exits of the fit."""
        return len(self.bias)

    def __call__(self, outputs: "tuple[Tensor, ...]") -> "Tensor":
        """Return the log-odds `(B,)` that the latest label is wrong, from the outputs so far, each `(B, C)`."""
        import torch

        from .scores import answers, features

        if len(outputs) > self.num_exits:
            check_fitted(self, len(outputs))
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


FittedScore = TemperedScore | LearnedScore
_KINDS: dict[str, type[FittedScore]] = {c.kind: c for c in (TemperedScore, LearnedScore)}


def from_json(value: Any) -> FittedScore:
    """Create a score from the result of `to_json`. Raises `InputError` for another kind or version, or bad numbers."""
    kind = value.get("kind") if isinstance(value, dict) else value
    if not isinstance(kind, str) or kind not in _KINDS:
        raise InputError(f"a stored score must have a kind in {sorted(_KINDS)}; got {kind!r}: fit it again")
    version = value.get("version")
    if version != VERSION:
        raise InputError(
            f"the {kind} score has version {version!r}, but this release reads version {VERSION}: upgrade, or fit the "
            "score again"
        )
    try:
        return from_fields(_KINDS[kind], {k: v for k, v in value.items() if k not in ("kind", "version")})
    except (ValueError, OverflowError) as error:
        raise InputError(f"the {kind} score cannot be read ({error}); fit it again") from error


def samples_fitted_on(score: Any) -> str:
    """Return the sketch of the samples that a fitted `score` was fitted on; otherwise empty."""
    return score.fitted_on if isinstance(score, FittedScore) else ""


def check_fitted(score: Any, exits: int) -> None:
    """Raise `InputError` if `score` was fitted on another number of exits."""
    if isinstance(score, FittedScore) and score.num_exits != exits:
        raise InputError(
            f"the {score} score was fitted on {score.num_exits} exits, not {exits}; fit one on a record of this network"
        )


def _check(fitted_on: str, *numbers: tuple[float, ...]) -> None:
    if not is_sketch(fitted_on):
        raise InputError(f"fitted_on of a fitted score must be a sketch of samples, or empty; got {fitted_on!r}")
    if not all(map(math.isfinite, chain(*numbers))):
        raise InputError(f"numbers of a fitted score must be finite; got {numbers!r}")
