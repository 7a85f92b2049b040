"""An exported file as an engine, in whichever runtime runs its graph: what both have in common."""

import math
import os
import re
from collections.abc import Callable, Sequence, Set
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..arguments import whole
from ..errors import FileError, InputError
from ..files import parse_json
from ..policy.prediction import Prediction
from ..policy.values import Policy
from ..stored import from_stored
from .inputs import Input, check_thresholds, checked_inputs

FORMAT = 1
METADATA_KEY = "branchynet"
_THRESHOLD = re.compile(r"threshold_\d+")
_CALL_ROWS, _CALL_BYTES = 256, 1 << 28  # of one call of answer_all

Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class _Metadata:
    """What an engine reads of a file's metadata."""

    format: int
    policy: dict[str, Any] | None
    exits: int
    thresholds: Literal["default", "input"]
    batch: Literal["dynamic", 1]
    output_shape: tuple[int, ...]
    labels: tuple[str, ...]
    inputs: tuple[str, ...] = ()  # older files do not say
    sample_bytes: int = 1
    network: str | None = None
    selected_on: tuple[str, ...] = ()
    promise: str | None = None
    quantize: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        sizes = (*self.output_shape, self.sample_bytes)
        if self.exits < 1 or min(sizes) < 0:
            raise InputError(f"exits and sizes must be counts; got {self.exits} and {sizes}")
        if self.quantize is not None and not isinstance(self.quantize.get("scheme"), str):
            raise InputError(f"quantize must name a scheme; got {self.quantize}")


_FIELDS = {field.name for field in fields(_Metadata)}
_REQUIRED = {field.name for field in fields(_Metadata) if field.default is MISSING}


@dataclass(frozen=True)
class Graph:
    """The graph of an exported file, opened in a runtime.

    Attributes:
        run: from arrays by input name to the graph's outputs, in the order of the file.
        inputs: what the network reads and, after that, the thresholds that a call may give.
        required: names of those that a call must give.
        outputs: how many.
        metadata: what `export` wrote into the file, see `read_metadata`.
        float32: whether sums of float32 are of float32 products; other processors may take TF32 or half precision.
    """

    run: Callable[[Feeds], Sequence[Any]]
    inputs: tuple[Input, ...]
    required: frozenset[str]
    outputs: int
    metadata: dict[str, Any]
    float32: bool = True


class Engine:
    """An exported network, ready to answer. Made by `load`.

    Calls are thread-safe: an engine holds no state between calls, and all runtimes may be called concurrently. An
    engine pickles and deep-copies as the arguments of `load`: the copy reads the file again from its absolute path, and
    refuses another file there.

    Attributes:
        runtime: as `load` was told.
        inputs: what the network reads, in the order of its arguments, whatever order another tool gave them.
        policy: score and default thresholds; None for a flat file (exported with ``policy=None``).
        exits: N.
        labels: class names, or () where none were given.
        metadata: all that the file says of itself.
        float32: whether the runtime multiplies in float32, and not in TF32 or half precision, as far as is known.
        fixed: whether its thresholds are constants, as some tools make them, so that a call cannot give others.
    """

    def __init__(self, runtime: str, graph: Graph, reopen: tuple[Callable[..., "Engine"], tuple[Any, ...]]) -> None:
        self.runtime = runtime
        self.metadata = graph.metadata
        self.policy = None if self.metadata["policy"] is None else Policy.from_json(self.metadata["policy"])
        self.num_exits: int = self.metadata["exits"]
        self.labels: tuple[str, ...] = tuple(self.metadata["labels"])
        self.inputs = _in_exported_order(graph, self.metadata.get("inputs", ()))
        self.float32 = graph.float32 and not any(i.dtype == np.float16 for i in self.inputs)
        self._run = graph.run
        self._outputs = graph.outputs
        self._reopen = reopen
        self._single = self.metadata["batch"] == 1
        self._settable = {i.name for i in graph.inputs} - {i.name for i in self.inputs}
        self._override = lru_cache(64)(partial(_override, self.policy, self._settable))  # callers repeat themselves
        own = _threshold_feeds(self.policy.thresholds if self.policy else ())
        self.fixed = bool(own.keys() - self._settable)
        self._defaults = {name: array for name, array in own.items() if name in graph.required}

    def __repr__(self) -> str:
        how = "flat" if self.policy is None else str(self.policy)
        reads = ", ".join(map(str, self.inputs))
        return f"Engine({self.runtime}, reads {reads}, {self.num_exits} exits, {how})"

    def __reduce__(self) -> tuple[Callable[..., "Engine"], tuple[Any, ...]]:
        return self._reopen

    def __call__(self, /, *inputs: Any, thresholds: Sequence[float | None] | None = None, **named: Any) -> Prediction:
        """Answer a batch of any size, zero included, each sample at the first exit that is sure enough.

        A call holds the activations of all its samples at once, and the runtime may keep that memory for later calls;
        for many samples use `answer_all`.

        Args:
            inputs: numpy arrays or torch tensors as `inputs` says, all with the same leading batch size B; or one
                mapping from input names to them.
            thresholds: N-1 figures to use in this call instead of the file's own; None at an exit means never leave
                there.
            named: inputs by name, for those that are not given by position.

        Raises:
            InputError: wrong number, names, shape or dtype of inputs, or wrong number of thresholds, or thresholds for
                a file that fixes them.
        """
        feeds, rows = checked_inputs(inputs, named, self.inputs)
        if thresholds is not None:
            feeds |= self._given(thresholds)
        results = self._results(feeds, rows)
        if self.policy is None:
            exit, score = np.full(rows, self.num_exits), np.full(rows, np.nan, np.float32)
            return Prediction(results[0], exit, score, results[-1])
        return Prediction(*results)

    def answer_all(
        self,
        /,
        *inputs: Any,
        rows: int | None = None,
        thresholds: Sequence[float | None] | None = None,
        **named: Any,
    ) -> Prediction:
        """Answer any number of samples, some rows a call.

        Args:
            inputs: as in a call.
            rows: samples a call; by default 256, or fewer where their activations would exceed 256 MiB. A file of one
                sample a call always takes one.
            thresholds: as in a call.
            named: as in a call.

        Raises:
            InputError: as a call does, or `rows` is no integer of at least 1.
        """
        if rows is not None:
            rows = whole("rows", rows, 1)
        arrays, samples = checked_inputs(inputs, named, self.inputs)
        step = 1 if self._single else rows or self._rows_a_call()
        starts = range(0, samples, step) or (0,)
        answers = [self(*(a[start : start + step] for a in arrays.values()), thresholds=thresholds) for start in starts]
        return Prediction(*(np.concatenate(parts) for parts in zip(*answers, strict=True)))

    def outputs(self, /, *inputs: Any, **named: Any) -> tuple[NDArray[Any], ...]:
        """The graph's outputs in the order of the file: for a flat file ``(label, output_1, ..., output_N)``.

        Takes inputs, and raises, as a call does.
        """
        return tuple(self._results(*checked_inputs(inputs, named, self.inputs)))

    def _results(self, feeds: Feeds, rows: int) -> Sequence[NDArray[Any]]:
        if rows != 1 and (rows == 0 or self._single):
            if rows:
                raise InputError(f"this file answers one sample at a time, got {rows}; export with batch='dynamic'")
            return self._empty()
        return self._run(self._defaults | feeds if self._defaults else feeds)

    def _given(self, thresholds: Sequence[float | None]) -> Feeds:
        try:
            return self._override(tuple(thresholds))
        except TypeError:  # no sequence, or of what cannot be looked up
            return _override(self.policy, self._settable, thresholds)

    def _rows_a_call(self) -> int:
        return int(np.clip(_CALL_BYTES // max(1, self.metadata.get("sample_bytes", 1)), 1, _CALL_ROWS))

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
    if not metadata.keys() >= _REQUIRED:
        raise FileError(f"the metadata of {path} lacks {sorted(_REQUIRED - metadata.keys())}; export it again")
    read = from_stored(_Metadata, {name: metadata[name] for name in _FIELDS & metadata.keys()}, path, "export(...)")
    try:
        policy = None if read.policy is None else Policy.from_json(read.policy)
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"the policy in {path} cannot be read ({error}); export it again") from error
    if policy is not None and policy.num_exits != read.exits:
        raise FileError(f"the policy in {path} has {policy.num_exits} exits, the network {read.exits}; export it again")
    return metadata


def _in_exported_order(graph: Graph, names: Sequence[str]) -> tuple[Input, ...]:
    """What the network reads, in the order of `names`; in that of the graph where it has other inputs."""
    found = {i.name: i for i in graph.inputs if not _THRESHOLD.fullmatch(i.name)}
    return tuple(found[name] for name in (names if sorted(names) == sorted(found) else found))


def _override(policy: Policy | None, settable: Set[str], thresholds: Sequence[float | None]) -> Feeds:
    """What a call's own thresholds feed. Raises `InputError` where the file does not take them."""
    if policy is None:
        raise InputError("this file was exported with policy=None and has no thresholds; export one")
    feeds = _threshold_feeds(check_thresholds(thresholds, policy, where="this file", remedy="export again"))
    if fixed := sorted(feeds.keys() - settable):
        raise InputError(
            f"{fixed[0]} is a constant in this file, so a call cannot give thresholds: leave them out, or export again "
            "with thresholds='default', and keep tools that turn inputs with default values into constants away from "
            "the file"
        )
    return feeds


def _threshold_feeds(thresholds: Sequence[float | None]) -> Feeds:
    with np.errstate(over="ignore"):  # beyond float32 is infinite
        values = np.array([math.nan if t is None else t for t in thresholds], np.float64).astype(np.float32)
    return {f"threshold_{n}": values[n - 1 : n] for n, t in enumerate(thresholds, 1) if t is not None}
