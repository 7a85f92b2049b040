"""Models and where they come from: one run, file or folder of stages, or a folder that holds several of these."""

import asyncio
import logging
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..deploy.staged_files import MANIFEST
from ..errors import BranchyNetError, FileError, InputError, nearest
from ..files import check_path
from ..policy.exit_cost import ExitCost
from ..policy.values import Choice
from .backends import Backend, open_backend, warmed
from .drift import DriftWatch, watch_beside
from .faults import NotReady, UnknownModel
from .metrics import Metrics
from .oip import CLASS_NAME, Options, metadata_of
from .presets import Preset, presets_beside, read_presets
from .runner import Answer, Runner
from .settings import ServeSettings
from .tickets import stage_limits

VERSION = "1"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_THRESHOLD = re.compile(r"threshold_([1-9]\d{0,3})")

log = logging.getLogger("branchynet.serve")


@dataclass(frozen=True)
class Loaded:
    """A model that serves.

    Attributes:
        backend: what runs.
        runner: its worker.
        presets: its named policies.
        watch: for drift; None without a record.
        labels: class names, or empty.
    """

    name: str
    backend: Backend
    runner: Runner
    presets: dict[str, Preset]
    watch: DriftWatch | None
    labels: tuple[str, ...]
    timeout: float

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
            QueueFull, DeadlineError, StoppedError, RunError: as `Runner.answer`.
        """
        inputs, thresholds = self._thresholds(inputs, options)
        call = self.backend.call(inputs, thresholds)
        timeout = self.timeout if options.timeout is None else min(options.timeout, self.timeout)
        return await self.runner.answer(call, timeout)

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


@dataclass(eq=False)
class _Entry:
    """A name of the repository."""

    path: Path
    loaded: Loaded | None = None
    reason: str = ""


class Repository:
    """The models of a server.

    Args:
        path: a run folder, an exported file, a folder of stages, or a folder that holds several of these.
        settings: of the server.
        metrics: where models count.

    Raises:
        FileError: there is nothing to serve.

    Attributes:
        path: absolute.
    """

    def __init__(self, path: Path, settings: ServeSettings, metrics: Metrics) -> None:
        check_path(path)
        if not path.exists():
            raise FileError(f"there is no model {path}; give a run folder, an exported file, or a folder of them")
        self.path = path.resolve()
        self._settings, self._metrics = settings, metrics
        self._lock = threading.Lock()  # of loading; reading an entry needs none
        self._single = not self.path.is_dir() or _holds_model(self.path)
        self._entries = {name: _Entry(found) for name, found in self._scan()}
        if not self._entries:
            raise FileError(
                f"{path} holds no models; give a run folder, an exported file, or a folder of them: NAME.onnx, or a "
                "folder NAME with stages.json or model.onnx"
            )
        metrics.gauges = self._gauges

    @property
    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    def load_all(self) -> None:
        """Load every model. One that cannot be loaded is not ready, and its reason is logged."""
        for name in self.names:
            try:
                self.load(name)
            except BranchyNetError as error:
                log.error("%s is not ready: %s", name, error)

    def load(self, name: str) -> None:
        """Load a model, or load it again from its files; the earlier one serves until then.

        Raises:
            UnknownModel: the repository has no such name.
            BranchyNetError: its files cannot be served; the model is then not ready.
        """
        with self._lock:
            for found, path in self._scan():
                self._entries.setdefault(found, _Entry(path))
            entry = self._entry(name)
            earlier = entry.loaded
            try:
                entry.loaded, entry.reason = self._open(name, entry.path), ""
            except BranchyNetError as error:
                entry.reason = str(error)
                if earlier is None:
                    raise
                raise FileError(f"{error}; the earlier files are still served") from error
        if earlier is not None:
            earlier.stop()

    def unload(self, name: str) -> None:
        """Stop a model after its accepted requests are answered. Raises `UnknownModel`."""
        with self._lock:
            entry = self._entry(name)
            earlier, entry.loaded, entry.reason = entry.loaded, None, "it was unloaded"
        if earlier is not None:
            earlier.stop()

    def ready(self, name: str, version: str | None = None) -> Loaded:
        """Return a model that serves. Raises `UnknownModel` or `NotReady`."""
        entry = self._entry(name)
        if version not in (None, "", VERSION):
            raise UnknownModel(f"the model {name!r} has no version {version!r:.40}, only {VERSION}")
        if entry.loaded is None:
            raise NotReady(f"the model {name!r} is not ready: {entry.reason or 'it is loading'}")
        return entry.loaded

    def index(self) -> list[dict[str, str]]:
        """Return name, version, state and reason of every model."""
        return [
            {
                "name": name,
                "version": VERSION,
                "state": "UNAVAILABLE" if (entry := self._entries[name]).loaded is None else "READY",
                "reason": entry.reason,
            }
            for name in self.names
        ]

    def any_ready(self) -> bool:
        """Whether a model serves."""
        return any(entry.loaded is not None for entry in self._entries.values())

    def close(self) -> None:
        """Stop all models after their accepted requests are answered."""
        for entry in self._entries.values():
            if entry.loaded is not None:
                entry.loaded.stop()

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise UnknownModel(f"there is no model {name!r:.140}{nearest(name[:128], self._entries)}")
        return self._entries[name]

    def _scan(self) -> Iterator[tuple[str, Path]]:
        """Yield the names and paths of all models."""
        if self._single:
            folder = self.path.parent if self.path.name in ("model.onnx", "stages") else self.path
            yield _plain(folder.stem if folder.suffix == ".onnx" else folder.name), self.path
            return
        for path in sorted(self.path.iterdir()):
            name = path.stem if path.suffix == ".onnx" else path.name
            if _NAME.fullmatch(name) and (path.suffix == ".onnx" or (path.is_dir() and _holds_model(path))):
                yield name, path

    def _open(self, name: str, path: Path) -> Loaded:
        settings = self._settings
        self._check_inside(path)
        folder, model = _files_of(path)
        backend = open_backend(model, settings.threads, settings.runtime)
        engine = backend.engine
        if folder is not None:
            _check_choice(folder, engine)
        presets = read_presets(presets_beside(path), engine)
        watch = watch_beside(name, folder, engine) if settings.monitor else None
        most = 1 if backend.whole or getattr(backend, "single", False) else settings.max_batch
        limits = stage_limits(warmed(backend), most, _sample_us(folder, backend), settings.batch_us)
        counts = self._metrics.model(name)
        runner = Runner(
            backend,
            limits,
            max_wait=settings.max_wait_ms / 1e3,
            bound=settings.queue,
            observer=counts if watch is None else _Both(counts, watch),
        )
        labels = () if engine is None else engine.labels
        return Loaded(name, backend, runner, presets, watch, labels, settings.timeout_s)

    def _check_inside(self, path: Path) -> None:
        """Raise `FileError` if a file of a model lies outside the repository, through a link."""
        inside = self.path if self.path.is_dir() else self.path.parent
        for file in (path, *((p for p in path.rglob("*") if p.is_symlink()) if path.is_dir() else ())):
            if not file.resolve().is_relative_to(inside):
                raise FileError(f"{file} leads out of {inside}, and is not served; copy it there instead")

    def _gauges(self) -> Iterator[tuple[str, str, str, float]]:
        for name, entry in self._entries.items():
            yield "branchynet_ready", "Whether a model serves.", name, float(entry.loaded is not None)
            if entry.loaded is None:
                continue
            yield "branchynet_waiting_samples", "Unanswered samples.", name, float(entry.loaded.runner.waiting)
            if entry.loaded.watch is not None:
                state = entry.loaded.watch.monitor.state
                yield "branchynet_drift_alarm", "1 after a drift alarm.", name, float(state.alarmed)
                yield "branchynet_drift_capital", "Evidence for drift; 1 raises the alarm.", name, state.capital


class _Both:
    """An observer that counts, and watches the answers with the thresholds of the file."""

    def __init__(self, counts: Any, watch: DriftWatch) -> None:
        self.ran, self._counts, self._watch = counts.ran, counts, watch

    def answered(self, outputs: dict[str, NDArray[Any]], seconds: float, default: bool) -> None:
        """Count and watch the answer to a request."""
        self._counts.answered(outputs, seconds, default)
        if default:
            self._watch.add(outputs)


async def in_thread(function: Any, *arguments: Any) -> Any:
    """Call a function that blocks, in a thread."""
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


def _holds_model(path: Path) -> bool:
    return any((path / name).exists() for name in (MANIFEST, "model.onnx", "stages"))


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
        raise FileError(f"{path} has {cost.num_exits} exits, but the model {engine.num_exits}: measure it again")
    at = cost.latency_us(engine.policy.enabled)[[n - 1 for n in backend.exits]]
    return np.diff(at, prepend=0.0).tolist()


def _plain(name: str) -> str:
    return name if _NAME.fullmatch(name) else re.sub(r"[^A-Za-z0-9_]+", "_", name)[:128] or "model"
