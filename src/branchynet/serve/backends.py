"""What runs behind a queue: the stages of a folder, or one whole file, ours or another tool's, as a single stage.

Shape letters: R samples of a batch, N exits.
"""

import os
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ..argument_checks import has_sizes
from ..deploy.call_thresholds import call_thresholds
from ..deploy.engine import METADATA_KEY, Engine
from ..deploy.input_checks import Input, check_sizes, checked_inputs
from ..deploy.loading import DTYPES, Runtime, load
from ..deploy.staged_engine import StagedEngine
from ..errors import FileError, InputError, first_line
from ..policy.exit_rule import stays
from ..policy.values import Floats

Block = dict[str, NDArray[Any]]
"""Arrays by name, one row per sample; thresholds `(R, N-1)` among them under `THRESHOLDS`."""

Shape = tuple[int | None, ...]
THRESHOLDS = ""


@dataclass(frozen=True)
class Output:
    """One output: name, numpy dtype, and shape without the batch (None for a free length)."""

    name: str
    dtype: np.dtype[Any]
    shape: Shape


@dataclass(frozen=True)
class Call:
    """The checked inputs of a request.

    Attributes:
        rows: number of samples that the scheduler counts.
        held: what the first stage reads.
        kind: calls of different kinds never share a batch.
        default: whether the request gives no thresholds.
    """

    rows: int
    held: Block
    kind: Hashable
    default: bool = True


Stepped = tuple[dict[str, NDArray[Any]], NDArray[np.bool_], Block]
"""The outputs of R samples by name, which of them leave, and what the next stage reads for those that stay."""


class Backend(Protocol):
    """A network in stages.

    Attributes:
        inputs: the inputs of a request.
        outputs: the outputs of an answer.
        shapes: the shapes of inputs and outputs by name, with the batch, which is None unless it is fixed.
        exits: the number of the exit of each stage.
        platform: the platform in the metadata of the protocol.
        engine: None for a file of another tool.
        whole: whether each request is a batch of its own, which is never split or shared.
    """

    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    shapes: dict[str, Shape]
    exits: tuple[int, ...]
    platform: str
    engine: Engine | None
    whole: bool

    def call(self, inputs: Mapping[str, NDArray[Any]], thresholds: Any) -> Call:
        """Check the inputs of a request. Raises `InputError`."""
        ...

    def run(self, stage: int, held: Block, kind: Hashable) -> Stepped:
        """Run a stage, counted from 0, on samples of one kind."""
        ...


def open_backend(path: str | os.PathLike[str], threads: int | None, runtime: Runtime = "onnxruntime") -> Backend:
    """Open a file or folder. Raises `FileError`."""
    try:
        engine = load(path, threads, runtime=runtime)
    except FileError:
        other = _of_another_tool(path, threads) if runtime == "onnxruntime" else None
        if other is None:
            raise
        return other
    return StagedBackend(engine) if isinstance(engine, StagedEngine) else FileBackend(engine)


def warmed(backend: Backend) -> list[float]:
    """Run every stage on a sample of zeros, and return the seconds that each takes; guesses if a length is free.

    Raises:
        FileError: the runtime cannot run the file.
    """
    if backend.whole or any(None in i.shape for i in backend.inputs):
        return [0.01] * len(backend.exits)
    early = 0 if backend.engine is None or backend.engine.policy is None else backend.engine.num_exits - 1
    settable = early and backend.engine is not None and not backend.engine.fixed
    never = [None] * early if settable else None
    found: list[float] = []
    try:
        for _ in range(3):  # the runtime prepares itself in the first call
            zeros = {i.name: np.zeros((1, *(n or 0 for n in i.shape)), i.dtype) for i in backend.inputs}
            call = backend.call(zeros, never)
            held, found = call.held, []
            for stage in range(len(backend.exits)):
                started = time.perf_counter()
                _, _, held = backend.run(stage, held, call.kind)
                found.append(time.perf_counter() - started)
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise FileError(f"the runtime cannot run the model on zeros ({first_line(error)}); export it again") from error
    return found


class StagedBackend:
    """A folder of stages. Samples with any thresholds share batches."""

    platform = "branchynet_stages"
    whole = False

    def __init__(self, engine: StagedEngine) -> None:
        self.engine: Engine | None = engine
        self.inputs, self.outputs = engine.inputs, _outputs(engine)
        self.shapes = _shapes(self.inputs, self.outputs, None)
        self.exits = tuple(stage.exit for stage in engine.stages)
        self._stages, self._policy = engine.stages, engine.policy
        early = [] if self._policy is None else [t for t in self._policy.thresholds if t is not None]
        with np.errstate(over="ignore"):
            self._early = np.array([early], np.float64).astype(np.float32)  # (1, stages but the last)

    def call(self, inputs: Mapping[str, NDArray[Any]], thresholds: Any) -> Call:
        """Check the inputs of a request. Raises `InputError`."""
        assert self.engine is not None
        held, rows, sizes = _checked(self.engine, inputs)
        if thresholds is None:
            given = self._early if rows == 1 else self._early.repeat(rows, axis=0)
        else:
            used = [t for t in _thresholds(self.engine, thresholds, rows) if t is not None]
            with np.errstate(over="ignore"):
                columns = [np.broadcast_to(np.asarray(t, np.float64), rows) for t in used]
                given = np.array(columns).astype(np.float32).reshape(len(used), rows).T
        return Call(rows, {**held, THRESHOLDS: given}, sizes)

    def run(self, stage: int, held: Block, kind: Hashable) -> Stepped:
        """Run a stage, counted from 0, on samples of one kind."""
        one, limits = self._stages[stage], held[THRESHOLDS]
        answers, scores, carried = one.answer(held, len(limits))
        if stage == len(self._stages) - 1:
            return answers._asdict(), np.ones(len(scores), bool), {}
        stay = stays(scores, limits[:, stage])
        kept = stay.nonzero()[0]
        carried[THRESHOLDS] = limits
        if len(kept) < len(stay):
            carried = {name: value.take(kept, axis=0) for name, value in carried.items()} if len(kept) else {}
        return answers._asdict(), ~stay, carried


class FileBackend:
    """A file that `export` wrote, as one stage.

    Requests with different thresholds never share a batch, unless the file takes thresholds per sample.
    """

    platform = "branchynet_onnx"
    whole = False

    def __init__(self, engine: Engine) -> None:
        self.engine: Engine | None = engine
        self.inputs, self.outputs = engine.inputs, _outputs(engine)
        self.exits = (engine.num_exits,)
        self.single = engine.metadata["batch"] == 1
        self.shapes = _shapes(self.inputs, self.outputs, 1 if self.single else None)
        self._per_sample = bool(engine.metadata.get("per_sample"))

    def call(self, inputs: Mapping[str, NDArray[Any]], thresholds: Any) -> Call:
        """Check the inputs of a request. Raises `InputError`."""
        assert self.engine is not None
        held, rows, sizes = _checked(self.engine, inputs)
        if thresholds is None:
            return Call(rows, held, (sizes, None))
        if self.engine.fixed:
            raise InputError(
                "the thresholds are constants in this file, so a request cannot give others: leave them out"
            )
        given = _thresholds(self.engine, thresholds, rows)
        each = any(getattr(t, "shape", ()) not in ((), (1,)) for t in given)
        if each and not self._per_sample:
            raise InputError(
                "this file takes one threshold per exit, not one per sample; export it with thresholds='input' and "
                "free='batch', or with layout='stages'"
            )
        if not self._per_sample:
            plain = tuple(None if t is None else float(np.asarray(t).reshape(-1)[0]) for t in given)
            return Call(rows, held, (sizes, plain))
        with np.errstate(over="ignore"):
            columns = [np.broadcast_to(np.asarray(-np.inf if t is None else t, np.float32), rows) for t in given]
        return Call(rows, {**held, THRESHOLDS: np.stack(columns, axis=1)}, (sizes, True))

    def run(self, stage: int, held: Block, kind: Hashable) -> Stepped:
        """Run the file on samples of one kind."""
        assert self.engine is not None
        thresholds: Any = kind[1]  # type: ignore[index]
        if thresholds is True:
            own = () if self.engine.policy is None else self.engine.policy.thresholds
            each = held[THRESHOLDS]
            thresholds = [None if t is None else each[:, n] for n, t in enumerate(own)]
        answers = self.engine(*(held[i.name] for i in self.inputs), thresholds=thresholds)
        return answers._asdict(), np.ones(len(answers.exit), bool), {}


class OtherBackend:
    """An ONNX file that BranchyNet did not write, with its own outputs.

    Requests share batches if all inputs and outputs have the same free first dimension; otherwise each runs alone.
    """

    platform = "onnxruntime_onnx"
    engine: Engine | None = None
    exits: tuple[int, ...] = (1,)

    def __init__(self, session: onnxruntime.InferenceSession, dtypes: Mapping[str, Any]) -> None:
        self._session = session
        first = {(v.shape[0] if v.shape else None) for v in (*session.get_inputs(), *session.get_outputs())}
        self.whole = not (len(first) == 1 and isinstance(first.pop(), str))
        self.inputs = tuple(Input(v.name, dtypes[v.type], _sizes(v.shape[1:])) for v in session.get_inputs())
        self.outputs = tuple(
            Output(v.name, np.dtype(dtypes[v.type]), _sizes(v.shape[1:])) for v in session.get_outputs()
        )
        self.shapes = {v.name: _sizes(v.shape) for v in (*session.get_inputs(), *session.get_outputs())}
        self._names = [v.name for v in session.get_outputs()]

    def call(self, inputs: Mapping[str, NDArray[Any]], thresholds: Any) -> Call:
        """Check the inputs of a request. Raises `InputError`."""
        if thresholds is not None:
            raise InputError("this file was not written by BranchyNet, so it has no thresholds: leave them out")
        if not self.whole:
            held, rows = checked_inputs((), inputs, self.inputs)
            _check_some(rows)
            return Call(rows, held, tuple(v.shape[1:] for v in held.values()))
        names = [want.name for want in self.inputs]
        if wrong := {*inputs} ^ {*names}:
            raise InputError(f"input {min(wrong)!r} is missing or unknown; the network reads {', '.join(names)}")
        for want in self.inputs:
            given = inputs[want.name]
            if given.dtype != want.dtype or not has_sizes(given.shape, self.shapes[want.name]):
                raise InputError(
                    f"input {want.name!r} is {want.describe(given)}; the network reads {want.dtype_name} "
                    f"{tuple('?' if n is None else n for n in self.shapes[want.name])}"
                )
        return Call(1, dict(inputs), object())

    def run(self, stage: int, held: Block, kind: Hashable) -> Stepped:
        """Run the file."""
        values: list[Any] = list(self._session.run(self._names, held))
        found = dict(zip(self._names, values, strict=True))
        return found, np.ones(1 if self.whole else len(next(iter(held.values()))), bool), {}


def _outputs(engine: Engine) -> tuple[Output, ...]:
    tail = tuple(engine.metadata["output_shape"])
    if engine.lengths:  # the output may have one of them
        tail = (*tail[:1], *(None for _ in tail[1:]))
    return (
        Output("label", np.dtype(np.int64), tail[1:]),
        Output("exit", np.dtype(np.int64), ()),
        Output("score", np.dtype(np.float32), ()),
        Output("output", np.dtype(np.float32), tail),
    )


def _checked(engine: Engine, inputs: Mapping[str, NDArray[Any]]) -> tuple[Block, int, Hashable]:
    """Return the inputs in order, the number of samples, and the sizes of free lengths."""
    wanted = engine.inputs
    if len(inputs) == len(wanted) and all(i.name in inputs for i in wanted):
        held, rows = checked_inputs([inputs[i.name] for i in wanted], {}, wanted)
    else:
        held, rows = checked_inputs((), inputs, wanted)
    _check_some(rows)
    if not engine.lengths:
        return held, rows, None
    check_sizes(held, engine.lengths)
    return held, rows, tuple(value.shape[1:] for value in held.values())


def _check_some(rows: int) -> None:
    if not rows:
        raise InputError("the batch has no samples; give at least one")


def _thresholds(engine: Engine, thresholds: Any, rows: int) -> tuple[float | Floats | None, ...]:
    if engine.policy is None:
        raise InputError("this file was exported with policy=None and has no thresholds; leave them out")
    return call_thresholds(thresholds, engine.policy, rows, where="this file", remedy="export again")


def _shapes(inputs: Sequence[Input], outputs: Sequence[Output], batch: int | None) -> dict[str, Shape]:
    return {value.name: (batch, *value.shape) for value in (*inputs, *outputs)}


def _sizes(shape: Sequence[Any]) -> Shape:
    return tuple(n if isinstance(n, int) else None for n in shape)


def _of_another_tool(path: str | os.PathLike[str], threads: int | None) -> OtherBackend | None:
    """Open a file without our metadata; None if it has them, or ONNX Runtime cannot open it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        if METADATA_KEY in session.get_modelmeta().custom_metadata_map:
            return None
    except Exception:  # ONNX Runtime's errors share no base class; the first error says what is wrong
        return None
    for value in (*session.get_inputs(), *session.get_outputs()):
        if value.type not in DTYPES or value.shape is None:
            raise FileError(f"{path} has {value.name!r} of type {value.type}, which cannot be served")
    return OtherBackend(session, DTYPES)
