"""The models of a server: one run, file or folder of stages, or a folder that holds several of these."""

import asyncio
import logging
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..deploy.staged_files import MANIFEST
from ..errors import BranchyNetError, FileError, nearest
from ..files import check_path
from .extensions import statistics_of
from .faults import NotReady, UnknownModel
from .metrics import Metrics
from .models import VERSION, Loaded, Start, open_model
from .settings import ServeSettings

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")

log = logging.getLogger("branchynet.serve")


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
        settings: the settings of the server.
        metrics: count what the models do.
        start: as in `open_model`.

    Raises:
        FileError: there is nothing to serve.

    Attributes:
        path: absolute.
    """

    def __init__(self, path: Path, settings: ServeSettings, metrics: Metrics, start: Start | None = None) -> None:
        check_path(path)
        if not path.exists():
            raise FileError(f"there is no model {path}; give a run folder, an exported file, or a folder of them")
        self.path = path.resolve()
        self._settings, self._metrics, self._start = settings, metrics, start
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

    def check_any_ready(self) -> None:
        """Raise `FileError`, which says why, unless a model serves."""
        if not self.any_ready():
            reasons = "; ".join(f"{one['name']}: {one['reason']}" for one in self.index())
            raise FileError(f"no model of {self.path} can be served: {reasons}")

    def load(self, name: str) -> None:
        """Load a model, or load it again from its files; the earlier one serves until then.

        Raises:
            UnknownModel: the repository has no such name.
            BranchyNetError: its files cannot be served; the model is then not ready.
        """
        with self._lock:
            here = dict(self._scan())
            known = {n: entry for n, entry in self._entries.items() if n in here or entry.loaded is not None}
            self._entries = {n: _Entry(path) for n, path in here.items()} | known
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
                "state": "UNAVAILABLE" if entry.loaded is None else "READY",
                "reason": entry.reason,
            }
            for name, entry in sorted(self._entries.items())
        ]

    def statistics(self, name: str = "", version: str | None = None) -> list[dict[str, Any]]:
        """Return the statistics of a model that serves, or of all of them. Raises `UnknownModel` or `NotReady`."""
        found = [one.loaded for one in self._entries.values()] if not name else [self.ready(name, version)]
        models, counts = [one for one in found if one is not None], self._metrics
        return [statistics_of(one, counts.model(one.name), counts.failed(one.name)) for one in models]

    def any_ready(self) -> bool:
        """Whether a model serves."""
        return any(entry.loaded is not None for entry in self._entries.values())

    def close(self) -> None:
        """Stop all models after their accepted requests are answered."""
        for entry in self._entries.values():
            if entry.loaded is not None:
                entry.loaded.stop()

    def _entry(self, name: str) -> _Entry:
        entries = self._entries  # loading replaces it
        if name not in entries:
            raise UnknownModel(f"there is no model {name!r:.140}{nearest(name[:128], entries)}")
        return entries[name]

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
        self._check_inside(path)
        return open_model(name, path, self._settings, self._metrics.model(name), self._start)

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
            if entry.loaded.moving is not None:
                for n, threshold in enumerate(entry.loaded.moving.thresholds, 1):
                    if threshold is not None:
                        yield f"branchynet_threshold_{n}", "The threshold of an exit now.", name, threshold
            if entry.loaded.watch is not None:
                state = entry.loaded.watch.monitor.state
                yield "branchynet_drift_alarm", "1 after a drift alarm.", name, float(state.alarmed)
                yield "branchynet_drift_capital", "Evidence for drift; 1 raises the alarm.", name, state.capital


async def in_thread(function: Any, *arguments: Any) -> Any:
    """Call a function that blocks, in a thread."""
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


def _holds_model(path: Path) -> bool:
    return any((path / name).exists() for name in (MANIFEST, "model.onnx", "stages"))


def _plain(name: str) -> str:
    return name if _NAME.fullmatch(name) else re.sub(r"[^A-Za-z0-9_]+", "_", name)[:128] or "model"
