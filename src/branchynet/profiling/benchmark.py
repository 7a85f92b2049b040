"""Compare the speed of a network with exits and of the plain network in the same runtime."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..argument_checks import check_seed, instance, whole
from ..deploy.checksum import check_seal
from ..deploy.onnx_file import model_metadata
from ..deploy.staged_files import read_manifest
from ..errors import FileError, InputError, counted
from ..files import check_path, regular
from ..graph.precision import needs_calibration
from ..graph.torch_program import tensors_of
from ..nn.calls import first_rows
from ..nn.fingerprint import fingerprint
from ..nn.network import count_exits
from ..policy.exit_record import check_same_network
from ..policy.fitted_scores import FittedScore
from ..policy.prediction import concatenated
from ..policy.scores import SCORES, Score, resolve
from ..policy.values import Policy, score_name
from ..progress import report_progress
from .clock import passes_in_turns, ratio_spread
from .network_parts import device_name, network_parts
from .parts import Call, Parts, part_outputs
from .recording import Loss
from .target import Target, check_target

Arrays = tuple[NDArray[Any], ...]


def bench(
    path: str | os.PathLike[str],
    net: nn.Module,
    data: tuple[Any, Tensor],
    targets: Target | Sequence[Target] | None = None,
    *,
    about: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    score: Score | None = None,
    samples: int = 2048,
    repeats: int = 15,
    seed: int = 0,
    calibration: Any = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Time one exported file for one or several targets.

    For each target, the same inputs in random order go through the exported file, the plain network, and one graph
    without decisions per exit, which computes the trunk and all enabled branches up to that exit, with scores. For the
    runtimes ``"torch"`` and ``"torch-cuda"``, a `TorchEngine` with the file's policy takes the place of the file.
    Engines take turns every few calls; times are medians over repeats. ``speedup = plain / branchy``. ``limit_us`` is
    the mean time of the exits' graphs, weighted by the share of samples that leave there; ``overhead = branchy /
    limit``.

    Each graph is timed with its weights warm in the caches. With one sample per call, ``limit_in_order_us`` runs each
    sample in the graph of its exit, in the samples' order, with colder weights. ``overhead_sorted`` runs the file on
    samples sorted by exit, with weights as warm as for ``limit_us``, so an excess above 1 is due to the file alone.
    With larger batches both are None. Inputs and answers are on the host, and every call waits for its answers.

    Args:
        path: a file that `export` wrote from `net` with a policy. If its batch is fixed at 1, so is that of the graphs.
        net: the network in the file.
        data: ``(inputs, target)`` of S test samples: a tensor, or a tuple or dict of tensors; and `(S,)` int64 class
            indices, or what `loss` takes.
        targets: one or several; by default batch size 1, and 64 if the file's batch is dynamic.
        about: extra entries for the rows: ``"network"``, a name, and ``"plain_accuracy"``, the plain network's test
            accuracy.
        loss: as for `record`, ``loss(output, target) -> (B,)`` in [0, 1]; accuracy is then 1 - mean loss.
        score: the callable that the file was exported with, if its score has no name in
            `branchynet.policy.scores`.
        samples: number of inputs to time; accuracy is over all inputs.
        repeats: passes over those samples.
        seed: seed of the random order.
        calibration: for an int8 file, the samples that it was quantized with.
        progress: print what is timed, on standard error.

    Returns:
        Rows with ``network, runtime, device, batch, threads, plain_us, branchy_us, limit_us, limit_in_order_us,
        speedup, spread, overhead, overhead_sorted, plain_accuracy, accuracy_branchy, exit_share, thresholds``; times
        are microseconds per sample, and ``spread`` is the relative uncertainty of the speed-up (95%).

    Raises:
        InputError: a flat file, a file of another network, an int8 file without `calibration`, a score of your own
            without `score`, a batch size that the inputs or the file do not allow, or targets that do not fit.
        FileError: no such file, or a foreign one.

    Example:
        >>> import torch
        >>> from branchynet import BranchyNet, Policy, Target, bench, export
        >>> from torch import nn
        >>> net = BranchyNet(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), {"1": nn.Linear(8, 3)})
        >>> x, target = torch.randn(64, 4), torch.zeros(64, dtype=torch.int64)
        >>> path = export(net, "net.onnx", policy=Policy(thresholds=(0.5,)), example=x)
        >>> row = bench(path, net, (x, target), Target(batch_size=64), repeats=2, progress=False)[0]
        >>> row["batch"], row["branchy_us"] > 0
        (64, True)
    """
    check_path(path)
    targets, given = _targets(path, targets), {"network": None, "plain_accuracy": None}
    if unknown := set(about or ()) - given.keys():
        raise InputError(f"about= has unknown keys {sorted(unknown)}; only {' and '.join(given)} are allowed")
    given |= about or {}
    instance("data", data, (tuple, list), "give (inputs, target)")
    inputs, wanted = data
    metadata = _metadata(path)
    if metadata["policy"] is None:
        raise InputError(
            f"{path} was exported with policy=None and has no early exits to time; export it with a policy"
        )
    policy = Policy.from_json(metadata["policy"])
    function = _score(policy, score, path)
    arrays = tuple(t.numpy() for t in tensors_of(inputs))
    _check(path, metadata, targets, len(arrays[0]), len(wanted))
    repeats, samples = whole("repeats", repeats, 1), whole("samples", samples, 1)
    precision = _check_network(path, metadata, net, inputs, calibration)
    order = np.random.default_rng(check_seed(seed)).permutation(len(arrays[0]))
    arrays = tuple(array[order] for array in arrays)
    dynamic = metadata["batch"] == "dynamic"
    enabled = [n for n, on in enumerate(policy.enabled, 1) if on]
    known: dict[Any, Parts] = {}
    rows = []
    for alike in dict.fromkeys((target.threads, target.runtime) for target in targets):
        group = [target for target in targets if (target.threads, target.runtime) == alike]
        family = group[0].reads_files or group[0].runtime  # all runtimes of files open the same graphs
        if family not in known:
            known[family] = network_parts(
                net, first_rows(inputs), function, group[0], precision, calibration, dynamic=dynamic
            )
        parts = known[family]
        with parts.deployed(path, policy, group[0]) as engine:
            left, accuracy = _predict(engine, arrays, wanted[torch.from_numpy(order)], loss, group)
            results = {
                "plain_accuracy": given["plain_accuracy"],
                "accuracy_branchy": accuracy,
                "exit_share": [float((left == n).mean()) for n in range(1, policy.num_exits + 1)],
                "thresholds": list(policy.thresholds),
            }
            with parts.opened(part_outputs(parts, enabled, alone=False), group[0]) as calls:
                for target in group:
                    what = f"batch {target.batch_size}, {counted(target.threads, 'thread')}"
                    report_progress(progress, f"timing in {target.runtime}: {what}")
                    count = max(1, min(samples, len(order)) // target.batch_size) * target.batch_size
                    times = _row(engine, calls, tuple(a[:count] for a in arrays), enabled, target.batch_size, repeats)
                    settings = {"runtime": target.runtime, "device": device_name(target)}
                    settings |= {"batch": target.batch_size, "threads": target.threads}
                    rows.append({"network": given["network"], **settings, **times, **results})
    return rows


def _metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the metadata of a file, or of a folder of stages. Raise `FileError`."""
    if not Path(path).exists():
        raise FileError(f"there is no file {path}; write one with export(...)")
    if Path(path).is_dir():
        return read_manifest(path)[1]
    check_seal(regular(path))
    return model_metadata(path)


def _targets(path: str | os.PathLike[str], targets: Target | Sequence[Target] | None) -> list[Target]:
    """Return the targets as a list; by default those that fit the file."""
    if targets is None:
        return [Target(size) for size in ((1, 64) if _metadata(path)["batch"] == "dynamic" else (1,))]
    found = [targets] if isinstance(targets, Target) else list(targets)
    if not found:
        raise InputError("targets is empty; give at least one Target, such as Target(batch_size=64)")
    return [check_target(target) for target in found]


def _check(
    path: str | os.PathLike[str], metadata: dict[str, Any], targets: Sequence[Target], rows: int, wanted: int
) -> None:
    """Raise `InputError` for batch sizes or numbers of samples that do not fit."""
    batches = [target.batch_size for target in targets]
    if metadata["batch"] != "dynamic" and set(batches) != {1}:
        raise InputError(f"{path} takes one sample per call; got batch sizes {batches}: give batch size 1 alone")
    if max(batches) > rows:
        raise InputError(f"batch sizes must be in 1..{rows} (the number of test inputs); got {batches}")
    if wanted != rows:
        raise InputError(f"{rows} inputs need as many targets; got {wanted}")


def _check_network(
    path: str | os.PathLike[str], metadata: dict[str, Any], net: nn.Module, inputs: Any, calibration: Any
) -> str:
    """Return the precision of the file. Raise `InputError` for another network or calibration that does not fit."""
    if (exits := count_exits(net, inputs)) != metadata["exits"]:
        raise InputError(
            f"{path} has {metadata['exits']} exits and the network has {exits}; give the network that was exported"
        )
    precision = (metadata.get("precision") or {}).get("scheme", "float32")
    if needs_calibration(precision) != (calibration is not None):
        remedy = "int8: give calibration=, the samples it was quantized with"
        remedy = f"{precision}: leave calibration= out" if calibration is not None else remedy
        raise InputError(f"{path} is {remedy}, because the graphs that it is compared with are converted like it")
    expected = fingerprint(net) + ("" if precision == "float32" else f"-{precision}")
    check_same_network(f"{path} and net", metadata.get("network"), expected)
    return precision


def _row(
    engine: Call, parts: Mapping[str, Call], arrays: Arrays, enabled: Sequence[int], batch: int, repeats: int
) -> dict[str, float | None]:
    """Return the times of one row, and their ratios."""
    # At another batch size, ties may leave at other exits.
    chunks = range(0, len(arrays[0]), batch)
    left = np.concatenate([engine(*(a[i : i + batch] for a in arrays)).exit for i in chunks])
    us, spread = _time(engine, parts, arrays, left, batch, repeats)
    limit = sum(float((left == n).mean()) * us[f"upto_{n}"] for n in enabled)
    return {
        "plain_us": us["plain"],
        "branchy_us": us["branchy"],
        "limit_us": limit,
        "limit_in_order_us": us.get("in_order"),
        "speedup": us["plain"] / us["branchy"],
        "spread": spread,
        "overhead": us["branchy"] / limit,
        "overhead_sorted": us["sorted"] / limit if batch == 1 else None,
    }


def _score(policy: Policy, score: Score | None, path: str | os.PathLike[str]) -> Score:
    """Return the function of the file's score. Raise `InputError` if `score` is another one."""
    if isinstance(policy.score, FittedScore):
        return policy.score
    name = score_name(policy.score)
    if score is None and name not in SCORES:
        raise InputError(
            f"{path} uses the score {name!r}, one of your own; give that callable as score=, because the graphs that "
            "the file is compared with compute it too"
        )
    if score is not None and score_name(score) != name:
        raise InputError(f"{path} uses the score {name!r}, not {score_name(score)!r}; give the score of the file")
    return resolve(name if score is None else score)


def _predict(
    engine: Call, arrays: Arrays, target: Tensor, loss: Loss | None, targets: Sequence[Target]
) -> tuple[NDArray[Any], float]:
    """Return the exit `(S,)` of each sample, and 1 - mean loss of the predictions, in calls of the largest batch."""
    rows = max(target.batch_size for target in targets)
    starts = range(0, len(arrays[0]), rows)
    answer = concatenated([engine(*(a[start : start + rows] for a in arrays)) for start in starts])
    label = torch.from_numpy(answer.label)
    if loss is not None:
        return answer.exit, 1 - float(loss(torch.from_numpy(answer.output), target).mean())
    if target.is_floating_point() or target.shape != label.shape[:1] or label.dim() > 1:
        raise InputError(
            f"targets must be class indices, one per sample, for labels {tuple(label.shape)}; got {target.dtype} of "
            f"shape {tuple(target.shape)}: for other tasks give loss="
        )
    return answer.exit, 1 - int((label != target).sum()) / len(target)


def _time(
    engine: Call, parts: Mapping[str, Call], arrays: Arrays, left: NDArray[Any], batch: int, repeats: int
) -> tuple[dict[str, float], float | None]:
    """Return median microseconds per sample over `repeats` passes, and the spread of the speed-up.

    With one sample per call, ``in_order`` and ``sorted`` are as described in `bench`.
    """
    starts = range(0, len(arrays[0]), batch)
    batches = [tuple(np.ascontiguousarray(a[i : i + batch]) for a in arrays) for i in starts]
    calls: dict[str, Any] = {"branchy": engine, **parts}
    if batch == 1:
        calls["in_order"] = [parts[f"upto_{n}"] for n in left]
        by_exit = [batches[i] for i in np.argsort(left, kind="stable")]
        calls["sorted"] = [lambda *_, b=batch: engine(*b) for batch in by_exit]
    passes = passes_in_turns(calls, batches, repeats)
    return {name: float(np.median(us)) for name, us in passes.items()}, ratio_spread(passes["plain"], passes["branchy"])
