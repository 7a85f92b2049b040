"""Speed of an exported file beside the static network, in the same engine, with everything inside the clock."""

import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from . import scores
from .cost import static_engines
from .engine.exported import Engine
from .engine.onnx import load
from .errors import InputError
from .graph.flat import flatten
from .graph.quantize import calibration_batches, quantized
from .net import count_exits

Progress = Callable[[str], None]


def bench(
    path: str | os.PathLike[str],
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    network: str,
    accuracy_static: float,
    batches: Sequence[int] = (1, 64),
    threads: int = 1,
    samples: int = 2048,
    repeats: int = 15,
    seed: int = 0,
    runtime: Literal["onnxruntime", "openvino"] = "onnxruntime",
    calibration: Any = None,
    progress: Progress = lambda message: None,
) -> list[dict[str, Any]]:
    """Time one exported file at several batch sizes.

    For each batch size, the same real images in random order go through the branchy file, the plain backbone, and the
    static graphs of every exit; engines take turns after every few calls, and medians over repeats are reported.
    ``limit_us`` is the sum over exits n of share_n x time of the static graph that computes the trunk and all enabled
    branches up to exit n, scores included; ``overhead = branchy / limit``; ``speedup = static / branchy``.

    Args:
        path: a file that `export` wrote from `net` with a policy and a dynamic batch.
        net: the network in it.
        images: `(S, C, H, W)` float32 test inputs.
        labels: `(S,)` int64.
        network: a name for the rows.
        accuracy_static: test accuracy of the static network, for the rows.
        batches: batch sizes.
        threads: threads within an operator, for every engine.
        samples: how many of the images are timed (all of them count for accuracy).
        repeats: passes over those samples.
        seed: of the random order.
        runtime: as for `load`: what runs the file and the static graphs.
        calibration: for an int8 file, the samples that it was quantised with, so that the static graphs are int8 too.
        progress: called with a message now and then.

    Returns:
        Rows with ``network, engine, batch, threads, static_us, branchy_us, limit_us, speedup, overhead,
        accuracy_static, accuracy_branchy, exit_share, thresholds``; times are microseconds a sample.

    Raises:
        InputError: a flat file, one of another network, an int8 file without `calibration`, a batch size below 1 or
            beyond the number of images.
        FileError: no such file, or a foreign one.
    """
    engine = load(path, threads=threads, runtime=runtime)
    if engine.policy is None:
        raise InputError(
            f"{path} was exported with policy=None and has no early exits to time; export it with a policy"
        )
    if any(not 1 <= b <= len(images) for b in batches):
        raise InputError(f"batch sizes must lie in 1..{len(images)} (the test images); got {list(batches)}")
    if len(labels) != len(images):
        raise InputError(f"{len(images)} images need as many labels; got {len(labels)}")
    if repeats < 1:
        raise InputError(f"repeats must be at least 1; got {repeats}")
    exits = count_exits(net, images)
    if exits != engine.exits:
        raise InputError(f"{path} has {engine.exits} exits and the network {exits}; give the network that was exported")
    int8 = engine.metadata.get("quantize") is not None
    if int8 != (calibration is not None):
        told = "int8: give calibration=, the samples it was quantised with" if int8 else "float: leave calibration= out"
        raise InputError(f"{path} is {told}, so that the static graphs are what it is")
    order = np.random.default_rng(seed).permutation(len(images))
    inputs, answers = images.numpy()[order], labels.numpy()[order]
    predicted = [engine(inputs[i : i + 500]) for i in range(0, len(inputs), 500)]
    left = np.concatenate([p.exit for p in predicted])
    accuracy = float((np.concatenate([p.label for p in predicted]) == answers).mean())
    enabled = [n for n, on in enumerate(engine.policy.enabled, 1) if on]
    flat = flatten(net, images[:2], score=scores.resolve(engine.policy.score))
    if int8:
        flat = quantized(flat, calibration_batches(calibration, flat))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        static = static_engines(flat, Path(folder), threads, enabled=enabled, alone=False, runtime=runtime)
        for batch in batches:
            progress(f"batch {batch}, {threads} thread(s)")
            timed = inputs[: max(1, min(samples, len(inputs)) // batch) * batch]
            us = _time(engine, static, timed, batch, repeats)
            share = {n: float((left[: len(timed)] == n).mean()) for n in enabled}
            limit = sum(share[n] * us[f"upto_{n}"] for n in enabled)
            rows.append(
                {
                    "network": network,
                    "engine": runtime,
                    "batch": batch,
                    "threads": threads,
                    "static_us": us["plain"],
                    "branchy_us": us["branchy"],
                    "limit_us": limit,
                    "speedup": us["plain"] / us["branchy"],
                    "overhead": us["branchy"] / limit,
                    "accuracy_static": accuracy_static,
                    "accuracy_branchy": accuracy,
                    "exit_share": [float((left == n).mean()) for n in range(1, engine.exits + 1)],
                    "thresholds": list(engine.policy.thresholds),
                }
            )
    return rows


def _time(
    engine: Engine, static: dict[str, Engine], inputs: NDArray[Any], batch: int, repeats: int
) -> dict[str, float]:
    """Median microseconds a sample over `repeats` passes; engines take turns every few calls.

    Who goes first finds the images cold in the cache and what it computes with evicted, so that turn goes round too.
    """
    calls: dict[str, Callable[[NDArray[Any]], Any]] = {"branchy": engine, **{n: e.outputs for n, e in static.items()}}
    batches = [np.ascontiguousarray(inputs[i : i + batch]) for i in range(0, len(inputs), batch)]
    turn = max(1, 64 // batch)
    passes: dict[str, list[float]] = {name: [] for name in calls}
    order = deque(calls)
    for repeat in range(repeats + 1):
        total = dict.fromkeys(calls, 0.0)
        for start in range(0, len(batches), turn):
            block = batches[start : start + turn]
            order.rotate(1)
            for name in order:
                call = calls[name]
                begin = time.perf_counter()
                for rows in block:
                    call(rows)
                total[name] += time.perf_counter() - begin
        if repeat:  # the first pass warms caches up
            for name, seconds in total.items():
                passes[name].append(seconds * 1e6 / len(inputs))
    return {name: statistics.median(times) for name, times in passes.items()}
