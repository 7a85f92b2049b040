"""Engine: run an exported file, in any runtime."""

import os
import re
from collections.abc import Callable, Sequence, Set
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..argument_checks import whole
from ..errors import FileError, InputError
from ..files import parse_json
from ..graph.lengths import Length
from ..policy.prediction import Prediction, concatenated
from ..policy.values import Policy
from ..stored_values import from_fields, from_stored
from .call_thresholds import Thresholds, check_thresholds, none_given, per_sample_apart
from .input_checks import Input, check_sizes, checked_inputs
from .memory import is_memory_error, memory_error
from .on_device import DeviceGraph

FORMAT = 1
METADATA_KEY = "branchynet"
_THRESHOLD = re.compile(r"threshold_\d+")
_CALL_ROWS, _CALL_BYTES = 256, 1 << 28  # per call in answer_all

_NUMBERS = {float, int, type(None), np.float64, np.float32}

Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class _Metadata:
    """The entries that an engine reads."""

    format: int
    policy: dict[str, Any] | None
    exits: int
    thresholds: Literal["default", "input"]
    batch: Literal["dynamic", 1]
    output_shape: tuple[int, ...]
    labels: tuple[str, ...]
    inputs: tuple[str, ...] = ()  # older files do not hold this
    sample_bytes: int = 1
    network: str | None = None
    selected_on: tuple[str, ...] = ()
    promise: str | None = None
    precision: dict[str, Any] | None = None
    per_sample: bool = False
    lengths: tuple[Length, ...] = ()
    weights: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        sizes = (*self.output_shape, self.sample_bytes)
        if self.exits < 1 or min(sizes) < 0:
            raise InputError(f"exits and sizes must be counts; got {self.exits} and {sizes}")
        if self.precision is not None and not isinstance(self.precision.get("scheme"), str):
            raise InputError(f"precision must name a scheme; got {self.precision}")


_FIELDS = {field.name for field in fields(_Metadata)}
_REQUIRED = {field.name for field in fields(_Metadata) if field.default is MISSING}


@dataclass(frozen=True)
class Graph:
    """The graph of an exported file, opened in a runtime.

    Attributes:
        run: maps arrays by input name to the graph's outputs, in the order of the file.
        inputs: the network's inputs, then the thresholds that a call may give.
        required: names of the inputs that a call must give.
        outputs: number of outputs.
        metadata: see `read_metadata`.
        float32: whether products are computed in float32, rather than in TF32 or half precision.
        device: binds inputs and outputs to a device; None if the graph runs on the host.
    """

    run: Callable[[Feeds], Sequence[Any]]
    inputs: tuple[Input, ...]
    required: frozenset[str]
    outputs: int
    metadata: dict[str, Any]
    float32: bool = True
    device: DeviceGraph | None = None


class Engine:
    """An exported network with early exits. Made by `load`.

    Calls are thread-safe. An engine pickles and deep-copies as the arguments of `load`: the copy reads the file again
    from its absolute path, and raises `FileError` if the file has changed.

    Attributes:
        runtime: as given to `load`.
        inputs: the inputs of the network, in the order of its arguments.
        policy: score and default thresholds; None for a flat file (exported with ``policy=None``).
        num_exits: N.
        labels: class names, or () if the file has none.
        lengths: the free lengths besides the batch size, and their sizes.
        metadata: all metadata that `export` wrote.
        float32: whether the runtime is known to multiply in float32, rather than in TF32 or half precision.
        fixed: whether another tool turned the thresholds into constants, so that a call cannot give others.

    Example:
        >>> import torch
        >>> from branchynet import BranchyNet, export, load
        >>> from torch import nn
        >>> net = BranchyNet(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), {"1": nn.Linear(8, 3)})
        >>> engine = load(export(net, "flat.onnx", policy=None, example=torch.randn(2, 4)))
        >>> print(engine.num_exits, engine.inputs[0])
        2 input: float32 (B, 4)
        >>> engine(torch.randn(5, 4)).label.shape
        (5,)
    """

    def __init__(self, runtime: str, graph: Graph, reopen: tuple[Callable[..., "Engine"], tuple[Any, ...]]) -> None:
        self.runtime = runtime
        self.metadata = graph.metadata
        self.policy = None if self.metadata["policy"] is None else Policy.from_json(self.metadata["policy"])
        self.num_exits: int = self.metadata["exits"]
        self.labels: tuple[str, ...] = tuple(self.metadata["labels"])
        self.lengths: tuple[Length, ...] = tuple(from_fields(Length, one) for one in self.metadata.get("lengths", ()))
        found = {i.name: i for i in graph.inputs if not _THRESHOLD.fullmatch(i.name)}
        names = self.metadata.get("inputs", ())  # other tools may reorder or rename inputs
        self.inputs = tuple(found[name] for name in (names if sorted(names) == sorted(found) else found))
        half = (self.metadata.get("precision") or {}).get("scheme") in ("fp16", "bf16")
        self.float32 = graph.float32 and not half and not any(i.dtype == np.float16 for i in self.inputs)
        self._run = graph.run
        self._outputs = graph.outputs
        self._reopen = reopen
        self._single = self.metadata["batch"] == 1
        self._per_sample: bool = self.metadata.get("per_sample", False)
        self._settable = {i.name for i in graph.inputs} - {i.name for i in self.inputs}
        self._override = lru_cache(64)(partial(_override, self.policy, self._settable))  # callers repeat themselves
        own = _threshold_feeds(self.policy.thresholds if self.policy else ())
        self.fixed = bool(own.keys() - self._settable)
        self._defaults = {name: array for name, array in own.items() if name in graph.required}

    def __repr__(self) -> str:
        policy = "flat" if self.policy is None else str(self.policy)
        inputs = ", ".join(map(str, self.inputs))
        return f"{type(self).__name__}({self.runtime}, reads {inputs}, {self.num_exits} exits, {policy})"

    def __reduce__(self) -> tuple[Callable[..., "Engine"], tuple[Any, ...]]:
        return self._reopen

    def __getattr__(self, name: str) -> Any:  # runs only for names that are not there
        staged = "; only the engine of a folder of stages has it: export with layout='stages'"
        hint = staged if name in ("stages", "stage", "stream") else ""
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")

    def __call__(self, /, *inputs: Any, thresholds: Thresholds | None = None, **named: Any) -> Prediction:
        """Predict a batch of any size, including zero. Each sample leaves at the first exit with a low enough score.

        A call holds the activations of all samples at once, and the runtime may keep that memory. For many samples, use
        `answer_all`.

        Args:
            inputs: numpy arrays or torch tensors that match the attribute `inputs`, all with the same batch size B; or
                one mapping from input names to them.
            thresholds: N-1 thresholds for this call instead of the file's; None means that no sample leaves there. If
                the file takes thresholds per sample, each may be an array `(B,)`, or give a list of B policies. Such
                files are those exported with ``thresholds="input"`` and a free batch, or with ``layout="stages"``.
            named: the inputs that are not given by position, by name.

        Raises:
            InputError: inputs of the wrong number, names, shape or dtype; or thresholds of the wrong number, or for a
                file that fixes them; or not enough memory for the batch (the message names one that fits).
        """
        return self._answer(*self._feeds(inputs, named, thresholds))

    def answer_all(
        self,
        /,
        *inputs: Any,
        rows: int | None = None,
        thresholds: Thresholds | None = None,
        **named: Any,
    ) -> Prediction:
        """Predict any number of samples, in calls of limited size.

        Args:
            inputs: as in a call.
            rows: samples per call; by default 256, or fewer if their activations would exceed 256 MiB. A file with a
                fixed batch always takes one.
            thresholds: as in a call.
            named: as in a call.

        Raises:
            InputError: as in a call, or `rows` is not an integer of at least 1.
        """
        if rows is not None:
            rows = whole("rows", rows, 1)
        feeds, samples = self._feeds(inputs, named, thresholds)
        fitting = int(np.clip(_CALL_BYTES // max(1, self.metadata.get("sample_bytes", 1)), 1, _CALL_ROWS))
        step = 1 if self._single else rows or fitting
        parts = [slice(start, min(start + step, samples)) for start in range(0, samples, step) or (0,)]
        return concatenated([self._answer(_part(feeds, part), part.stop - part.start) for part in parts])

    def outputs(self, /, *inputs: Any, **named: Any) -> tuple[NDArray[Any], ...]:
        """Return the graph's outputs in the order of the file: for a flat file ``(label, output_1, ..., output_N)``.

        Inputs and errors are those of a call.
        """
        return tuple(self._results(*self._feeds(inputs, named, None)))

    def _feeds(self, inputs: Sequence[Any], named: dict[str, Any], thresholds: Any) -> tuple[Feeds, int]:
        """Return what the graph reads, from the arguments of a call, and the number of samples."""
        feeds, rows = checked_inputs(inputs, named, self.inputs)
        if self.lengths:
            check_sizes(feeds, self.lengths)
        if not none_given(thresholds, rows):
            feeds |= self._given(thresholds, rows)
        return (self._defaults | feeds if self._defaults else feeds), rows

    def _given(self, thresholds: Any, rows: int) -> Feeds:
        if isinstance(thresholds, (list, tuple)) and {*map(type, thresholds)} <= _NUMBERS:
            return self._override(tuple(thresholds))
        numbers, each = per_sample_apart(thresholds, self.policy, rows) if self.policy else ([], {})
        known = len(each) == len(numbers) or {*map(type, numbers)} <= _NUMBERS  # else they may have no hash
        feeds = dict((self._override if known else self._override.__wrapped__)(tuple(numbers)))
        for n, values in each.items():
            if len(values) > 1 and not self._per_sample:
                raise InputError(
                    "this file takes one threshold per exit, not one per sample; export it with thresholds='input' and "
                    "free='batch', or with layout='stages'"
                )
            feeds[f"threshold_{n}"] = values
        return feeds

    def _answer(self, feeds: Feeds, rows: int) -> Prediction:
        results = self._results(feeds, rows)
        if self.policy is None:
            exit, score = np.full(rows, self.num_exits), np.full(rows, np.nan, np.float32)
            return Prediction(results[0], exit, score, results[-1])
        return Prediction(*results)

    def _results(self, feeds: Feeds, rows: int) -> Sequence[Any]:
        """Return the outputs of the graph for the feeds of a call."""
        if rows > 1 and self._single:
            raise InputError(f"this file takes one sample per call; got {rows}: export with free='batch'")
        try:
            return self._run(feeds) if rows else self._empty()
        except Exception as error:
            if not is_memory_error(error):
                raise
            failed = error
        raise memory_error(lambda size: self._run(_part(feeds, slice(0, size))), rows, failed) from failed

    def _empty(self) -> tuple[NDArray[Any], ...]:
        tail = tuple(self.metadata["output_shape"])
        label = np.empty((0, *tail[1:]), np.int64)
        if self.policy is None:
            return (label, *(np.empty((0, *tail), np.float32) for _ in range(self._outputs - 1)))
        return label, np.empty(0, np.int64), np.empty(0, np.float32), np.empty((0, *tail), np.float32)


def _part(feeds: Feeds, rows: slice) -> Feeds:
    """Return what the graph reads for some rows of a batch; thresholds may be for all samples."""
    return {name: array if len(array) == 1 else array[rows] for name, array in feeds.items()}


def read_metadata(properties: dict[str, str], path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the metadata that `export` wrote. Raise `FileError` for a foreign file or a newer format."""
    if METADATA_KEY not in properties:
        raise FileError(f"{path} was not written by BranchyNet (it has no {METADATA_KEY!r} metadata); use export(...)")
    try:
        metadata = dict(parse_json(properties[METADATA_KEY], finite=False))
        newer = metadata.get("format", 0) > FORMAT
        if "quantize" in metadata:  # its name in earlier files
            metadata["precision"] = metadata.pop("quantize")
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


def _override(policy: Policy | None, settable: Set[str], thresholds: Any) -> Feeds:
    """Return the feeds of a call's thresholds. Raise `InputError` if the file does not take them."""
    if policy is None:
        raise InputError("this file was exported with policy=None and has no thresholds; export one")
    feeds = _threshold_feeds(check_thresholds(thresholds, policy, where="this file", remedy="export again"))
    if fixed := sorted(feeds.keys() - settable):
        raise InputError(
            f"{fixed[0]} is a constant in this file, so a call cannot give thresholds: leave them out, or export again "
            "with thresholds='default' and do not use a tool that turns inputs with default values into constants"
        )
    return feeds


def _threshold_feeds(thresholds: Sequence[float | None]) -> Feeds:
    with np.errstate(over="ignore"):  # values beyond float32 become infinite
        return {
            f"threshold_{n}": np.array([t], np.float64).astype(np.float32)
            for n, t in enumerate(thresholds, 1)
            if t is not None
        }
