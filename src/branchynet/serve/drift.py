"""Watch the answers of a model for drift while it serves."""

import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..deploy.engine import Engine
from ..errors import BranchyNetError
from ..monitor.drift import Monitor
from ..policy.exit_record import ExitRecord

RECORDS = ("record.npz", "record-test.npz")
"""Names of records beside a model, in order. The second is that of a run, whose test images choose nothing."""

_EVERY = 1.0  # seconds
_MOST = 65_536  # samples that wait for the monitor

log = logging.getLogger("branchynet.serve")


class DriftWatch:
    """A `Monitor` in a thread of its own, so that it does not delay answers."""

    def __init__(self, name: str, monitor: Monitor) -> None:
        self._name, self.monitor = name, monitor
        self._held: list[tuple[NDArray[Any], ...]] = []
        self._count = 0
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="branchynet-drift", daemon=True)
        self._thread.start()

    def add(self, outputs: dict[str, NDArray[Any]]) -> None:
        """Add the answers of a request that had the thresholds of the file. Answers are skipped under heavy load."""
        with self._lock:
            if self._count < _MOST:
                self._held.append((outputs["exit"], outputs["score"], outputs["label"]))
                self._count += len(outputs["exit"])

    def update(self) -> None:
        """Pass what was added to the monitor; log the first alarm."""
        with self._lock:
            held, self._held, self._count = self._held, [], 0
        if not held or self.monitor.state.alarmed:
            return
        exits, scores, labels = (np.concatenate(each) for each in zip(*held, strict=True))
        right = ~np.isnan(scores)
        if not right.any():
            return
        try:
            state = self.monitor.update(exits[right], scores[right], labels[right])
        except BranchyNetError as error:
            log.warning("the monitor of %s skips %d samples: %s", self._name, len(exits), error)
            return
        if state.alarmed:
            log.warning("drift in %s: %s", self._name, state)

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(_EVERY):
            self.update()


def record_in(folder: Path | None) -> Path | None:
    """Return the record in the folder of a model, if there is one."""
    if folder is None:
        return None
    return next((folder / record for record in RECORDS if (folder / record).is_file()), None)


def watch_beside(name: str, record: Path | None, engine: Engine | None) -> DriftWatch | None:
    """Return a watch if there is a record and the policy of the model has an early exit, else None."""
    if record is None or engine is None or engine.policy is None or not any(engine.policy.enabled[:-1]):
        return None
    try:
        monitor = Monitor(ExitRecord.load(record), engine.policy)
    except BranchyNetError as error:
        log.warning("%s is served without a monitor: %s", name, error)
        return None
    return DriftWatch(name, monitor)
