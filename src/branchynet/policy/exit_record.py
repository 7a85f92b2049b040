"""The frozen record of what every exit answers: the bridge from the network side to the deciding side.

Shape letters: S samples, N exits, C classes.
"""

import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..arguments import described, instance
from ..errors import FileError, InputError
from ..files import check_checksum, checksum, regular, replacing
from .digests import Digests, digests, is_sketch
from .fitted_scores import FittedScore
from .values import ExitCost, Floats, Ints, score_name, set_fields


@dataclass(frozen=True, eq=False, repr=False)
class ExitRecord:
    """Every exit's answer for every sample of a data set, with what the right answers were.

    Made by `record` from a network. For tasks whose outputs are not class logits, or are too large to keep, it holds
    scores and losses instead.

    Attributes:
        outputs: `(S, N, C)` float32 logits, or None where only scores and losses were kept.
        labels: `(S,)` int64 class indices, or None likewise.
        scores: `(S, N)` float32, smaller = surer; None where they are to be computed from `outputs`.
        losses: `(S, N)` float32 in [0, 1]; for classification 1 where an exit is wrong.
        score: what `scores` are of: a score's name, or the callable; None where that is not known.
        network: the `fingerprint` of the network that answered, so that records of different networks are not mixed;
            None where that is not known.
        inputs: `(S,)` uint64 digests of the samples' inputs, which tell whether two records share samples; None where
            the inputs are not known.
        selected_on: sketches (see `branchynet.policy.digests`) of the samples that the network's exits, or its
            averages, were selected on, or the score of a loaded record was fitted on: `choose` tests no promise on
            these.

    Raises:
        InputError: shapes disagree, no samples, a label outside 0..C-1, or outputs that hold NaN or plus infinity, or
            minus infinity for every class (for some it rules them out).
    """

    outputs: Floats | None
    labels: Ints | None
    scores: Floats | None = None
    losses: Floats = None  # type: ignore[assignment]  # derived from outputs and labels where not given
    score: Any = None
    network: str | None = None
    inputs: Digests | None = None
    selected_on: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.outputs is not None:
            if self.scores is not None or self.losses is not None or self.score is not None:
                raise InputError("give outputs and labels, or scores and losses (ExitRecord.from_scores), not both")
            outputs = _array("outputs", self.outputs, 3, "(S, N, C)")
            _check_finite("outputs", outputs.max(axis=2))  # minus infinity only where every class is ruled out
            labels = np.asarray(self.labels)
            if labels.dtype.kind not in "iu" or labels.shape != outputs.shape[:1]:
                raise InputError(
                    f"labels must be integers of shape ({outputs.shape[0]},), one a sample of outputs; "
                    f"got {labels.dtype} of shape {labels.shape}"
                )
            if labels.min() < 0 or labels.max() >= outputs.shape[2]:
                raise InputError(
                    f"labels lie in {labels.min()}..{labels.max()}, but outputs have {outputs.shape[2]} classes (0.."
                    f"{outputs.shape[2] - 1}): count classes from 0, or give the network more of them"
                )
            losses = (outputs.argmax(axis=2) != labels[:, None]).astype(np.float32)
            set_fields(self, outputs=outputs, labels=labels.astype(np.int64), losses=losses)
        elif self.scores is None or self.losses is None:
            raise InputError("an ExitRecord needs outputs and labels, or scores and losses (ExitRecord.from_scores)")
        if self.scores is not None:
            scores = _array("scores", self.scores, 2, "(S, N)")
            losses = _array("losses", self.losses, 2, "(S, N)")
            _check_finite("losses", losses)
            if scores.shape != losses.shape:
                raise InputError(f"scores {scores.shape} and losses {losses.shape} must have one shape (S, N)")
            if losses.min() < 0 or losses.max() > 1:
                raise InputError(f"losses must lie in [0, 1]; got {losses.min():.4g}..{losses.max():.4g}: rescale them")
            set_fields(self, scores=scores, losses=losses)
        if self.inputs is not None:
            inputs = np.asarray(self.inputs)
            if inputs.dtype != np.uint64 or inputs.shape != (self.samples,):
                raise InputError(
                    f"inputs must be uint64 ({self.samples},), one digest a sample; got {inputs.dtype} {inputs.shape}"
                )
        if not all(is_sketch(known) for known in self.selected_on):
            raise InputError(f"selected_on must be sketches of samples; got {self.selected_on!r}")
        set_fields(self, selected_on=tuple(self.selected_on))

    @classmethod
    def from_scores(
        cls,
        scores: ArrayLike,
        losses: ArrayLike,
        score: Any = None,
        network: str | None = None,
        inputs: Digests | None = None,
        selected_on: tuple[str, ...] = (),
    ) -> "ExitRecord":
        """A record of scores `(S, N)` (smaller = surer) and losses `(S, N)` in [0, 1], for any task.

        `score` says of what: a score's name or the callable, which `choose` then puts into its policy.
        """
        return cls(None, None, np.asarray(scores), np.asarray(losses), score, network, inputs, selected_on)

    @property
    def samples(self) -> int:
        """S, the number of samples."""
        return int(self.losses.shape[0])

    @property
    def num_exits(self) -> int:
        """N, the number of exits."""
        return int(self.losses.shape[1])

    def __repr__(self) -> str:
        classes = "" if self.outputs is None else f", {self.outputs.shape[2]} classes"
        score = "" if self.score is None else f", scores of {score_name(self.score)!r}"
        known = "" if self.network is None else f", network {self.network}"
        return f"ExitRecord({self.samples} samples, {self.num_exits} exits{classes}{score}{known})"

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the arrays, to tell whether two records are the same data."""
        arrays: Any = (self.outputs, self.labels) if self.outputs is not None else (self.scores, self.losses)
        found = hashlib.sha256()
        for array in arrays:
            found.update(f"{array.shape}".encode())
            found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)  # without a copy
        return found.hexdigest()

    @functools.cached_property
    def sample_digests(self) -> Digests | None:
        """`(S,)` of the inputs, or else of the outputs; None for scores and losses alone, which samples may share."""
        if self.inputs is not None:
            return self.inputs
        return None if self.outputs is None else digests(self.outputs)

    def take(self, rows: Any) -> "ExitRecord":
        """The record of some of the samples: indices, a mask or a slice `rows`. Raises `InputError`."""
        try:
            right = np.arange(self.samples)[rows].ndim == 1
        except (IndexError, TypeError, ValueError, OverflowError):
            right = False
        if not right:
            raise InputError(
                f"rows must be indices below {self.samples}, a mask of {self.samples} booleans or a slice; got "
                f"{described(rows)}"
            )
        about = (self.network, None if self.inputs is None else self.inputs[rows], self.selected_on)
        if self.outputs is not None and self.labels is not None:
            return ExitRecord(self.outputs[rows], self.labels[rows], None, None, None, *about)  # type: ignore[arg-type]
        assert self.scores is not None
        return ExitRecord.from_scores(self.scores[rows], self.losses[rows], self.score, *about)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an ``.npz`` file, whole or not at all; of a callable score the name is kept.

        Of a fitted one the samples that it was fitted on are kept too. Raises `FileError`.
        """
        names = ("outputs", "labels") if self.outputs is not None else ("scores", "losses")
        arrays: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.score is not None:
            arrays["score"] = np.array(score_name(self.score))
        if self.network is not None:
            arrays["network"] = np.array(self.network)
        if self.inputs is not None:
            arrays["inputs"] = self.inputs
        fitted = self.score.fitted_on if isinstance(self.score, FittedScore) else ""
        if self.selected_on or fitted:
            arrays["selected_on"] = np.array([*self.selected_on, *filter(None, [fitted])])
        arrays["sha256"] = np.array(checksum(_parts(arrays)))
        with replacing(path) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(stream, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ExitRecord":
        """Read a file that `save` wrote; nothing in it is ever unpickled. Raises `FileError`."""
        try:
            # numpy forgets to close a damaged file that it opened itself
            with regular(path).open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            if "sha256" in arrays:  # records of earlier versions have none
                check_checksum(path, str(arrays.pop("sha256")), _parts(arrays))
            names = sorted(arrays)
            told: dict[str, Any] = {name: str(arrays.pop(name)) for name in ("score", "network") if name in arrays}
            told["inputs"] = arrays.pop("inputs", None)
            told["selected_on"] = tuple(str(known) for known in arrays.pop("selected_on", ()))
            if set(arrays) == {"outputs", "labels"} and "score" not in told:
                return cls(**arrays, **told)
            if set(arrays) == {"scores", "losses"}:
                return cls.from_scores(**arrays, **told)
        except FileError:
            raise
        except Exception as error:  # numpy's and zipfile's readers raise nearly anything on a damaged file
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
            if "containing pickled" in reason:  # what numpy says of any file that is no archive
                reason = "it is no .npz file"
            raise FileError(f"cannot read the record {path} ({reason}); make it again with record(...)") from error
        raise FileError(f"{path} holds {names}, which is no ExitRecord; make it with record(...)")


def check_same_network(what: str, one: str | None, other: str | None, *, structure: bool = False) -> None:
    """Both are of one network, as far as both say; with `structure`, of one architecture. Raises `InputError`."""
    if one is None or other is None:
        return
    if structure:
        one, other = one.split("-")[0], other.split("-")[0]
    if one == other:
        return
    how, remedy = "architectures" if structure else "networks", "take both from the same one"
    if {*one.split("-")[2:]} != {*other.split("-")[2:]}:
        remedy = "int8 is another network than float; record its flat int8 file, and choose and measure on that"
    elif not structure and one.split("-")[0] == other.split("-")[0]:
        remedy = "take both from the same one; after training, record(...) and choose(...) again"
    raise InputError(f"{what} are of different {how} ({one} and {other}): {remedy}")


def bounded(logits: NDArray[Any]) -> NDArray[Any]:
    """Logits `(..., C)` of which none lies more than 100 below the largest of its row, so that all are finite."""
    return np.maximum(logits, logits.max(axis=-1, keepdims=True) - 100.0)


def _parts(arrays: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a record's checksum is of."""
    for name, array in sorted(arrays.items()):
        yield name, f"{array.dtype.str} {array.shape}"
        yield name, np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _array(name: str, value: ArrayLike, ndim: int, shape: str) -> Floats:
    kind = np.asarray(value).dtype
    if kind.kind not in "biuf":
        raise InputError(f"{name} must be real numbers; got {kind}")
    with np.errstate(over="ignore"):  # what is infinite in float32 is refused where it matters
        array = np.asarray(value, dtype=np.float32)
    if array.ndim != ndim or 0 in array.shape:
        raise InputError(f"{name} must have shape {shape} with at least one sample; got {array.shape}")
    return array


def _check_finite(name: str, table: Floats) -> None:
    """Raises `InputError` where one of `(S, N)` figures is NaN or infinite."""
    if not np.isfinite(table).all():
        sample, exit = np.argwhere(~np.isfinite(table))[0]
        raise InputError(
            f"{name} holds {table[sample, exit]} at sample {sample}, exit {exit + 1}; "
            "a network that gives NaN or infinity cannot be judged: lower the learning rate or drop that sample"
        )


def check_cost(record: ExitRecord, cost: ExitCost | None) -> None:
    """Raises `InputError` where record and cost are of different architectures, or not for one number of exits."""
    instance("record", record, ExitRecord, "give what record(...) returns, and the cost after it")
    if cost is None:
        return
    instance("cost", cost, ExitCost, "give what measure(...) returns")
    if cost.num_exits != record.num_exits:
        raise InputError(
            f"the cost has {cost.num_exits} exits, but the record has {record.num_exits}: "
            "measure the network that was recorded"
        )
    check_same_network("the record and the cost", record.network, cost.network, structure=True)
