"""The answers of the last minute, second by second, for the chart of the page."""

import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

SECONDS = 60
STEP = 1.05
"""Latencies are counted in bins, each so many times as long as the one before it, from 1 us to 100 s."""

_BOUNDS = [STEP**n for n in range(round(np.log(1e8) / np.log(STEP)) + 1)]  # microseconds


class Traffic:
    """Counts answers by exit, and how long requests took. Threads may share it.

    Args:
        clock: returns seconds; a test may replace it.

    Example:
        >>> traffic = Traffic()
        >>> traffic.add({1: 3, 2: 1}, seconds=0.002)
        >>> sum(traffic.last_minute()["exits"]["1"])
        3
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._held: deque[tuple[int, dict[int, int], dict[int, int]]] = deque()  # second, samples by exit, bins

    def add(self, samples: Mapping[int, int], seconds: float) -> None:
        """Count the answer to a request: its `samples` by exit, after `seconds`."""
        place = min(bisect_left(_BOUNDS, 1e6 * seconds), len(_BOUNDS) - 1)
        with self._lock:
            second = int(self._clock())
            if not self._held or self._held[-1][0] < second:
                self._held.append((second, {}, {}))
                self._forget(second)
            _, by_exit, bins = self._held[-1]
            for exit, count in samples.items():
                by_exit[exit] = by_exit.get(exit, 0) + count
            bins[place] = bins.get(place, 0) + 1

    def last_minute(self) -> dict[str, Any]:
        """Return the samples per second by exit, oldest second first, and percentiles of the latency.

        ``p50_us`` and ``p99_us`` are at most 5% too large; None without requests.
        """
        with self._lock:
            now = int(self._clock())
            self._forget(now)
            exits: dict[int, list[int]] = {}
            bins = np.zeros(len(_BOUNDS), np.int64)
            for second, by_exit, places in self._held:
                for exit, count in by_exit.items():
                    exits.setdefault(exit, [0] * SECONDS)[SECONDS - 1 - (now - second)] = count
                for place, count in places.items():
                    bins[place] += count
        reached = np.cumsum(bins)
        total = int(reached[-1])

        def percentile(share: float) -> float | None:
            return _BOUNDS[int(np.searchsorted(reached, share * total))] if total else None

        return {
            "seconds": SECONDS,
            "exits": {str(exit): counts for exit, counts in sorted(exits.items())},
            "requests": total,
            "p50_us": percentile(0.5),
            "p99_us": percentile(0.99),
        }

    def _forget(self, now: int) -> None:
        while self._held and self._held[0][0] <= now - SECONDS:
            self._held.popleft()
