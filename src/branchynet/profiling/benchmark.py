"""Speed of an exported file beside the plain network, in the same engine, with everything inside the clock."""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..arguments import check_seed
from ..deploy.engine import Engine
from ..deploy.loading import Runtime, load
from ..errors import InputError, counted
from ..graph.onnx_flat import flatten
from ..graph.quantize import calibration_batches, quantized
from ..graph.torch_program import tensors_of
from ..nn.calls import first_rows
from ..nn.fingerprint import fingerprint
from ..nn.network import count_exits, plain_network
from ..policy.exit_record import check_same_network
from ..policy.fitted_scores import FittedScore
from ..policy.scores import SCORES, Score, resolve
from ..policy.values import score_name
from .clock import passes_in_turns, ratio_spread
from .part_engines import part_engines
from .recording import Loss

Progress = Callable[[str], None]
Arrays = tuple[NDArray[Any], ...]


def bench(
    path: str | os.PathLike[str],
    net: nn.Module,
    inputs: Any,
    target: Tensor,
    *,
    network: str,
    plain_accuracy: float | None,
    loss: Loss | None = None,
    score: Score | None = None,
    batches: Sequence[int] | None = None,
    threads: int = 1,
    samples: int = 2048,
    repeats: int = 15,
    seed: int = 0,
    runtime: Runtime = "onnxruntime",
    calibration: Any = None,
    progress: Progress = lambda message: None,
) -> list[dict[str, Any]]:
    """Time one exported file at several batch sizes.

    For each batch size, the same real inputs in random order go through the branchy file, the plain backbone, and the
    static graphs of every exit; engines take turns after every few calls, and medians over repeats are reported.
    ``limit_us`` is the sum over exits n of share_n x time of the static graph that computes the trunk and all enabled
    branches up to exit n, scores included; ``overhead = branchy / limit``; ``speedup = plain / branchy``. Each
    graph is timed by itself, with its weights warm in the caches. For one sample a call, ``limit_in_order_us`` has
    these graphs run in the samples' own order, each sample in that of its exit, as the file meets them: colder, the
    more so as each graph holds the first stages' weights again. ``overhead_sorted`` is the other way round: the file
    meets the samples sorted by their exits, its weights as warm as those of ``limit_us``, so that what is above 1 is
    the file's own. Beyond one sample a call both are None.

    Args:
        path: a file that `export` wrote from `net` with a policy. Where its batch is fixed at 1, that of the static
            graphs is too.
        net: the network in it.
        inputs: test inputs of S samples, as the network takes them: a tensor, or a tuple or dict of tensors.
        target: `(S,)` int64 class indices, or what `loss` takes, one a sample.
        network: a name for the rows.
        plain_accuracy: test accuracy of the plain network, for the rows; None where it is not known.
        loss: as for `record`, ``loss(output, target) -> (B,)`` in [0, 1]; accuracy is then 1 - mean loss.
        score: the callable that the file was exported with, where its score is no name in
            `branchynet.policy.record_scores`: it is part of the static graphs.
        batches: batch sizes; by default 1, and 64 where the file's batch is dynamic.
        threads: threads within an operator, for every engine.
        samples: how many of the inputs are timed (all of them count for accuracy).
        repeats: passes over those samples.
        seed: of the random order.
        runtime: as for `load`: what runs the file and the static graphs.
        calibration: for an int8 file, the samples that it was quantised with, so that the static graphs are int8 too.
        progress: called with a message now and then.

    Returns:
        Rows with ``network, engine, batch, threads, plain_us, branchy_us, limit_us, limit_in_order_us, speedup,
        spread, overhead, overhead_sorted, plain_accuracy, accuracy_branchy, exit_share, thresholds``; times are
        microseconds per sample, and ``spread`` is the share by which the speed-up may be off (95 %).

    Raises:
        InputError: a flat file, one of another network, an int8 file without `calibration`, a score of your own without
            `score`, a batch size below 1, beyond the number of inputs or that the file cannot take, targets that do not
            fit.
        FileError: no such file, or a foreign one.
    """
    engine = load(path, threads=threads, runtime=runtime)
    if engine.policy is None:
        raise InputError(
            f"{path} was exported with policy=None and has no early exits to time; export it with a policy"
        )
    function = _score(engine, score, path)
    arrays = tuple(t.numpy() for t in tensors_of(inputs))
    rows_given = len(arrays[0])
    dynamic = engine.metadata["batch"] == "dynamic"
    batches = ((1, 64) if dynamic else (1,)) if batches is None else batches
    if not dynamic and set(batches) != {1}:
        raise InputError(f"{path} answers one sample at a time; got batch sizes {list(batches)}: take 1 alone")
    if any(not 1 <= b <= rows_given for b in batches):
        raise InputError(f"batch sizes must lie in 1..{rows_given} (the test inputs); got {list(batches)}")
    if len(target) != rows_given:
        raise InputError(f"{rows_given} inputs need as many targets; got {len(target)}")
    if repeats < 1:
        raise InputError(f"repeats must be at least 1; got {repeats}")
    exits = count_exits(net, inputs)
    if exits != engine.num_exits:
        raise InputError(
            f"{path} has {engine.num_exits} exits and the network {exits}; give the network that was exported"
        )
    quantize = engine.metadata.get("quantize", {}).get("scheme")
    if (quantize is None) != (calibration is None):
        told = "int8: give calibration=, the samples it was quantised with"
        told = told if quantize else "float: leave calibration= out"
        raise InputError(f"{path} is {told}, so that the static graphs are what it is")
    check_same_network(
        f"{path} and net", engine.metadata.get("network"), fingerprint(net) + (f"-{quantize}" if quantize else "")
    )
    order = np.random.default_rng(check_seed(seed)).permutation(rows_given)
    arrays = tuple(array[order] for array in arrays)
    left, accuracy = _judge(engine, arrays, target[torch.from_numpy(order)], loss)
    enabled = [n for n, on in enumerate(engine.policy.enabled, 1) if on]
    flat = flatten(net, first_rows(inputs), score=function, dynamic=dynamic)
    if quantize:
        flat = quantized(flat, calibration_batches(calibration, flat), quantize)
    # The last exit of averaged answers holds branches too.
    alone = plain_network(net)
    plain = None if alone is net else flatten(alone, first_rows(inputs), dynamic=dynamic)
    if quantize and plain is not None:
        plain = quantized(plain, calibration_batches(calibration, plain), quantize)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        parts = part_engines(flat, Path(folder), threads, plain=plain, enabled=enabled, alone=False, runtime=runtime)
        for batch in batches:
            progress(f"batch {batch}, {counted(threads, 'thread')}")
            count = max(1, min(samples, rows_given) // batch) * batch
            timed = tuple(array[:count] for array in arrays)
            # Ties may be decided otherwise at another batch size, so the exits are those of this one.
            chunks = range(0, count, batch)
            here = np.concatenate([engine(*(a[i : i + batch] for a in timed)).exit for i in chunks])
            us, spread = _time(engine, parts, timed, here, batch, repeats)
            limit = sum(float((here == n).mean()) * us[f"upto_{n}"] for n in enabled)
            rows.append(
                {
                    "network": network,
                    "engine": runtime,
                    "batch": batch,
                    "threads": threads,
                    "plain_us": us["plain"],
                    "branchy_us": us["branchy"],
                    "limit_us": limit,
                    "limit_in_order_us": us.get("in_order"),
                    "speedup": us["plain"] / us["branchy"],
                    "spread": spread,
                    "overhead": us["branchy"] / limit,
                    "overhead_sorted": us["sorted"] / limit if batch == 1 else None,
                    "plain_accuracy": plain_accuracy,
                    "accuracy_branchy": accuracy,
                    "exit_share": [float((left == n).mean()) for n in range(1, engine.num_exits + 1)],
                    "thresholds": list(engine.policy.thresholds),
                }
            )
    return rows


def _score(engine: Engine, score: Score | None, path: str | os.PathLike[str]) -> Score:
    """The function behind the file's score, checked against what was given."""
    assert engine.policy is not None
    if isinstance(engine.policy.score, FittedScore):
        return engine.policy.score
    name = score_name(engine.policy.score)
    if score is None and name not in SCORES:
        raise InputError(
            f"{path} leaves by {name!r}, a score of your own; give that callable as score=, since the static graphs "
            "compute it too"
        )
    if score is not None and score_name(score) != name:
        raise InputError(f"{path} leaves by {name!r}, not {score_name(score)!r}; give the score it has")
    return resolve(name if score is None else score)


def _judge(engine: Engine, arrays: Arrays, target: Tensor, loss: Loss | None) -> tuple[NDArray[Any], float]:
    """The exit `(S,)` at which each sample leaves, and 1 - mean loss of the answers."""
    answer = engine.answer_all(*arrays)
    label = torch.from_numpy(answer.label)
    if loss is not None:
        return answer.exit, 1 - float(loss(torch.from_numpy(answer.output), target).mean())
    if target.is_floating_point() or target.shape != label.shape[:1] or label.dim() > 1:
        raise InputError(
            f"targets must be class indices, one a sample, for labels {tuple(label.shape)}; got {target.dtype} of "
            f"shape {tuple(target.shape)}: for other tasks give loss="
        )
    return answer.exit, 1 - int((label != target).sum()) / len(target)


def _time(
    engine: Engine, parts: dict[str, Engine], arrays: Arrays, left: NDArray[Any], batch: int, repeats: int
) -> tuple[dict[str, float], float | None]:
    """Median microseconds per sample over `repeats` passes, and the spread of the speed-up (see `ratio_spread`).

    For one sample a call, ``in_order`` runs for each the static graph of the exit at which it `left`, and ``sorted`` is
    the file where those that leave at one exit come one after the other.
    """
    starts = range(0, len(arrays[0]), batch)
    batches = [tuple(np.ascontiguousarray(a[i : i + batch]) for a in arrays) for i in starts]
    calls: dict[str, Any] = {"branchy": engine} | {name: graph.outputs for name, graph in parts.items()}
    if batch == 1:
        calls["in_order"] = [parts[f"upto_{n}"].outputs for n in left]
        calls["sorted"] = [_instead(engine, batches[i]) for i in np.argsort(left, kind="stable")]
    passes = passes_in_turns(calls, batches, repeats)
    return {name: float(np.median(us)) for name, us in passes.items()}, ratio_spread(passes["plain"], passes["branchy"])


def _instead(engine: Engine, batch: Arrays) -> Callable[..., Any]:
    """The engine's answer to this batch, whatever it is called with."""
    return lambda *_: engine(*batch)
