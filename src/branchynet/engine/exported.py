"""An exported file as an engine, in whichever runtime runs its graph: what both have in common."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import FileError, InputError
from ..files import parse_json
from ..stored import from_stored
from ..types import Policy, Prediction
from .checks import Input, check_inputs, check_thresholds

FORMAT = 1
METADATA_KEY = "branchynet"
Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class _Read:
    """What an engine reads of a file's metadata."""

    format: int
    policy: dict[str, Any] | None
    exits: int
    thresholds: Literal["default", "input"]
    batch: Literal["dynamic", 1]
    output_shape: tuple[int, ...]
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.exits < 1 or min(self.output_shape, default=0) < 0:
            raise InputError(f"exits and sizes must be counts; got {self.exits} and {self.output_shape}")


_FIELDS = {field.name for field in fields(_Read)}


class Engine:
    """An exported network, ready to answer. Made by `load`.

    Calls are thread-safe: an engine holds no state between calls, and all runtimes may be called concurrently.

    Attributes:
        runtime: as `load` was told.
        inputs: what the network reads.
        policy: score and default thresholds; None for a flat file (exported with ``policy=None``).
        exits: N.
        labels: class names, or () where none were given.
        metadata: all that the file says of itself.
    """

    def __init__(
        self,
        runtime: str,
        run: Callable[[Feeds], Sequence[Any]],
        inputs: Sequence[Input],
        outputs: int,
        metadata: dict[str, Any],
        *,
        feeds_thresholds: bool,
    ) -> None:
        self.runtime = runtime
        self._run = run
        self._outputs = outputs
        self.metadata = metadata
        self.policy = None if metadata["policy"] is None else Policy.from_json(metadata["policy"])
        self.exits: int = metadata["exits"]
        self.labels: tuple[str, ...] = tuple(metadata["labels"])
        self.inputs = tuple(i for i in inputs if not re.fullmatch(r"threshold_\d+", i.name))
        self._fixed_batch = metadata["batch"] == 1
        thresholds = self.policy.thresholds if self.policy and feeds_thresholds else ()
        self._defaults = _threshold_feeds(thresholds)

    def __call__(self, *inputs: NDArray[Any], thresholds: Sequence[float | None] | None = None) -> Prediction:
        """Answer a batch of any size, zero included, each sample at the first exit that is sure enough.

        Args:
            inputs: arrays as `inputs` says, all with the same leading batch size B.
            thresholds: N-1 figures to use in this call instead of the file's own; None at an exit means never leave
                there.

        Raises:
            InputError: wrong number, shape or dtype of inputs, or wrong number of thresholds.
        """
        if self.policy is None:
            if thresholds is not None:
                raise InputError("this file was exported with policy=None and has no thresholds; export one")
            results = self.outputs(*inputs)
            rows = len(results[0])
            return Prediction(results[0], np.full(rows, self.exits), np.full(rows, np.nan, np.float32), results[-1])
        feeds = self._feeds(inputs)
        feeds.update(self._defaults if thresholds is None else self._override(thresholds))
        if not len(inputs[0]):
            return Prediction(*self._empty())
        return Prediction(*self._run(feeds))

    def answer_all(self, *inputs: NDArray[Any], rows: int = 256) -> Prediction:
        """Answer any number of samples, `rows` a call, or one where the file takes no more. Raises as a call does."""
        step = 1 if self._fixed_batch else rows
        starts = range(0, len(inputs[0]), step) or (0,)
        answers = [self(*(i[start : start + step] for i in inputs)) for start in starts]
        return Prediction(*(np.concatenate(parts) for parts in zip(*answers, strict=True)))

    def outputs(self, *inputs: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """The graph's outputs in the order of the file: for a flat file ``(label, output_1, ..., output_N)``."""
        feeds = self._feeds(inputs)
        feeds.update(self._defaults)
        if not len(inputs[0]):
            return self._empty()
        return tuple(self._run(feeds))

    def _feeds(self, inputs: tuple[NDArray[Any], ...]) -> Feeds:
        rows = check_inputs(inputs, self.inputs)
        if self._fixed_batch and rows > 1:
            raise InputError(f"this file answers one sample at a time, got {rows}; export with batch='dynamic'")
        return {wanted.name: given for given, wanted in zip(inputs, self.inputs, strict=True)}

    def _override(self, thresholds: Sequence[float | None]) -> Feeds:
        assert self.policy is not None
        return _threshold_feeds(check_thresholds(thresholds, self.policy, where="this file", remedy="export again"))

    def _empty(self) -> tuple[NDArray[Any], ...]:
        tail = tuple(self.metadata["output_shape"])
        label = np.empty((0, *tail[1:]), np.int64)
        if self.policy is None:
            return (label, *(np.empty((0, *tail), np.float32) for _ in range(self._outputs - 1)))
        return label, np.empty(0, np.int64), np.empty(0, np.float32), np.empty((0, *tail), np.float32)


def read_metadata(properties: dict[str, str], path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `export` wrote into the file. Raises `FileError` for a foreign file or one of a later format."""
    if METADATA_KEY not in properties:
        raise FileError(f"{path} was not written by BranchyNet (it has no {METADATA_KEY!r} metadata); use export(...)")
    try:
        metadata = dict(parse_json(properties[METADATA_KEY], finite=False))
        newer = metadata.get("format", 0) > FORMAT
    except (ValueError, TypeError) as error:
        raise FileError(f"the metadata of {path} cannot be read ({error}); export it again") from error
    if newer:
        raise FileError(f"{path} has format {metadata['format']}, newer than {FORMAT}; upgrade branchynet")
    if not metadata.keys() >= _FIELDS:
        raise FileError(f"the metadata of {path} lacks {sorted(_FIELDS - metadata.keys())}; export it again")
    read = from_stored(_Read, {name: metadata[name] for name in _FIELDS}, path, "export(...)")
    try:
        policy = None if read.policy is None else Policy.from_json(read.policy)
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"the policy in {path} cannot be read ({error}); export it again") from error
    if policy is not None and policy.exits != read.exits:
        raise FileError(f"the policy in {path} has {policy.exits} exits, the network {read.exits}; export it again")
    return metadata


def _threshold_feeds(thresholds: Sequence[float | None]) -> Feeds:
    with np.errstate(over="ignore"):  # beyond float32 is infinite
        return {
            f"threshold_{n}": np.array([t], np.float64).astype(np.float32)
            for n, t in enumerate(thresholds, 1)
            if t is not None
        }
