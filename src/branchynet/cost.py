"""What each stage costs, measured in the deployment engine with everything inside the clock."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from torch import nn

from . import scores
from .engine.exported import Engine
from .engine.onnx import load
from .errors import InputError
from .export import assemble
from .fingerprint import fingerprint
from .graph.flat import FlatGraph, flatten, tensors_of
from .graph.macs import exit_macs
from .graph.quantize import calibration_batches, check_quantize, quantized
from .scores import Score
from .timing import interleaved
from .types import ExitCost


def measure(
    net: nn.Module,
    example: Any,
    *,
    batch_size: int = 1,
    threads: int = 1,
    score: str | Score = "entropy",
    seconds: float = 3.0,
    runtime: Literal["onnxruntime", "openvino"] = "onnxruntime",
    quantize: Literal["int8"] | None = None,
    calibration: Any = None,
) -> ExitCost:
    """Time every stage of a network in the runtime that will run it, and count its multiply-accumulates.

    Static graphs are timed, interleaved: for every exit, one that computes this exit alone and one that computes all
    exits up to it, scores included. Their differences give trunk and branches apart; medians are taken.

    Args:
        net: a `BranchyNet`, or any network.
        example: inputs, real ones if possible; repeated or cut to `batch_size` rows.
        batch_size: rows a call.
        threads: threads within an operator.
        score: counted with each branch.
        seconds: about how long to measure.
        runtime: as for `load`.
        quantize: as for `export`: time the int8 network.
        calibration: as for `export`.

    Returns:
        An `ExitCost` with microseconds and multiply-accumulates a sample.

    Raises:
        InputError: batch_size or threads below 1, an unknown runtime, or calibration batches that do not fit.
        GraphError: the network cannot be exported or quantised.
        MissingExtraError: OpenVINO is not installed.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1; got {batch_size}")
    check_quantize(quantize, calibration)
    flat = flatten(net, example, score=scores.resolve(score))
    trunk_macs, branch_macs = exit_macs(flat)
    if quantize:
        flat = quantized(flat, calibration_batches(calibration, flat))
    batch = [np.resize(t.numpy(), (batch_size, *t.shape[1:])) for t in tensors_of(example)]
    with tempfile.TemporaryDirectory() as folder:
        engines = static_engines(flat, Path(folder), threads, runtime=runtime)
        times = interleaved([lambda e=e: e.outputs(*batch) for e in engines.values()], seconds)
    us = {name: t / batch_size for name, t in zip(engines, times, strict=True)}
    trunk, branch = _apart(us, flat.exits)
    return ExitCost(trunk, branch, trunk_macs, branch_macs, batch_size, threads, fingerprint(net))


def static_engines(
    flat: FlatGraph,
    folder: Path,
    threads: int,
    *,
    plain: FlatGraph | None = None,
    enabled: Sequence[int] | None = None,
    alone: bool = True,
    runtime: Literal["onnxruntime", "openvino"] = "onnxruntime",
) -> dict[str, Engine]:
    """Engines of static graphs, by name.

    ``plain`` is the last exit of the graph `plain`, or of `flat`, without its score; ``upto_n`` all enabled exits up to
    n with their scores; ``alone_n`` exit n with its score.
    """
    plain = plain or flat
    exits = enabled or range(1, flat.exits + 1)
    wanted = {"plain": [f"output_{plain.exits}"]}
    for n in exits:
        wanted[f"upto_{n}"] = [f"output_{n}", *(f"score_{k}" for k in exits if k <= n)]
        if alone and n > 1:
            wanted[f"alone_{n}"] = [f"output_{n}", f"score_{n}"]
    engines = {}
    for name, outputs in wanted.items():
        graph = plain if name == "plain" else flat
        ir.save(assemble(graph, None, outputs=outputs), folder / f"{name}.onnx")
        engines[name] = load(folder / f"{name}.onnx", threads=threads, runtime=runtime)
    return engines


def _apart(us: dict[str, float], exits: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Trunk segments and branches from the times of the static graphs.

    With C(n) = time of all exits up to n and A(n) = time of exit n alone, C(n) - A(n) is what the branches before n
    cost; the trunk up to n is what is left of C(n), so that the sum over all branches gives C(n) back.
    """
    upto = [us[f"upto_{n}"] for n in range(1, exits + 1)]
    alone = [upto[0], *(us[f"alone_{n}"] for n in range(2, exits + 1))]
    earlier = np.maximum.accumulate([max(0.0, c - a) for c, a in zip(upto, alone, strict=True)])
    branch = [*np.diff(earlier), max(0.0, alone[-1] - us["plain"])]
    reached = np.maximum.accumulate(np.maximum(0.0, np.array(upto) - np.cumsum(branch)))
    trunk = np.diff(reached, prepend=0.0)
    return tuple(float(t) for t in trunk), tuple(float(b) for b in branch)
