"""Measure the cost of each stage in the runtime that will run the network."""

from typing import Any

import numpy as np
from torch import nn

from ..argument_checks import real
from ..errors import InputError
from ..graph.precision import Precision, check_precision
from ..nn.fingerprint import fingerprint
from ..policy.exit_cost import ExitCost
from ..policy.scores import Score, resolve
from ..policy.values import Floats
from ..progress import report_progress
from .clock import until_steady
from .network_parts import device_name, network_parts
from .parts import calls_of_sizes, leaving_policies, part_outputs
from .target import Target, check_target

_FEWER = 16  # ratio of the two timed batch sizes, which give the fixed cost of a stage


def measure(
    net: nn.Module,
    example: Any,
    target: Target = Target(),
    *,
    score: str | Score = "entropy",
    seconds: float = 3.0,
    precision: Precision = "float32",
    calibration: Any = None,
    progress: bool = True,
) -> ExitCost:
    """Time every stage of a network in the runtime that will run it, and count its multiply-accumulates.

    For every exit three graphs are timed in turns: this exit alone, all exits up to it with their scores, and the
    exported network with thresholds at which all samples leave there. Differences of their medians give the times of
    trunk and branches. The cost of deciding and moving samples is counted with the branches, so that the trunk adds up
    to the plain network (for averaged exits, to all that the last exit reads).

    A batch is also timed at a sixteenth of its rows, which gives the fixed cost of a stage. Fixed costs are counted
    with the first trunk segment and the first branch, because some samples of a batch nearly always continue.

    Times are wall-clock times of calls with inputs and answers on the host. On a GPU they therefore include transfers,
    launches and waiting for the device, as in use; every timed call waits for its answers. Times of the device alone,
    between CUDA events, would leave out what an exit costs there: the host waits for the scores before it decides.

    Args:
        net: a `BranchyNet`, or any network.
        example: inputs, real ones if possible; repeated or cut to the target's batch size.
        target: the batch size, the threads and the runtime. For ``"torch"`` and ``"torch-cuda"`` the parts run in
            PyTorch as in a `TorchEngine`, on a copy of `net` if it is on another device.
        score: the score, whose cost counts with each branch.
        seconds: approximate duration, or up to four times as long while the times are not steady.
        precision: as for `export`, to time the converted network; in PyTorch, as for `TorchEngine`.
        calibration: as for `export`.
        progress: print the steps on standard error.

    Returns:
        An `ExitCost` with microseconds and multiply-accumulates per sample. If its ``spread`` is above 0.03, other
        programs kept the machine busy; measure again.

    Raises:
        InputError: a target that is not a `Target`, an unknown score, calibration batches that do not fit, a GPU that
            this machine does not have, or a batch that does not fit into its memory.
        GraphError: the network cannot be exported, cut or converted.
        MissingExtraError: OpenVINO is not installed.

    Example:
        >>> import torch
        >>> from branchynet import BranchyNet, Target, measure
        >>> from torch import nn
        >>> net = BranchyNet(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), {"1": nn.Linear(8, 3)})
        >>> cost = measure(net, torch.randn(2, 4), Target(batch_size=1), seconds=0.1, progress=False)
        >>> cost.num_exits, cost.plain_us > 0
        (2, True)
    """
    batch_size = check_target(target).batch_size
    if real("seconds", seconds) < 0:
        raise InputError(f"seconds must not be negative; got {seconds:g}")
    check_precision(precision, calibration)
    report_progress(progress, "exporting the stages")
    parts = network_parts(net, example, resolve(score), target, precision, calibration)
    sizes = two_sizes(batch_size)
    with parts.opened(part_outputs(parts) | leaving_policies(parts.num_exits), target) as calls:
        report_progress(progress, f"timing the stages in {target.runtime}: {seconds:g} s, longer if unsteady")
        times, spread = until_steady(calls_of_sizes(calls.values(), example, sizes), seconds)
    us = [dict(zip(calls, part, strict=True)) for part in np.split(np.array(times), len(sizes))]
    full, part = (_apart(us[k], parts.num_exits) for k in (0, -1))
    trunk, branch = each_row(full, part, sizes[0], sizes[-1])
    return ExitCost(
        tuple(trunk),
        tuple(branch),
        *parts.macs,
        batch_size,
        target.threads,
        fingerprint(net),
        plain_us=float(us[0]["plain"]) / batch_size,
        spread=spread,
        runtime=target.runtime,
        device=device_name(target),
    )


def two_sizes(batch_size: int) -> list[int]:
    """Return the batch sizes that `each_row` needs, the larger first; a single one for batch size 1."""
    return sorted({batch_size, max(1, batch_size // _FEWER)}, reverse=True)


def each_row(whole: Floats, part: Floats, rows: int, fewer: int) -> Floats:
    """Return microseconds per sample, `(2, N)` for trunk and branches.

    `whole` and `part` are the times of calls with `rows` and with `fewer` samples. The time of a stage is a fixed part
    plus a part in proportion to the samples that reach it. The fixed parts of all stages are counted with the first
    stage: in nearly every batch some samples continue, so every call pays them.
    """
    each = whole / rows if rows == fewer else np.clip((whole - part) / (rows - fewer), 0.0, whole / rows)
    each[:, 0] += (whole / rows - each).sum(axis=1)
    return each


def _apart(us: dict[str, float], exits: int) -> Floats:
    """Return the times of trunk segments and branches, `(2, N)`, from the times of the graphs.

    With C(n) = time of all exits up to n and A(n) = time of exit n alone, C(n) - A(n) is the cost of the branches
    before n. The trunk up to n is the rest of C(n), and the whole trunk is the plain network. The time of the deployed
    network to leave at exit n, minus C(n), is the cost of deciding at the exits up to n; it counts with their branches.
    Trunk and branches add up to the time of the deployed network, or to more if noise makes a part negative.
    """
    last = us.get("last", us["plain"])
    upto = np.array([us[f"upto_{n}"] for n in range(1, exits + 1)])
    alone = [upto[0], *(us[f"alone_{n}"] for n in range(2, exits + 1))]
    earlier = np.maximum.accumulate(np.maximum(0.0, upto - alone))
    branches = np.append(earlier[1:], earlier[-1] + max(0.0, alone[-1] - last))
    reached = np.minimum(np.maximum.accumulate(np.maximum(0.0, upto - branches)), last)
    reached[-1] = last  # by definition
    deciding = np.maximum.accumulate([max(0.0, us[f"leave_{n}"] - c) for n, c in enumerate(upto, 1)])
    rest = np.maximum.accumulate(np.maximum(0.0, upto + deciding - reached))
    return np.stack([np.diff(reached, prepend=0.0), np.diff(rest, prepend=0.0)])
