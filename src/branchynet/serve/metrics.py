"""Metrics for Prometheus: requests, latency and scores by exit, and batches and queues by stage."""

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from .traffic import Traffic

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SCORES = (0.0001, 0.001, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)

_HISTOGRAMS: dict[str, tuple[str, str, tuple[float, ...]]] = {
    "branchynet_request_seconds": ("exit", "Seconds from arrival to answer; by the latest exit of a request.", SECONDS),
    "branchynet_score": ("exit", "Scores of answered samples.", SCORES),
    "branchynet_batch_samples": ("exit", "Samples per batch of the stage of an exit.", ROWS),
    "branchynet_batch_seconds": ("exit", "Seconds per batch of the stage of an exit.", SECONDS),
    "branchynet_queue_seconds": ("exit", "Seconds that samples waited for the stage of an exit.", SECONDS),
}
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _Histogram:
    """Counts of values between bounds; adds many values at once."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = np.zeros(len(bounds) + 1, np.int64)
        self.total = 0.0

    def add(self, values: ArrayLike) -> None:
        """Count values; NaN is larger than all bounds."""
        array = np.asarray(values, np.float64).reshape(-1)
        places = np.searchsorted(self.bounds, array)
        self.counts += np.bincount(places, minlength=len(self.counts))
        self.total += float(np.nansum(array))

    def add_one(self, value: float) -> None:
        """As `add`, for one value, ten times as fast."""
        known = value == value  # not NaN
        self.counts[bisect_left(self.bounds, value) if known else -1] += 1
        self.total += value if known else 0.0

    def buckets(self) -> list[tuple[str, float]]:
        """Return cumulative counts by their upper bounds."""
        bounds = [*(f"{bound:g}" for bound in self.bounds), "+Inf"]
        return list(zip(bounds, map(float, np.cumsum(self.counts)), strict=True))


class ModelMetrics:
    """What one model does; an `Observer` of its runner. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.histograms: dict[str, dict[int, _Histogram]] = {name: {} for name in _HISTOGRAMS}
        self.answers: dict[int, int] = {}
        self.last_ms = 0  # since 1970, of the last answer
        self.traffic = Traffic()

    def ran(self, exit: int, rows: int, waits: Sequence[float], seconds: float) -> None:
        """Count a batch."""
        with self._lock:
            self._add("branchynet_batch_samples", exit, rows)
            self._add("branchynet_batch_seconds", exit, seconds)
            self._add("branchynet_queue_seconds", exit, waits[0] if len(waits) == 1 else waits)

    def answered(self, outputs: dict[str, NDArray[Any]], seconds: float, default: bool) -> None:
        """Count the answer to a request."""
        exits, scores = outputs.get("exit"), outputs.get("score")
        with self._lock:
            self.last_ms = time.time_ns() // 1_000_000
            if exits is None or scores is None:  # a file of another tool
                self._add("branchynet_request_seconds", 1, seconds)
                self.traffic.add({1: 1}, seconds)
                return
            if len(exits) == 1:
                found = {int(exits[0]): 1}
                self._add("branchynet_score", int(exits[0]), float(scores[0]))
            else:
                numbers, counts = np.unique(exits, return_counts=True)
                found = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
                for n in found:
                    self._add("branchynet_score", n, scores[exits == n])
            for n, count in found.items():
                self.answers[n] = self.answers.get(n, 0) + count
            self._add("branchynet_request_seconds", max(found), seconds)
            self.traffic.add(found, seconds)

    def _add(self, name: str, exit: int, values: ArrayLike) -> None:
        one = self.histograms[name].get(exit)
        if one is None:
            one = self.histograms[name][exit] = _Histogram(_HISTOGRAMS[name][2])
        if isinstance(values, (int, float)):
            one.add_one(values)
        else:
            one.add(values)

    def snapshot(self) -> tuple[dict[str, dict[int, tuple[list[tuple[str, float]], float]]], dict[int, int]]:
        """Return the buckets and totals of all histograms by exit, and the answers by exit."""
        with self._lock:
            found = {
                name: {exit: (one.buckets(), one.total) for exit, one in by_exit.items()}
                for name, by_exit in self.histograms.items()
            }
            return found, dict(self.answers)


class Metrics:
    """The metrics of a server.

    Attributes:
        models: by name.
        gauges: called for each page; yields ``(name, help, model, value)``.
    """

    def __init__(self) -> None:
        self.models: dict[str, ModelMetrics] = {}
        self.gauges: Callable[[], Iterable[tuple[str, str, str, float]]] = lambda: ()
        self._requests: dict[tuple[str, str, int], int] = {}
        self._lock = threading.Lock()
        self._registry = CollectorRegistry()
        self._registry.register(self)  # type: ignore[arg-type]

    def request(self, model: str, protocol: str, status: int) -> None:
        """Count a request by its model (empty if it names none that exists), protocol and HTTP status."""
        key = (model, protocol, status)
        with self._lock:
            self._requests[key] = self._requests.get(key, 0) + 1

    def model(self, name: str) -> ModelMetrics:
        """Return the metrics of a model; they last while the server runs."""
        return self.models.setdefault(name, ModelMetrics())

    def failed(self, model: str) -> int:
        """Return how many requests to a model had a status of 400 or more."""
        with self._lock:
            return sum(n for (name, _, status), n in self._requests.items() if name == model and status >= 400)

    def page(self) -> bytes:
        """Return all metrics as text."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """Yield all metrics."""
        with self._lock:
            requests = dict(self._requests)
        counted = CounterMetricFamily(
            "branchynet_requests", "Requests by status.", labels=("model", "protocol", "status")
        )
        for (model, protocol, status), count in requests.items():
            counted.add_metric((model, protocol, str(status)), count)
        yield counted
        answers = CounterMetricFamily("branchynet_answers", "Answered samples by exit.", labels=("model", "exit"))
        shares = GaugeMetricFamily("branchynet_exit_share", "Share of the samples per exit.", labels=("model", "exit"))
        families = {
            name: HistogramMetricFamily(name, text, labels=("model", label))
            for name, (label, text, _) in _HISTOGRAMS.items()
        }
        for model, own in list(self.models.items()):
            histograms, by_exit = own.snapshot()
            for exit, count in by_exit.items():
                answers.add_metric((model, str(exit)), count)
                shares.add_metric((model, str(exit)), count / sum(by_exit.values()))
            for name, entries in histograms.items():
                for exit, (buckets, total) in entries.items():
                    families[name].add_metric((model, str(exit)), buckets, total)
        yield answers
        yield shares
        yield from families.values()
        gauges: dict[str, GaugeMetricFamily] = {}
        for name, text, model, value in self.gauges():
            gauges.setdefault(name, GaugeMetricFamily(name, text, labels=("model",))).add_metric((model,), value)
        yield from gauges.values()

    def describe(self) -> Iterable[Metric]:
        """Yield nothing: the names are known when they are collected."""
        return ()
