"""The outputs of every exit on a data set, from which thresholds are chosen without the network.

Shape letters: S samples, N exits, C classes.
"""

import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..argument_checks import described, instance
from ..array_files import most_unpacked, read_arrays, write_arrays
from ..errors import FileError, InputError
from ..files import check_checksum, checksum, regular, replacing
from .exit_cost import ExitCost
from .fitted_scores import samples_fitted_on
from .sample_digests import Digests, digests, is_sketch, sketch
from .score_names import stored_name
from .values import Floats, Ints, score_name, set_fields


@dataclass(frozen=True, eq=False, repr=False)
class ExitRecord:
    """The outputs of every exit for every sample of a data set, and the labels.

    `record` creates it from a network. For tasks without class logits, or with outputs too large to keep, it holds
    scores and losses instead.

    Attributes:
        outputs: `(S, N, C)` float32 logits; None if only scores and losses are kept.
        labels: `(S,)` int64 class indices; None without outputs.
        scores: `(S, N)` float32, smaller = surer; None if they are computed from `outputs`.
        losses: `(S, N)` float32 in [0, 1]; for classification, 1 if an exit is wrong.
        score: the name of the score in `scores`, or the callable; None if unknown.
        network: the `fingerprint` of the network, which prevents mixing records of different networks; None if unknown.
        inputs: `(S,)` uint64 digests of the inputs, which show whether two records share samples; None if unknown.
        selected_on: sketches (see `branchynet.policy.sample_digests`) of the samples that were used to select the exits
            or averaging weights of the network, or to fit the score of a loaded record. `choose` does not test a
            promise on these samples.

    Raises:
        InputError: shapes that disagree, no samples, a label outside 0..C-1, or outputs with NaN, plus infinity, or
            minus infinity for every class (minus infinity rules a class out).

    Example:
        >>> import numpy as np
        >>> logits = np.array([[[3, 0], [0, 1]], [[0, 1], [0, 2]]])  # 2 samples, 2 exits, 2 classes
        >>> record = ExitRecord(logits, labels=np.array([0, 1]))
        >>> record
        ExitRecord(2 samples, 2 exits, 2 classes)
        >>> record.losses  # exit 2 is wrong on the first sample
        array([[0., 1.],
               [0., 0.]], dtype=float32)
    """

    outputs: Floats | None
    labels: Ints | None
    scores: Floats | None = None
    losses: Floats = None  # type: ignore[assignment]  # derived from outputs and labels if not given
    score: Any = None
    network: str | None = None
    inputs: Digests | None = None
    selected_on: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.outputs is not None:
            if self.scores is not None or self.losses is not None or self.score is not None:
                raise InputError("give outputs and labels, or scores and losses (ExitRecord.from_scores), not both")
            outputs = _array("outputs", self.outputs, 3, "(S, N, C)")
            _check_finite("outputs", outputs.max(axis=2))  # minus infinity only if every class is ruled out
            labels = np.asarray(self.labels)
            if labels.dtype.kind not in "iu" or labels.shape != outputs.shape[:1]:
                raise InputError(
                    f"labels must be integers of shape ({outputs.shape[0]},), one per sample of outputs; "
                    f"got {labels.dtype} of shape {labels.shape}"
                )
            if labels.min() < 0 or labels.max() >= outputs.shape[2]:
                raise InputError(
                    f"labels lie in {labels.min()}..{labels.max()}, but outputs have {outputs.shape[2]} classes (0.."
                    f"{outputs.shape[2] - 1}): count classes from 0, or give the network more outputs"
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
                raise InputError(f"scores {scores.shape} and losses {losses.shape} must have the same shape (S, N)")
            if losses.min() < 0 or losses.max() > 1:
                raise InputError(f"losses must lie in [0, 1]; got {losses.min():.4g}..{losses.max():.4g}: rescale them")
            set_fields(self, scores=scores, losses=losses)
        if self.inputs is not None:
            inputs = np.asarray(self.inputs)
            if inputs.dtype != np.uint64 or inputs.shape != (self.samples,):
                raise InputError(
                    f"inputs must be uint64 ({self.samples},), one digest per sample; got {inputs.dtype} {inputs.shape}"
                )
        if not all(is_sketch(known) for known in self.selected_on):
            raise InputError(f"selected_on must be sketches of samples; got {self.selected_on!r}")
        score = stored_name(self.score) if isinstance(self.score, str) else self.score
        set_fields(self, selected_on=tuple(self.selected_on), score=score)

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
        """Create a record of scores `(S, N)` (smaller = surer) and losses `(S, N)` in [0, 1], for any task.

        `score` is the name of the score or the callable; `choose` puts it into the policy.
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
        """SHA-256 of the arrays, which shows whether two records hold the same data."""
        arrays: Any = (self.outputs, self.labels) if self.outputs is not None else (self.scores, self.losses)
        found = hashlib.sha256()
        for array in arrays:
            found.update(f"{array.shape}".encode())
            found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)  # without a copy
        return found.hexdigest()

    @functools.cached_property
    def sample_digests(self) -> Digests | None:
        """`(S,)` digests of the inputs, or else of the outputs; None for scores and losses, which samples may share."""
        if self.inputs is not None:
            return self.inputs
        return None if self.outputs is None else digests(self.outputs)

    @property
    def sketch(self) -> str:
        """The sketch of the samples (see `branchynet.policy.sample_digests`); empty if `sample_digests` is None."""
        return "" if self.sample_digests is None else sketch(self.sample_digests)

    def take(self, rows: Any) -> "ExitRecord":
        """Return the record of some samples, which `rows` gives as indices, a mask or a slice. Raises `InputError`."""
        try:
            right = np.arange(self.samples)[rows].ndim == 1
        except (IndexError, TypeError, ValueError, OverflowError):
            right = False
        if not right:
            raise InputError(
                f"rows must be indices below {self.samples}, a mask of {self.samples} booleans or a slice; got "
                f"{described(rows)}"
            )
        arrays = {name: getattr(self, name) for name in ("outputs", "labels", "scores", "inputs")}
        taken = {name: None if array is None else array[rows] for name, array in arrays.items()}
        return replace(self, **taken, losses=None if self.scores is None else self.losses[rows])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an ``.npz`` file atomically. Raises `FileError`.

        The file keeps only the name of a callable score, and for a fitted score the sketch of its samples.
        """
        names = ("outputs", "labels") if self.outputs is not None else ("scores", "losses")
        arrays: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.score is not None:
            arrays["score"] = np.array(score_name(self.score))
        if self.network is not None:
            arrays["network"] = np.array(self.network)
        if self.inputs is not None:
            arrays["inputs"] = self.inputs
        if known := [*self.selected_on, *filter(None, [samples_fitted_on(self.score)])]:
            arrays["selected_on"] = np.array(known)
        arrays["sha256"] = np.array(checksum(_parts(arrays)))
        with replacing(path) as temporary, temporary.open("wb") as stream:
            write_arrays(stream, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ExitRecord":
        """Read a file that `save` wrote, without pickle.

        Raises:
            FileError: it is damaged, holds no record, or would unpack to more than 256 MiB and 100 times its size.
        """
        try:
            with regular(path).open("rb") as stream:
                arrays = read_arrays(stream, most_unpacked(os.fstat(stream.fileno()).st_size))
            if "sha256" in arrays:  # records of earlier versions have none
                check_checksum(path, str(arrays.pop("sha256")), _parts(arrays))
            names = sorted(arrays)
            about: dict[str, Any] = {name: str(arrays.pop(name)) for name in ("score", "network") if name in arrays}
            about["inputs"] = arrays.pop("inputs", None)
            about["selected_on"] = tuple(str(known) for known in arrays.pop("selected_on", ()))
            if set(arrays) == {"outputs", "labels"} and "score" not in about:
                return cls(**arrays, **about)
            if set(arrays) == {"scores", "losses"}:
                return cls.from_scores(**arrays, **about)
        except FileError:
            raise
        except Exception as error:  # numpy and zipfile raise many kinds of errors for a damaged file
            reason = f"{type(error).__name__}: {error}".removesuffix(": ").removeprefix("ValueError: ")
            raise FileError(f"cannot read the record {path} ({reason}); make it again with record(...)") from error
        raise FileError(f"{path} holds {names}, which is no ExitRecord; make it with record(...)")


def check_same_network(what: str, one: str | None, other: str | None, *, structure: bool = False) -> None:
    """Raise `InputError` if both fingerprints are known and differ; with `structure`, compare the architecture only."""
    if one is None or other is None:
        return
    if structure:
        one, other = one.split("-")[0], other.split("-")[0]
    if one == other:
        return
    how, remedy = "architectures" if structure else "networks", "take both from one network"
    if {*one.split("-")[2:]} != {*other.split("-")[2:]}:
        remedy = "int8 and float are different networks; record the flat int8 file, and choose and measure on it"
    elif not structure and one.split("-")[0] == other.split("-")[0]:
        remedy = "take both from one network; after training, call record(...) and choose(...) again"
    raise InputError(f"{what} are of different {how} ({one} and {other}): {remedy}")


def bounded(logits: NDArray[Any]) -> NDArray[Any]:
    """Clip logits `(..., C)` to at most 100 below the largest of their row, so that all are finite."""
    return np.maximum(logits, logits.max(axis=-1, keepdims=True) - 100.0)


def outputs_and_labels(record: Any, what: str) -> tuple[Floats, Ints]:
    """Return outputs and labels, for the step `what`. Raises `InputError` if `record` has none."""
    instance("record", record, ExitRecord, "give what record(...) returns")
    if record.outputs is None or record.labels is None:
        raise InputError(f"this record holds scores and losses; {what} reads outputs: record without loss=")
    return record.outputs, record.labels


def _parts(arrays: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a record's checksum."""
    for name, array in sorted(arrays.items()):
        yield name, f"{array.dtype.str} {array.shape}"
        yield name, np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _array(name: str, value: ArrayLike, ndim: int, shape: str) -> Floats:
    kind = np.asarray(value).dtype
    if kind.kind not in "biuf":
        raise InputError(f"{name} must be real numbers; got {kind}")
    with np.errstate(over="ignore"):  # later checks refuse infinity where it matters
        array = np.asarray(value, dtype=np.float32)
    if array.ndim != ndim or 0 in array.shape:
        raise InputError(f"{name} must have shape {shape} with at least one sample; got {array.shape}")
    return array


def _check_finite(name: str, table: Floats) -> None:
    """Raise `InputError` if a number of `(S, N)` is NaN or infinite."""
    if not np.isfinite(table).all():
        sample, exit = np.argwhere(~np.isfinite(table))[0]
        raise InputError(
            f"{name} holds {table[sample, exit]} at sample {sample}, exit {exit + 1}; "
            "a network that gives NaN or infinity cannot be evaluated: lower the learning rate or drop that sample"
        )


def check_cost(record: ExitRecord, cost: ExitCost | None) -> None:
    """Raise `InputError` if record and cost are of different architectures or have different numbers of exits."""
    instance("record", record, ExitRecord, "give what record(...) returns, and the cost after it")
    if cost is None:
        return
    instance("cost", cost, ExitCost, "give what measure(...) returns")
    if cost.num_exits != record.num_exits:
        raise InputError(
            f"the cost has {cost.num_exits} exits, but the record has {record.num_exits}: measure the recorded network"
        )
    check_same_network("the record and the cost", record.network, cost.network, structure=True)
