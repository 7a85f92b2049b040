"""What each stage costs, measured in the deployment engine with everything inside the clock."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..arguments import real
from ..errors import InputError, as_graph_errors
from ..graph.macs import exit_macs
from ..graph.onnx_flat import flatten
from ..graph.quantize import Quantize, calibration_batches, check_quantize, quantized
from ..graph.torch_program import tensors_of
from ..nn.fingerprint import fingerprint
from ..nn.network import plain_network
from ..policy.scores import Score, resolve
from ..policy.values import ExitCost, Floats
from .clock import until_steady
from .part_engines import leaving_engines, part_engines
from .target import Target, check_target

_FEWER = 16  # of so many rows one, to tell a stage's fixed part: few rows reach the later stages


def measure(
    net: nn.Module,
    example: Any,
    target: Target = Target(),
    *,
    score: str | Score = "entropy",
    seconds: float = 3.0,
    quantize: Quantize | None = None,
    calibration: Any = None,
) -> ExitCost:
    """Time every stage of a network in the runtime that will run it, and count its multiply-accumulates.

    For every exit three graphs are timed, interleaved: one that computes this exit alone, one that computes all exits
    up to it, scores included, and the network as `export` writes it where all samples leave at that exit. Their
    differences give trunk and branches apart; what deciding and moving samples take is counted with the branches, so
    that the trunk adds up to the plain network (of averaged answers to all that the last one reads). Medians are taken.

    A batch is timed at a sixteenth of its rows too, which tells what a stage takes however few rows reach it. Those
    fixed parts are counted with the first segment and the first branch: of a batch, some rows nearly always go on.

    Args:
        net: a `BranchyNet`, or any network.
        example: inputs, real ones if possible; repeated or cut to the target's batch size.
        target: the batch size, the threads and the runtime of the deployed file.
        score: counted with each branch.
        seconds: about how long to measure; up to four times as long while the times are not steady.
        quantize: as for `export`: time the int8 network.
        calibration: as for `export`.

    Returns:
        An `ExitCost` with microseconds and multiply-accumulates a sample. Its ``spread`` tells how steady the times
        were: above 0.03 something else kept the machine busy, and it is worth measuring again.

    Raises:
        InputError: a target that is no `Target`, an unknown score, or calibration batches that do not fit.
        GraphError: the network cannot be exported, cut or quantised.
        MissingExtraError: OpenVINO is not installed.
    """
    batch_size = check_target(target).batch_size
    if real("seconds", seconds) < 0:
        raise InputError(f"seconds must not be negative; got {seconds:g}")
    check_quantize(quantize, calibration)
    flat = flatten(net, example, score=resolve(score))
    trunk_macs, branch_macs = exit_macs(flat)
    alone = plain_network(net)
    plain = None if alone is net else flatten(alone, example)
    if quantize:
        flat = quantized(flat, calibration_batches(calibration, flat), quantize)
        plain = plain and quantized(plain, calibration_batches(calibration, plain), quantize)
    sizes = two_sizes(batch_size)
    with tempfile.TemporaryDirectory() as folder, as_graph_errors():
        parts = part_engines(flat, Path(folder), target, plain=plain)
        leaving = leaving_engines(flat, Path(folder), target)
        calls = {name: engine.outputs for name, engine in parts.items()} | leaving
        inputs = tensors_of(example)
        batches = [[np.resize(t.numpy(), (rows, *t.shape[1:])) for t in inputs] for rows in sizes]
        timed = [lambda c=call, b=batch: c(*b) for batch in batches for call in calls.values()]
        times, spread = until_steady(timed, seconds)
    us = [dict(zip(calls, part, strict=True)) for part in np.split(np.array(times), len(sizes))]
    full, part = (_apart(us[k], flat.num_exits) for k in (0, -1))
    trunk, branch = each_row(full, part, sizes[0], sizes[-1])
    return ExitCost(
        tuple(trunk),
        tuple(branch),
        trunk_macs,
        branch_macs,
        batch_size,
        target.threads,
        fingerprint(net),
        plain_us=float(us[0]["plain"]) / batch_size,
        spread=spread,
    )


def two_sizes(batch_size: int) -> list[int]:
    """The batch sizes that `each_row` needs, the larger first; one alone for one sample a call."""
    return sorted({batch_size, max(1, batch_size // _FEWER)}, reverse=True)


def each_row(whole: Floats, part: Floats, rows: int, fewer: int) -> Floats:
    """Microseconds a sample from those of calls of `rows` samples and of `fewer`: `(2, N)`, trunk and branches.

    What a stage takes is a fixed part and one in proportion to the samples that reach it. The fixed parts are counted
    with the first stage, since of several samples one nearly always goes on.
    """
    each = whole / rows if rows == fewer else np.clip((whole - part) / (rows - fewer), 0.0, whole / rows)
    each[:, 0] += (whole / rows - each).sum(axis=1)
    return each


def _apart(us: dict[str, float], exits: int) -> Floats:
    """`(2, N)`: trunk segments and branches from the times of the graphs.

    With C(n) = time of all exits up to n and A(n) = time of exit n alone, C(n) - A(n) is what the branches before n
    cost; the trunk up to n is what is left of C(n), and the whole trunk is the plain network. What the deployed network
    takes beyond C(n) to leave at exit n is for deciding at the exits up to n, and is added to their branches. So trunk
    and branches add up to what the deployed network takes, or to more where noise would make a part negative.
    """
    last = us.get("last", us["plain"])
    upto = np.array([us[f"upto_{n}"] for n in range(1, exits + 1)])
    alone = [upto[0], *(us[f"alone_{n}"] for n in range(2, exits + 1))]
    earlier = np.maximum.accumulate(np.maximum(0.0, upto - alone))
    branches = np.append(earlier[1:], earlier[-1] + max(0.0, alone[-1] - last))
    reached = np.minimum(np.maximum.accumulate(np.maximum(0.0, upto - branches)), last)
    reached[-1] = last  # whatever the clock says of its parts, the trunk is the plain network
    deciding = np.maximum.accumulate([max(0.0, us[f"leave_{n}"] - c) for n, c in enumerate(upto, 1)])
    beside = np.maximum.accumulate(np.maximum(0.0, upto + deciding - reached))
    return np.stack([np.diff(reached, prepend=0.0), np.diff(beside, prepend=0.0)])
