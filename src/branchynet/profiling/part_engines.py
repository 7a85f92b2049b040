"""Engines of parts of a network, which are timed to tell the costs of its stages apart."""

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from ..deploy.assembly import assemble
from ..deploy.engine import Engine
from ..deploy.loading import load
from ..graph.onnx_flat import FlatGraph
from ..policy.values import Policy
from .target import Target

ALWAYS, NEVER = 3e38, -3e38  # thresholds that every score passes, and none


def part_engines(
    flat: FlatGraph,
    folder: Path,
    target: Target,
    *,
    plain: FlatGraph | None = None,
    enabled: Sequence[int] | None = None,
    alone: bool = True,
) -> dict[str, Engine]:
    """Engines of static graphs, by name.

    ``plain`` is the last exit of the graph `plain`, or of `flat`, without its score; ``upto_n`` all enabled exits up to
    n with their scores; ``alone_n`` exit n with its score, and ``last`` the last one without, where ``plain`` is not.
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
        ir.save(assemble(graph, None, outputs=outputs), folder / f"{name}.onnx")
        engines[name] = load(folder / f"{name}.onnx", threads=target.threads, runtime=target.runtime)
    return engines


def leaving_engines(flat: FlatGraph, folder: Path, target: Target) -> dict[str, Engine]:
    """``leave_n``: the network as it is deployed, with thresholds by which every sample leaves at exit n."""
    engines = {}
    for n in range(1, flat.num_exits + 1):
        thresholds = tuple(ALWAYS if k == n else NEVER for k in range(1, flat.num_exits))
        path = folder / f"leave_{n}.onnx"
        ir.save(assemble(flat, Policy(thresholds=thresholds)), path)
        engines[path.stem] = load(path, threads=target.threads, runtime=target.runtime)
    return engines
