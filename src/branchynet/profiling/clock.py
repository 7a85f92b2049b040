"""Timing several things side by side, so that a slow moment of the machine hits them all alike."""

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
_T95 = 2.776  # of Student's distribution with one degree of freedom less than there are blocks


def interleaved(calls: Sequence[Callable[[], Any]], seconds: float, *, rounds: int = 400) -> list[float]:
    """Median microseconds of each call, taken in turns: once to warm its weights up, then a few times by the clock."""
    return [float(us) for us in np.median(samples_of(calls, seconds, rounds=rounds), axis=1)]


def until_steady(calls: Sequence[Callable[[], Any]], seconds: float, *, rounds: int = 400) -> tuple[list[float], float]:
    """Median microseconds of each call, taken in turns, and by what share of them they may be off.

    While that is more than `STEADY`, the calls are timed on, up to four times as long.
    """
    times: list[list[float]] = [[] for _ in calls]
    for n in range(_PATIENCE):
        _take_turns(calls, times, seconds, rounds * (n + 1))
        level = at_one_pace(times)
        if spread_of(level) <= STEADY:
            break
    return [float(us) for us in np.median(level, axis=1)], spread_of(level)


def spread_of(times: Floats) -> float:
    """By what share of it the median of the least certain call may be off (95 %), from times `(calls, turns)`.

    The turns are cut into five blocks, one after the other, whose medians differ by what slowly changes too.
    """
    medians = np.stack([np.median(block, axis=1) for block in np.array_split(times, _BLOCKS, axis=1)])
    half = _T95 * medians.std(axis=0, ddof=1) / np.sqrt(_BLOCKS)
    return float((half / np.maximum(medians.mean(axis=0), 1e-9)).max())


def samples_of(calls: Sequence[Callable[[], Any]], seconds: float, *, rounds: int = 400) -> Floats:
    """Microseconds of each call, `(calls, turns)`: at least 5 turns, and as many as fit into `seconds`, at one pace."""
    times: list[list[float]] = [[] for _ in calls]
    _take_turns(calls, times, seconds, rounds)
    return at_one_pace(times)


def _take_turns(calls: Sequence[Callable[[], Any]], times: list[list[float]], seconds: float, rounds: int) -> None:
    """Add turns to the `times` of each call: at least 5 in all, and as many up to `rounds` as fit into `seconds`."""
    for call in calls:
        call()
    end = time.perf_counter() + seconds
    while len(times[0]) < _BLOCKS or (time.perf_counter() < end and len(times[0]) < rounds):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            once = time.perf_counter() - start
            if once < _LONG:  # of long calls the cold start is no part worth telling
                start = time.perf_counter()
                for _ in range(_CALLS):
                    call()
                once = (time.perf_counter() - start) / _CALLS
            taken.append(once * 1e6)


def at_one_pace(times: Sequence[Sequence[float]]) -> Floats:
    """Times `(calls, turns)` with what slows a turn down for all calls taken out: the machine's clock, and neighbours.

    A turn's pace is the median, over calls, of its time beside the call's own median. On a shared machine the pace
    changes from one second to the next; medians of calls alone may then lie at different paces, and their ratios and
    differences say nothing.
    """
    taken = np.array(times, np.float64)
    beside = taken / np.maximum(np.median(taken, axis=1, keepdims=True), 1e-9)
    return taken / np.maximum(np.median(beside, axis=0), 1e-9)


def in_turns(
    calls: Mapping[str, Callable[..., Any] | Sequence[Callable[..., Any]]],
    batches: Sequence[Sequence[Any]],
    repeats: int,
) -> dict[str, float]:
    """Median microseconds per sample of the passes that `passes_in_turns` times."""
    return {name: float(np.median(us)) for name, us in passes_in_turns(calls, batches, repeats).items()}


def passes_in_turns(
    calls: Mapping[str, Callable[..., Any] | Sequence[Callable[..., Any]]],
    batches: Sequence[Sequence[Any]],
    repeats: int,
) -> dict[str, Floats]:
    """Microseconds per sample of each of `repeats` passes over all batches, at one pace; names take turns.

    A turn is 64 samples, and four calls at least. Who has its turn finds its weights cold, so turns of few calls would
    tell of that alone. Who goes first finds the inputs cold and what it computes with evicted, so that turn goes round
    too.

    Args:
        calls: for each name, what to call for every batch; or a sequence, one a batch.
        batches: the arguments of each call, arrays of as many rows as samples.
        repeats: passes that count; one before them warms up.
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
    """By what share of it the ratio of two times may be off (95 %), from paired passes; None of fewer than five."""
    return spread_of((first / np.maximum(second, 1e-9))[None]) if len(first) >= _BLOCKS else None
