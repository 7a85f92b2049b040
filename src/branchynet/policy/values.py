"""The frozen values that pass between the rooms: ExitCost, Policy, Outcome, Promise, Choice.

Shape letters: S samples recorded, B samples in a batch, N exits, C classes. Exits are numbered from 1, as in the paper;
position n - 1 of a tuple or axis belongs to exit n.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arguments import ordered, real, threshold_list
from ..errors import FileError, InputError
from ..files import check_checksum, checksum, read_json, write_json
from ..stored import from_stored
from .fitted_scores import FittedScore, check_fitted, from_json

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

_SAID = {
    "max_drop": "accuracy is at most {} points below the last exit's",
    "min_accuracy": "accuracy is at least {} %",
    "max_disagreement": "at most {} % of the answers differ from the last exit's",
}
PROMISED = tuple(_SAID)
"""The limits of `choose` that come with a promise."""

BOUNDS = ("betting", "binomial")
"""How a promise can be tested."""


@dataclass(frozen=True)
class ExitCost:
    """What each stage costs, a sample: the trunk segment up to each exit's tap, and each branch by itself.

    Trunk and branches stand apart, so that removing an exit removes its cost. Every tuple has one figure an exit; the
    last exit's "branch" is only the work that is not the backbone's own (computing its score, and what deciding to go
    on took).

    Attributes:
        trunk_us, branch_us: microseconds a sample, measured in the deployment engine.
        trunk_macs, branch_macs: multiply-accumulates a sample.
        batch_size, threads: how the times were taken.
        network: the `fingerprint` of the network that was measured, where known.
        plain_us: microseconds a sample of the backbone alone, timed with the others; None where unknown.
        spread: by what share of them the times may be off (95 %), as they differed while they were measured; None where
            unknown.
    """

    trunk_us: tuple[float, ...]
    branch_us: tuple[float, ...]
    trunk_macs: tuple[float, ...] = ()
    branch_macs: tuple[float, ...] = ()
    batch_size: int = 1
    threads: int = 1
    network: str | None = None
    plain_us: float | None = None
    spread: float | None = None

    def __post_init__(self) -> None:
        for name in ("trunk_us", "branch_us", "trunk_macs", "branch_macs"):
            given = getattr(self, name)
            given = ordered(f"ExitCost.{name}", given, "give one figure per exit, such as (12.5, 40.0)")
            values = tuple(real(f"a figure of ExitCost.{name}", v) for v in given)
            if name.endswith("_macs") and not values:
                values = (0.0,) * len(self.trunk_us)
            if len(values) != len(self.trunk_us) or not values:
                raise InputError(f"ExitCost.{name} has {len(values)} figures but trunk_us has {len(self.trunk_us)}")
            if min(values) < 0:
                raise InputError(f"ExitCost.{name} must be finite and not negative; got {values}")
            set_fields(self, **{name: values})

    @property
    def num_exits(self) -> int:
        """N, the number of exits."""
        return len(self.trunk_us)

    def latency_us(self, enabled: Sequence[bool]) -> Floats:
        """`(N,)` microseconds to answer at each exit; only the branches marked in `enabled` (N,) are computed.

        Without an early exit that is the trunk alone, the work of the plain network: the last exit's branch, its score,
        is then left out too.
        """
        return _cumulative(self.trunk_us, self.branch_us, enabled)

    def macs(self, enabled: Sequence[bool]) -> Floats:
        """`(N,)` multiply-accumulates to answer at each exit, likewise."""
        return _cumulative(self.trunk_macs, self.branch_macs, enabled)

    def __str__(self) -> str:
        """One line per exit."""
        lines = [f"exit {n}: trunk {t:.1f} us, branch {b:.1f} us" for n, (t, b) in enumerate(self._us(), 1)]
        spread = "" if self.spread is None else f", within {self.spread:.0%}"
        return "\n".join([*lines, f"per sample, batch {self.batch_size}, threads {self.threads}{spread}"])

    def _us(self) -> Iterable[tuple[float, float]]:
        return zip(self.trunk_us, self.branch_us, strict=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, with a checksum of it. Raises `FileError`."""
        _write_sealed(path, "cost", asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ExitCost":
        """Read what `save` wrote. Raises `FileError`."""
        stored = _read_sealed(path, "cost", "measure it again with measure(...)")
        return from_stored(cls, stored, path, "measure(...)")


@dataclass(frozen=True)
class Policy:
    """Which score is compared with which thresholds: all that the deployed network needs to know.

    Attributes:
        score: the name of a score (see `branchynet.policy.record_scores`), a fitted one, or a callable
            ``score(outputs_so_far) -> (B,)``.
        thresholds: one an exit but the last (N-1); a sample leaves at the first exit whose score is strictly below it.
            None means *never*: the branch is left out of the graph, and its cost with it.
    """

    score: Any = "entropy"
    thresholds: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        values = threshold_list(self.thresholds)
        if any(t is not None and not math.isfinite(t) for t in values):
            raise InputError(f"thresholds must be finite numbers, or None for never; got {values}")
        if not (callable(self.score) or isinstance(self.score, str)):
            raise InputError(f"score must be a name or a callable; got {self.score!r}")
        check_fitted(self.score, len(values) + 1)
        set_fields(self, thresholds=values)

    @property
    def num_exits(self) -> int:
        """N, the number of exits, the last one included."""
        return len(self.thresholds) + 1

    @property
    def enabled(self) -> tuple[bool, ...]:
        """`(N,)` whether each exit is in use; the last always is."""
        return (*(t is not None for t in self.thresholds), True)

    def rules(self, digits: int = 4, never: str = "never") -> tuple[str, ...]:
        """`(N,)` when a sample leaves at each exit, in words; thresholds have so many `digits`.

        >>> Policy("entropy", (0.25, None)).rules()
        ('entropy < 0.25', 'never', 'always')
        """
        name = score_name(self.score)
        return (*(never if t is None else f"{name} < {t:.{digits}g}" for t in self.thresholds), "always")

    def to_json(self) -> dict[str, Any]:
        """``{"score": name, "thresholds": [...]}`` with null for never; a fitted score is stored whole."""
        score = self.score.to_json() if isinstance(self.score, FittedScore) else score_name(self.score)
        return {"score": score, "thresholds": list(self.thresholds)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Policy":
        """The inverse of `to_json` for named and fitted scores. Raises `InputError` where it is broken."""
        if not (isinstance(value, dict) and {"score", "thresholds"} <= value.keys()):
            raise InputError(f"a stored policy must be an object with score and thresholds; got {value!r:.80}")
        score, thresholds = value["score"], value["thresholds"]
        numbers = isinstance(thresholds, list) and {type(t) for t in thresholds} <= {int, float, type(None)}
        if not numbers or not isinstance(score, (str, dict)):
            raise InputError(
                f"a stored policy must have a score and a list of numbers or null as thresholds; got {value!r:.80}"
            )
        return cls(from_json(score) if isinstance(score, dict) else score, tuple(thresholds))


@dataclass(frozen=True)
class Outcome:
    """What a policy does on a record: quality, who leaves where, and the mean cost.

    Attributes:
        samples: S.
        accuracy: 1 - mean loss of the answers given, which for losses other than 0 or 1 is what those make it, such as
            a pixel accuracy; `accuracy_interval` is its 95 % interval.
        last_accuracy: the same for the last exit alone.
        exit_share: `(N,)` share of the samples that leave at each exit, summing to 1.
        exit_accuracy: `(N,)` accuracy among those that leave there; None where nobody does.
        mean_us, p95_us, worst_us, mean_macs: cost a sample, None where no ExitCost was given.
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
        """The accuracy and its interval, who leaves where, and the mean time."""
        low, high = self.accuracy_interval
        leave = ", ".join(f"exit {n} answers {share:.1%}" for n, share in enumerate(self.exit_share, 1))
        time = "" if self.mean_us is None else f"; {self.mean_us:.1f} us per sample"
        return (
            f"accuracy {self.accuracy:.2%} (95 % interval {low:.2%} to {high:.2%}), last exit alone "
            f"{self.last_accuracy:.2%}, on {self.samples:,} samples; {leave}{time}"
        )


@dataclass(frozen=True)
class Promise:
    """What `choose` stands for on samples that it has not seen. `str()` says it in one sentence.

    Attributes:
        limit: ``"max_drop"``, ``"min_accuracy"`` or ``"max_disagreement"``.
        value: of the limit, a fraction.
        confidence: probability, over the draw of the record, that the limit holds for its distribution.
        bound: ``"betting"`` or ``"binomial"``: how it was tested.
        tuning: how many samples found the candidates.
        calibration: how many others tested them.

    Raises:
        InputError: an unknown limit or bound.
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
        """Such as: With 95 % confidence, accuracy is at most 0.50 points below the last exit's, on data like these."""
        what = _SAID[self.limit].format(f"{100 * self.value:.2f}")
        return (
            f"With {100 * self.confidence:g} % confidence, {what}, on data like the {self.tuning + self.calibration:,} "
            f"samples that chose ({self.calibration:,} of them tested it, {self.bound} bound)."
        )


@dataclass(frozen=True)
class Choice:
    """The policy that `choose` found, on what grounds, and what it did on the data that chose it. `str()` says it.

    Attributes:
        policy: score and thresholds.
        constraint: the limit asked for, such as ``{"max_drop": 0.005}``.
        outcome: on the record that chose (validation): optimistic, so report another record's.
        record_digest: of the record that chose, so that judging on the same data can be noticed.
        promise: what holds for other samples, or None where no promise was asked for.
        network: the `fingerprint` of the network whose record chose, where known.
        samples: the sketch (see `branchynet.policy.digests`) of those that chose, where known.
        reason: why no sample leaves early; empty where some do.
    """

    policy: Policy
    constraint: dict[str, float]
    outcome: Outcome
    record_digest: str
    promise: Promise | None = None
    network: str | None = None
    samples: str = field(default="", repr=False)
    reason: str = ""

    def __str__(self) -> str:
        """One line per exit, then the accuracy, the promise, and the reason where no sample leaves early."""
        outcome = self.outcome
        lines = [
            f"exit {n} answers {share:.1%}: {rule}"
            for n, (rule, share) in enumerate(zip(self.policy.rules(), outcome.exit_share, strict=True), 1)
        ]
        accuracy = (
            f"accuracy {outcome.accuracy:.2%}, last exit alone {outcome.last_accuracy:.2%}, on the "
            f"{outcome.samples:,} samples that chose"
        )
        promise = "" if self.promise is None else str(self.promise)
        advice = self.reason and f"{self.reason} `advise` looks for exits that pay."
        return "\n".join(filter(None, [*lines, accuracy, promise, advice]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, with a checksum of it. Raises `FileError`."""
        _write_sealed(path, "choice", {**asdict(self), "policy": self.policy.to_json()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Choice":
        """Read what `save` wrote, and as it wrote it: other thresholds have no promise. Raises `FileError`."""
        stored = _read_sealed(path, "choice", _AGAIN)
        try:
            policy = Policy.from_json(stored["policy"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise FileError(f"{path} is no Choice ({error}); make it with choose(...)") from error
        return from_stored(cls, {**stored, "policy": policy}, path, "choose(...)")


_AGAIN = "make it again with `branchynet choose` or choose(...); for thresholds of your own take Policy"


def _write_sealed(path: str | os.PathLike[str], kind: str, content: dict[str, Any]) -> None:
    """Write as JSON, with a checksum of the content. Raises `FileError`."""
    write_json(path, {**content, "sha256": checksum(_parts(kind, content))})


def _read_sealed(path: str | os.PathLike[str], kind: str, remedy: str) -> Any:
    """What `_write_sealed` wrote, compared with its checksum where it has one. Raises `FileError`."""
    stored = read_json(path)
    if isinstance(stored, dict) and "sha256" in stored:  # files of earlier versions have none
        known = stored.pop("sha256")
        check_checksum(path, known, _parts(kind, stored), remedy)
    return stored


def _parts(kind: str, content: dict[str, Any]) -> list[tuple[str, str]]:
    """What a checksum is of: the content, however the file is laid out."""
    return [(kind, json.dumps(content, sort_keys=True))]


def thresholds_text(thresholds: Sequence[float | None]) -> str:
    """Thresholds with commas between, such as ``0.25, never``."""
    return ", ".join("never" if t is None else f"{t:.4g}" for t in thresholds)


def score_name(score: Any) -> str:
    """The name of a score that is given by name or as a callable."""
    return score if isinstance(score, str) else getattr(score, "__name__", "custom")


def _cumulative(trunk: Sequence[float], branch: Sequence[float], enabled: Sequence[bool]) -> Floats:
    if len(enabled) != len(trunk):
        raise InputError(f"enabled has {len(enabled)} flags for {len(trunk)} exits")
    counted = [*enabled[:-1], any(enabled[:-1])]
    return np.cumsum(trunk) + np.cumsum(np.where(counted, branch, 0.0))


def set_fields(value: Any, **fields: Any) -> None:
    """Set fields of a frozen value that is being made."""
    for name, content in fields.items():
        object.__setattr__(value, name, content)


Z95 = 1.959963984540054  # of the normal distribution: 95 % lie within so many deviations
STEADY = 0.03  # the spread below which times are good enough
