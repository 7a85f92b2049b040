"""A model that serves, and what lies in its folder."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..deploy.staged_files import MANIFEST
from ..errors import FileError, InputError, nearest
from ..policy.exit_cost import ExitCost
from ..policy.values import Choice
from .backends import Backend, Call, open_backend, warmed
from .budget import MovingThresholds, moving_thresholds
from .drift import DriftWatch, record_in, watch_beside
from .faults import DeadlineError, TooSlow
from .metrics import ModelMetrics
from .oip import CLASS_NAME, Options, metadata_of
from .presets import Preset, presets_beside, read_presets
from .runner import Answer, Observer, Runner
from .settings import ServeSettings
from .tickets import StageLimit, stage_limits

VERSION = "1"

_THRESHOLD = re.compile(r"threshold_([1-9]\d{0,3})")


class Answerer(Protocol):
    """Answers the requests to one model.

    Attributes:
        waiting: unanswered samples.
    """

    @property
    def waiting(self) -> int:
        """Unanswered samples."""
        ...

    async def answer(self, call: Call, timeout: float) -> Answer:
        """Answer a request within `timeout` seconds. Raises as `Runner.answer`."""
        ...

    def stop(self) -> None:
        """Refuse new requests, and wait until all accepted ones are answered."""
        ...


class Start(Protocol):
    """Starts what answers the requests to a model."""

    def __call__(
        self, name: str, path: Path, backend: Backend, sample_us: Sequence[float] | None, observer: Observer
    ) -> Answerer:
        """Start a model.

        Args:
            name: the name of the model.
            path: the file or folder that `backend` opened.
            backend: what runs.
            sample_us: expected microseconds per sample of each stage; None if unknown.
            observer: receives each answer.
        """
        ...


@dataclass(frozen=True)
class Loaded:
    """A model that serves.

    Attributes:
        backend: what runs.
        runner: what answers.
        presets: its named policies.
        watch: the watch for drift; None without a record.
        moving: the thresholds of requests that give none; None for those of the file.
        labels: class names, or empty.
        settings: the settings of the server.
        folder: with its record and cost; None if it has none of its own.
    """

    name: str
    backend: Backend
    runner: Answerer
    presets: dict[str, Preset]
    watch: DriftWatch | None
    moving: MovingThresholds | None
    labels: tuple[str, ...]
    settings: ServeSettings
    folder: Path | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata of the protocol."""
        return metadata_of(self.name, VERSION, self.backend, bool(self.labels))

    async def infer(self, inputs: Mapping[str, NDArray[Any]], options: Options) -> Answer:
        """Answer a request.

        Args:
            inputs: by name; ``threshold_1`` and so on may give thresholds per sample, `(1,)` or `(B,)`.
            options: policy or thresholds, and deadline.

        Raises:
            InputError: inputs or thresholds do not fit the model, or it has no such policy.
            DeadlineError: the deadline of the request passed, and a sample has reached no exit.
            TooSlow: the deadline of the server passed.
            QueueFull, StoppedError, RunError: as `Runner.answer`.
        """
        inputs, thresholds = self._thresholds(inputs, options)
        default = thresholds is None
        if default and self.moving is not None:
            thresholds = self.moving.thresholds
        call = self.backend.call(inputs, thresholds)
        if not default:
            call = replace(call, default=False)
        own, most = math.inf if options.timeout is None else options.timeout, self.settings.timeout_s
        try:
            return await self.runner.answer(call, min(own, most))
        except DeadlineError as error:
            raise error if own < most else TooSlow(str(error)) from None

    def named(self, outputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return outputs with the names of the classes, if the model has any."""
        if not self.labels or outputs["label"].ndim != 1:
            return outputs
        names = [self.labels[n] if n < len(self.labels) else str(n) for n in outputs["label"].tolist()]
        return {**outputs, CLASS_NAME: np.array(names, object)}

    def stop(self) -> None:
        """Answer the accepted requests, then end."""
        self.runner.stop()
        if self.watch is not None:
            self.watch.stop()

    def _thresholds(self, inputs: Mapping[str, NDArray[Any]], options: Options) -> tuple[Mapping[str, Any], Any]:
        known = {i.name for i in self.backend.inputs}
        given = {name: found for name in inputs if name not in known and (found := _THRESHOLD.fullmatch(name))}
        if given:
            engine = self.backend.engine
            if options.policy is not None or options.thresholds is not None:
                raise InputError(f"give thresholds once: as {min(given)!r}, or as a parameter")
            early = 0 if engine is None else engine.num_exits - 1
            thresholds: list[Any] = [None] * early
            for name, found in given.items():
                if int(found[1]) > early:
                    raise InputError(f"there is no {name!r}: the model has {early} early exits")
                thresholds[int(found[1]) - 1] = inputs[name]
            return {name: array for name, array in inputs.items() if name not in given}, thresholds
        if options.policy is None:
            return inputs, options.thresholds
        if options.policy not in self.presets:
            known_ones = nearest(options.policy, self.presets) if self.presets else "; it has none"
            raise InputError(f"the model has no policy {options.policy!r}{known_ones}")
        return inputs, self.presets[options.policy].policy.thresholds


def open_model(
    name: str, path: Path, settings: ServeSettings, counts: ModelMetrics, start: Start | None = None
) -> Loaded:
    """Open a model and start what answers its requests.

    Args:
        name: the name of the model.
        path: a run folder, an exported file, or a folder of stages.
        settings: the settings of the server.
        counts: the metrics of the model.
        start: starts it; None for a `Runner` in this process.

    Raises:
        BranchyNetError: its files cannot be served.
    """
    folder, model = _files_of(path)
    backend = open_backend(model, settings.threads, settings.runtime)
    engine = backend.engine
    if folder is not None:
        _check_choice(folder, engine)
    presets = read_presets(presets_beside(path), engine)
    record, moving, watch = record_in(folder), None, None
    if settings.budget_us is not None and settings.budget_limit is not None:
        moving = moving_thresholds(folder, record, engine, presets, settings.budget_limit, settings.budget_us)
    elif settings.monitor:  # it needs thresholds that do not move
        watch = watch_beside(name, record, engine)
    sample_us = _sample_us(folder, backend)
    observer = _Listeners(counts, [one for one in (watch, moving) if one is not None])
    if start is not None:
        runner = start(name, model, backend, sample_us, observer)
    else:
        runner = Runner(
            backend,
            limits_of(backend, settings, sample_us),
            max_wait=settings.max_wait_ms / 1e3,
            bound=settings.queue,
            most_wait=settings.queue_ms / 1e3,
            observer=observer,
        )
    labels = () if engine is None else engine.labels
    return Loaded(name, backend, runner, presets, watch, moving, labels, settings, folder)


def limits_of(backend: Backend, settings: ServeSettings, sample_us: Sequence[float] | None) -> tuple[StageLimit, ...]:
    """Return the bounds of the batches of each stage, from its time on a sample of zeros. Raises `FileError`."""
    most = 1 if backend.whole or getattr(backend, "single", False) else settings.max_batch
    return stage_limits(warmed(backend), most, sample_us, settings.batch_us)


class _Listeners:
    """An observer that counts, and passes on the answers of requests that gave no thresholds."""

    def __init__(self, counts: ModelMetrics, others: Sequence[DriftWatch | MovingThresholds]) -> None:
        self.ran, self._counts, self._others = counts.ran, counts, others

    def answered(self, outputs: dict[str, NDArray[Any]], seconds: float, default: bool) -> None:
        """Count the answer to a request."""
        self._counts.answered(outputs, seconds, default)
        if default:
            for one in self._others:
                one.add(outputs)


def _files_of(path: Path) -> tuple[Path | None, Path]:
    """Return the folder of the model, and the file or folder that is opened: the stages of a run if it has them.

    The folder of a file is that of its run; None for files of other names, which may share a folder.
    """
    if not path.is_dir():
        return path.parent if path.name == "model.onnx" else None, path
    if (path / MANIFEST).exists():
        return path, path
    return path, path / "stages" if (path / "stages" / MANIFEST).exists() else path / "model.onnx"


def _check_choice(folder: Path, engine: Any) -> None:
    """Raise `FileError` if a run has chosen other thresholds since the export."""
    path = folder / "choice.json"
    if engine is None or engine.policy is None or not path.exists():
        return
    if Choice.load(path).policy.to_json() != engine.policy.to_json():
        raise FileError(f"the model in {folder} has other thresholds than {path} has now: export it again")


def _sample_us(folder: Path | None, backend: Backend) -> list[float] | None:
    """Return the expected microseconds per sample of each stage, if the cost of the network lies in its folder."""
    engine = backend.engine
    if folder is None or engine is None or engine.policy is None or not (folder / "cost.json").exists():
        return None
    path = folder / "cost.json"
    cost = ExitCost.load(path)
    if cost.num_exits != engine.num_exits:
        raise FileError(f"{path} has {cost.num_exits} exits, but the model has {engine.num_exits}: measure it again")
    at = cost.latency_us(engine.policy.enabled)[[n - 1 for n in backend.exits]]
    return np.diff(at, prepend=0.0).tolist()
