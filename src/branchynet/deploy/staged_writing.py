"""Write a staged network: one ONNX file per stage, and ``stages.json``."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..errors import as_graph_errors
from ..files import write_sealed
from ..graph.lengths import Length
from ..graph.macs import graph_macs
from ..graph.onnx_builder import BATCH
from ..graph.onnx_flat import FlatGraph
from ..graph.onnx_layout import keep_blocks
from ..graph.onnx_padding import keep_zero_padding
from ..graph.onnx_stages import StageGraph, write_stages
from ..policy.values import Policy, score_name
from .assembly import about
from .checksum import check_seal
from .engine import METADATA_KEY
from .model_file import save_model
from .staged_files import FORMAT, MANIFEST, Manifest, StageEntry, StageValue
from .stored_samples import SAMPLES_KEY


def save_stages(
    folder: Path, flat: FlatGraph, policy: Policy, *, notes: Mapping[str, Any] | None = None, samples: str = ""
) -> None:
    """Write all files of a staged network into an empty folder.

    Args:
        folder: the folder.
        flat: a flat graph with scores.
        policy: score and thresholds.
        notes: labels, preprocessing and promise, as for `export`.
        samples: samples to verify the files with, as `pack` returns them.

    Raises:
        GraphError: the graph cannot be cut.
    """
    metadata = {**about(flat, policy, "default", notes), "per_sample": True}
    with as_graph_errors():
        stages = write_stages(flat, policy)
        for stage in stages:
            keep_blocks(stage.model)
            keep_zero_padding(stage.model)
    entries = []
    for n, stage in enumerate(stages, 1):
        stage.model.metadata_props[METADATA_KEY] = json.dumps({**metadata, "stage": n})
        if samples and n == 1:
            stage.model.metadata_props[SAMPLES_KEY] = samples
        path = folder / f"stage_{n}.onnx"
        save_model(stage.model, path)
        entries.append(_entry(stage, n, path, policy, flat.lengths))
    inputs = tuple(_value(value, "network") for value in flat.model.graph.inputs)
    write_sealed(
        folder / MANIFEST, "stages", json.loads(json.dumps(asdict(Manifest(FORMAT, metadata, inputs, tuple(entries)))))
    )


def _entry(stage: StageGraph, n: int, path: Path, policy: Policy, lengths: Sequence[Length]) -> StageEntry:
    graph, macs = stage.model.graph, graph_macs(stage.model.graph)
    last = stage.exit == policy.num_exits
    return StageEntry(
        path.name,
        check_seal(path) or "",
        stage.exit,
        score_name(policy.score),
        None if last else policy.thresholds[stage.exit - 1],
        None if math.isnan(macs) else macs,
        tuple(_value(value, stage.sources[str(value.name)] or "network") for value in graph.inputs),
        tuple(_value(value, n) for value in graph.outputs),
        tuple(replace(one, at=at) for one in lengths if (at := _places(graph.inputs, one.name))),
    )


def _places(values: Sequence[ir.Value], length: str) -> tuple[tuple[str, int], ...]:
    """Return the dimensions that have just this length."""
    dims = [(str(value.name), axis, dim) for value in values for axis, dim in enumerate(value.shape or ())]
    return tuple((name, axis) for name, axis, dim in dims if not isinstance(dim, int) and dim.value == length)


def _value(value: ir.Value, source: Any) -> StageValue:
    assert value.dtype is not None and value.shape is not None
    known = [d if isinstance(d, int) else d.evaluate({BATCH: 1}) for d in value.shape]
    shape = tuple(d if isinstance(d, int) else None for d in known[1:])
    size = None if None in shape else math.ceil(value.dtype.itemsize * math.prod(d for d in shape if d is not None))
    return StageValue(str(value.name), source, value.dtype.numpy().name, shape, size)
