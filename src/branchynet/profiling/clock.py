"""Time several calls in turns, so that a slow moment of the machine affects all of them."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..policy.values import STEADY, Floats

_LONG = 0.05  # seconds
_CALLS = 4
_PATIENCE = 4
_BLOCKS = 5
Calls = Callable[..., Any] | Sequence[Callable[..., Any]]  # one for every batch, or one per batch
_T95 = 2.776  # of Student's t-distribution with _BLOCKS - 1 degrees of freedom


def interleaved(calls: Sequence[Callable[[], Any]], seconds: float, *, rounds: int = 400) -> list[float]:
    """Return median microseconds of each call, timed in turns. Each turn starts with calls that warm the weights."""
    return np.median(samples_of(calls, seconds, rounds=rounds), axis=1).tolist()


def until_steady(calls: Sequence[Callable[[], Any]], seconds: float, *, rounds: int = 400) -> tuple[list[float], float]:
    """Return median microseconds of each call, timed in turns, and their relative uncertainty.

    While the uncertainty is above `STEADY`, timing continues, up to four times as long.
    """
    times: list[list[float]] = [[] for _ in calls]
    for n in range(_PATIENCE):
        _take_turns(calls, times, seconds, rounds * (n + 1))
        level = at_one_pace(times)
        if (spread := spread_of(level)) <= STEADY:
            break
    return np.median(level, axis=1).tolist(), spread


def spread_of(times: Floats) -> float:
    """Return the relative uncertainty (95%) of the least certain call's median, from times `(calls, turns)`.

    It follows from the medians of five consecutive blocks of turns, which include slow changes.
    """
    medians = np.stack([np.median(block, axis=1) for block in np.array_split(times, _BLOCKS, axis=1)])
    half = _T95 * medians.std(axis=0, ddof=1) / np.sqrt(_BLOCKS)
    return float((half / np.maximum(medians.mean(axis=0), 1e-9)).max())


def samples_of(calls: Sequence[Callable[[], Any]], seconds: float, *, rounds: int = 400) -> Floats:
    """Return microseconds of each call, `(calls, turns)`, at one pace: at least 5 turns, as many as fit `seconds`."""
    times: list[list[float]] = [[] for _ in calls]
    _take_turns(calls, times, seconds, rounds)
    return at_one_pace(times)


def _take_turns(calls: Sequence[Callable[[], Any]], times: list[list[float]], seconds: float, rounds: int) -> None:
    """Append turns to the `times` of each call, for `seconds` and up to `rounds` in all, but at least 5."""
    for call in calls:
        call()
    end = time.perf_counter() + seconds
    while len(times[0]) < _BLOCKS or (time.perf_counter() < end and len(times[0]) < rounds):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            once = time.perf_counter() - start
            if once < _LONG:  # in a long call the cold start is negligible
                start = time.perf_counter()
                for _ in range(_CALLS):
                    call()
                once = (time.perf_counter() - start) / _CALLS
            taken.append(once * 1e6)


def at_one_pace(times: Sequence[Sequence[float]]) -> Floats:
    """Return times `(calls, turns)` divided by the pace of their turn.

    The pace of a turn is the median, over calls, of its time relative to the call's median. On a shared machine the
    pace changes within seconds, so medians of single calls may not be comparable.
    """
    taken = np.array(times, np.float64)
    relative = taken / np.maximum(np.median(taken, axis=1, keepdims=True), 1e-9)
    return taken / np.maximum(np.median(relative, axis=0), 1e-9)


def in_turns(calls: Mapping[str, Calls], batches: Sequence[Sequence[Any]], repeats: int) -> dict[str, float]:
    """Return median microseconds per sample over the passes of `passes_in_turns`."""
    return {name: float(np.median(us)) for name, us in passes_in_turns(calls, batches, repeats).items()}


def passes_in_turns(calls: Mapping[str, Calls], batches: Sequence[Sequence[Any]], repeats: int) -> dict[str, Floats]:
    """Return microseconds per sample of each of `repeats` passes over all batches, at one pace; names take turns.

    A turn is 64 samples, and at least four calls: its first calls run with cold weights, and short turns would measure
    only that. The first name in a round also reads cold inputs, so the order rotates. `batches` holds the arguments of
    each call, arrays with one row per sample. The first pass, to warm up, is not timed.
    """
    each = {name: [call] * len(batches) if callable(call) else call for name, call in calls.items()}
    samples = sum(len(batch[0]) for batch in batches)
    turn = max(_CALLS, 64 * len(batches) // samples)
    passes: dict[str, list[float]] = {name: [] for name in each}
    order = deque(each)
    for repeat in range(repeats + 1):
        total = dict.fromkeys(each, 0.0)
        for start in range(0, len(batches), turn):
            block = slice(start, start + turn)
            order.rotate(1)
            for name in order:
                turns = list(zip(each[name][block], batches[block], strict=True))
                begin = time.perf_counter()
                for call, arguments in turns:
                    call(*arguments)
                total[name] += time.perf_counter() - begin
        if repeat:
            for name, seconds in total.items():
                passes[name].append(seconds * 1e6 / samples)
    return dict(zip(passes, at_one_pace([*passes.values()]), strict=True))


def ratio_spread(first: Floats, second: Floats) -> float | None:
    """Return the relative uncertainty (95%) of a ratio of two times, from paired passes; None for fewer than 5."""
    return spread_of((first / np.maximum(second, 1e-9))[None]) if len(first) >= _BLOCKS else None
