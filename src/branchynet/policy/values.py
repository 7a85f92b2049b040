"""Frozen values: policies, outcomes, promises and choices.

Shape letters: S samples recorded, B samples in a batch, N exits. Exits are numbered from 1, as in the paper; position
n - 1 of a tuple or axis belongs to exit n.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..argument_checks import threshold_list
from ..errors import InputError
from ..files import read_sealed, write_sealed
from ..stored_values import from_stored
from .fitted_scores import FittedScore, check_fitted, from_json
from .score_names import check_score, stored_name

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

_SENTENCES = {
    "max_drop": "accuracy is at most {} points below the last exit's",
    "min_accuracy": "accuracy is at least {}%",
    "max_disagreement": "at most {}% of the answers differ from the last exit's",
}
PROMISED = tuple(_SENTENCES)
"""The limits of `choose` that come with a promise."""

BOUNDS = ("betting", "binomial")
"""The tests of a promise."""


@dataclass(frozen=True)
class Policy:
    """A score and its thresholds, which decide where each sample leaves.

    Attributes:
        score: a name in `branchynet.policy.scores`, a fitted score, or a callable ``score(outputs_so_far) -> (B,)``;
            for a record of scores, its `score`.
        thresholds: N-1 thresholds, one per exit except the last. A sample leaves at the first exit whose score is
            strictly below its threshold. None means *never*: the branch is left out of the graph, with its cost.

    Raises:
        InputError: a threshold that is not finite, a score that is neither a known name nor a callable, or a fitted
            score of another number of exits.

    Example:
        >>> policy = Policy("entropy", (0.25, None))
        >>> policy.enabled
        (True, False, True)
    """

    score: Any = "entropy"
    thresholds: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        values = threshold_list(self.thresholds)
        if any(t is not None and not math.isfinite(t) for t in values):
            raise InputError(f"thresholds must be finite numbers, or None for never; got {values}")
        check_score(self.score)
        check_fitted(self.score, len(values) + 1)
        set_fields(self, thresholds=values)

    @property
    def num_exits(self) -> int:
        """N, the number of exits, including the last."""
        return len(self.thresholds) + 1

    @property
    def enabled(self) -> tuple[bool, ...]:
        """`(N,)` whether each exit is in use; the last always is."""
        return (*(t is not None for t in self.thresholds), True)

    def rules(self, digits: int = 4, never: str = "never") -> tuple[str, ...]:
        """Return the rule of each exit `(N,)` as text, with `digits` significant digits.

        >>> Policy("entropy", (0.25, None)).rules()
        ('entropy < 0.25', 'never', 'always')
        """
        name = score_name(self.score)
        return (*(never if t is None else f"{name} < {t:.{digits}g}" for t in self.thresholds), "always")

    def to_json(self) -> dict[str, Any]:
        """Return ``{"score": ..., "thresholds": [...]}``: the name or the numbers of the score, and None for never."""
        score = self.score.to_json() if isinstance(self.score, FittedScore) else score_name(self.score)
        return {"score": score, "thresholds": list(self.thresholds)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Policy":
        """Create a policy from the result of `to_json`, for named and fitted scores. Raises `InputError`."""
        entries: dict[str, Any] = value if isinstance(value, dict) else {}
        score, thresholds = entries.get("score"), entries.get("thresholds")
        kinds = {int, float, type(None)}
        if not (isinstance(score, (str, dict)) and isinstance(thresholds, list) and {*map(type, thresholds)} <= kinds):
            raise InputError(
                f"a stored policy must have a score and a list of numbers or null as thresholds; got {value!r:.80}"
            )
        return cls(from_json(score) if isinstance(score, dict) else stored_name(score), tuple(thresholds))


@dataclass(frozen=True)
class Outcome:
    """The accuracy and cost of a policy on a record.

    Attributes:
        samples: S.
        accuracy: 1 - mean loss; losses other than 0 and 1 define another accuracy, such as pixel accuracy.
        accuracy_interval: the 95% interval of `accuracy`.
        last_accuracy: the accuracy of the last exit alone.
        exit_share: `(N,)` share of the samples that leave at each exit; the sum is 1.
        exit_accuracy: `(N,)` accuracy of the samples that leave at each exit; None if none does.
        mean_us, p95_us, worst_us, mean_macs: cost per sample; None without an `ExitCost`.

    Example:
        >>> record = ExitRecord.from_scores(scores=[[0.1, 0.0], [0.9, 0.0]], losses=[[0, 0], [1, 0]], score="entropy")
        >>> evaluate(record, Policy("entropy", (0.5,))).exit_share
        (0.5, 0.5)
    """

    samples: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    last_accuracy: float
    exit_share: tuple[float, ...]
    exit_accuracy: tuple[float | None, ...]
    mean_us: float | None = None
    p95_us: float | None = None
    worst_us: float | None = None
    mean_macs: float | None = None

    def __str__(self) -> str:
        """Accuracy, share of each exit, and mean time."""
        low, high = self.accuracy_interval
        leave = ", ".join(f"exit {n} answers {share:.1%}" for n, share in enumerate(self.exit_share, 1))
        time = "" if self.mean_us is None else f"; {self.mean_us:.1f} us per sample"
        return (
            f"accuracy {self.accuracy:.2%} (95% interval {low:.2%} to {high:.2%}), last exit alone "
            f"{self.last_accuracy:.2%}, on {self.samples:,} samples; {leave}{time}"
        )


@dataclass(frozen=True)
class Promise:
    """The guarantee that `choose` gives for unseen samples.

    Attributes:
        limit: ``"max_drop"``, ``"min_accuracy"`` or ``"max_disagreement"``.
        value: of the limit, a fraction.
        confidence: probability, over the draw of the record, that the limit holds for its distribution.
        bound: the test, ``"betting"`` or ``"binomial"``.
        tuning: how many samples found the candidates.
        calibration: how many other samples tested them.

    Raises:
        InputError: an unknown limit or bound.

    Example:
        >>> print(Promise("max_drop", 0.005, 0.95, "betting", tuning=5000, calibration=5000))
        With 95% confidence, accuracy is at most 0.50 points below the last exit's, on data like the 10,000 samples...
    """

    limit: str
    value: float
    confidence: float
    bound: str
    tuning: int
    calibration: int

    def __post_init__(self) -> None:
        for name, value, known in (("limit", self.limit, PROMISED), ("bound", self.bound, BOUNDS)):
            if value not in known:
                raise InputError(f"unknown {name} {value!r} of a promise; take one of {', '.join(known)}")

    def __str__(self) -> str:
        """The guarantee in one sentence."""
        what = _SENTENCES[self.limit].format(f"{100 * self.value:.2f}")
        return (
            f"With {100 * self.confidence:g}% confidence, {what}, on data like the {self.tuning + self.calibration:,} "
            f"samples used to choose ({self.calibration:,} of them to test it, {self.bound} bound)."
        )


@dataclass(frozen=True)
class Choice:
    """The policy that `choose` found, and its outcome on the record used to choose it.

    Attributes:
        policy: score and thresholds.
        constraint: the given limit, such as ``{"max_drop": 0.005}``.
        outcome: the outcome on the record used to choose. It is optimistic; report that of another record.
        record_digest: the digest of that record, so that `evaluate` can warn of an evaluation on the same data.
        promise: the guarantee for other samples, or None without one.
        network: the `fingerprint` of the recorded network; None if unknown.
        samples: the sketch of the recorded samples (see `branchynet.policy.sample_digests`); empty if unknown.
        reason: why no sample leaves early; empty if some do.

    Example:
        >>> record = ExitRecord.from_scores(scores=[[0.1, 0.0], [0.9, 0.0]], losses=[[0, 0], [1, 0]], score="entropy")
        >>> print(choose(record, max_drop=0, confidence=None))
        exit 1 answers 50.0%: entropy < 0.5
        exit 2 answers 50.0%: always
        accuracy 100.00%, last exit alone 100.00%, on the 2 samples used to choose
    """

    policy: Policy
    constraint: dict[str, float]
    outcome: Outcome
    record_digest: str = field(repr=False)
    promise: Promise | None = None
    network: str | None = None
    samples: str = field(default="", repr=False)
    reason: str = ""

    def __str__(self) -> str:
        """One line per exit, then the accuracy, the promise, and the reason if no sample leaves early."""
        outcome = self.outcome
        rules = enumerate(zip(self.policy.rules(), outcome.exit_share, strict=True), 1)
        lines = [f"exit {n} answers {share:.1%}: {rule}" for n, (rule, share) in rules]
        accuracy = (
            f"accuracy {outcome.accuracy:.2%}, last exit alone {outcome.last_accuracy:.2%}, on the "
            f"{outcome.samples:,} samples used to choose"
        )
        advice = self.reason and f"{self.reason} `advise` looks for exits that pay."
        return "\n".join(map(str, filter(None, [*lines, accuracy, self.promise, advice])))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file with a checksum. Raises `FileError`."""
        write_sealed(path, "choice", {**asdict(self), "policy": self.policy.to_json()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Choice":
        """Read a file that `save` wrote. Raises `FileError`, also for edited files: the promise would not hold."""
        remedy = "make it again with `branchynet choose` or choose(...); for thresholds of your own use Policy"
        return from_stored(cls, read_sealed(path, "choice", remedy), path, "choose(...)")


def thresholds_text(thresholds: Sequence[float | None]) -> str:
    """Return thresholds separated by commas, such as ``0.25, never``."""
    return ", ".join("never" if t is None else f"{t:.4g}" for t in thresholds)


def score_name(score: Any) -> str:
    """Return the name of a score, which is a name or a callable."""
    return score if isinstance(score, str) else getattr(score, "__name__", "custom")


def set_fields(value: Any, **fields: Any) -> None:
    """Set fields of a frozen value during its initialization."""
    for name, content in fields.items():
        object.__setattr__(value, name, content)


Z95 = 1.959963984540054  # 95% of a normal distribution lie within this many standard deviations
STEADY = 0.03  # times with a smaller spread are good enough
