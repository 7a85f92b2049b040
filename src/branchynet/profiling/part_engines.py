"""Engines of parts of a network, whose times give the costs of its stages."""

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from ..deploy.assembly import assemble
from ..deploy.engine import Engine
from ..deploy.loading import load
from ..graph.onnx_flat import FlatGraph
from ..policy.values import Policy
from .target import Target

ALWAYS, NEVER = 3e38, -3e38  # thresholds that every score passes, and that none passes


def part_engines(
    flat: FlatGraph,
    folder: Path,
    target: Target,
    *,
    plain: FlatGraph | None = None,
    enabled: Sequence[int] | None = None,
    alone: bool = True,
) -> dict[str, Engine]:
    """Return engines of graphs without decisions, by name.

    ``plain`` is the last exit of the graph `plain`, or else of `flat`, without its score. ``upto_n`` is all enabled
    exits up to n with their scores, and ``alone_n`` exit n with its score. ``last`` is the last exit of `flat` without
    its score, if `plain` is given.
    """
    exits = enabled or range(1, flat.num_exits + 1)
    wanted = {"plain": [f"output_{(plain or flat).num_exits}"]}
    if alone and plain:
        wanted["last"] = [f"output_{flat.num_exits}"]
    for n in exits:
        wanted[f"upto_{n}"] = [f"output_{n}", *(f"score_{k}" for k in exits if k <= n)]
        if alone and n > 1:
            wanted[f"alone_{n}"] = [f"output_{n}", f"score_{n}"]
    engines = {}
    for name, outputs in wanted.items():
        graph = plain if plain and name == "plain" else flat
        engines[name] = opened(assemble(graph, None, outputs=outputs), folder / f"{name}.onnx", target)
    return engines


def leaving_engines(flat: FlatGraph, folder: Path, target: Target) -> dict[str, Engine]:
    """Return engines ``leave_n`` of the exported network, with thresholds by which every sample leaves at exit n."""
    engines = {}
    for n in range(1, flat.num_exits + 1):
        thresholds = tuple(ALWAYS if k == n else NEVER for k in range(1, flat.num_exits))
        model = assemble(flat, Policy(thresholds=thresholds))
        engines[f"leave_{n}"] = opened(model, folder / f"leave_{n}.onnx", target)
    return engines


def opened(model: ir.Model, path: Path, target: Target) -> Engine:
    """Save a model and load it for a target."""
    ir.save(model, path)
    return load(path, threads=target.threads, runtime=target.runtime)
