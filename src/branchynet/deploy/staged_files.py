"""The folder of a staged network: one ONNX file per stage, and ``stages.json``, which describes them."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import FileError
from ..files import read_json, read_sealed
from ..graph.lengths import Length
from ..policy.values import Policy
from ..stored_values import from_stored
from .checksum import check_seal
from .engine import METADATA_KEY, read_metadata

MANIFEST = "stages.json"
STAGE_FILES = r"stage_\d+\.onnx.*"
FORMAT = 1
_REMEDY = "copy the whole folder again, or export it again"


@dataclass(frozen=True)
class StageValue:
    """An input or output of a stage.

    Attributes:
        name: its name in the file.
        source: ``"network"``, or the number of the stage that computes it.
        dtype: numpy's name of it.
        shape: without the batch dimension, which is first; None for a free length.
        bytes: bytes per sample; None if a length is free.
    """

    name: str
    source: Literal["network"] | int
    dtype: str
    shape: tuple[int | None, ...]
    bytes: int | None


@dataclass(frozen=True)
class StageEntry:
    """One stage.

    Attributes:
        file: the name of its file.
        sha256: the checksum at the end of that file.
        exit: the number of its exit.
        score: the name of the score of the exit.
        threshold: samples with a lower score leave; None at the last exit, where all leave.
        macs: multiply-accumulates per sample; None if unknown.
        inputs: what it reads.
        outputs: ``label``, ``score``, ``output``, then what later stages read.
        lengths: the free lengths of its inputs, at the dimensions that have just this size.
    """

    file: str
    sha256: str
    exit: int
    score: str
    threshold: float | None
    macs: float | None
    inputs: tuple[StageValue, ...]
    outputs: tuple[StageValue, ...]
    lengths: tuple[Length, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """The content of ``stages.json``.

    Attributes:
        format: version of this format.
        metadata: as in an exported file: policy, labels, preprocessing, promise, fingerprint of the network.
        inputs: the inputs of the network, in the order of its arguments.
        stages: in order.
    """

    format: int
    metadata: dict[str, Any]
    inputs: tuple[StageValue, ...]
    stages: tuple[StageEntry, ...]


def read_manifest(folder: str | os.PathLike[str]) -> tuple[Manifest, dict[str, Any]]:
    """Read ``stages.json`` and compare it with the files of the stages. Returns it and the metadata.

    Raises:
        FileError: it is missing, damaged or newer than this version; or a stage is missing, damaged, or belongs to
            another export.
    """
    path = Path(folder) / MANIFEST
    stored = read_sealed(path, "stages", _REMEDY)
    if isinstance(stored, Mapping) and "sha256" not in read_json(path):
        raise FileError(f"{path} has no checksum; {_REMEDY}")
    found = stored.get("format") if isinstance(stored, Mapping) else None
    if isinstance(found, int) and found > FORMAT:
        raise FileError(f"{path} has format {found}, newer than {FORMAT}; upgrade branchynet")
    manifest = from_stored(Manifest, stored, path, "export(..., layout='stages')")
    metadata = read_metadata({METADATA_KEY: json.dumps(manifest.metadata)}, path)
    _check_order(manifest.stages, path)
    _check_policy(manifest.stages, metadata["policy"], path)
    _check_values(manifest, path)
    for n, stage in enumerate(manifest.stages, 1):
        _check_file(Path(folder) / stage.file, stage, n, folder)
    return manifest, metadata


def _check_order(stages: Sequence[StageEntry], path: Path) -> None:
    if [stage.file for stage in stages] != [f"stage_{n}.onnx" for n in range(1, len(stages) + 1)] or not stages:
        raise FileError(f"{path} does not list stage_1.onnx, stage_2.onnx, ... in order; {_REMEDY}")


def _check_policy(stages: Sequence[StageEntry], stored: Any, path: Path) -> None:
    """Raise `FileError` unless the exits and thresholds of the stages are those of the policy."""
    policy = None if stored is None else Policy.from_json(stored)
    early = [] if policy is None else [(n, t) for n, t in enumerate(policy.thresholds, 1) if t is not None]
    wanted = [*early, (None if policy is None else policy.num_exits, None)]
    if [(stage.exit, stage.threshold) for stage in stages] != wanted:
        raise FileError(f"the exits and thresholds of the stages in {path} are not those of its policy; {_REMEDY}")


def _check_values(manifest: Manifest, path: Path) -> None:
    """Raise `FileError` unless every input of a stage is an input of the network, or a value of an earlier stage."""
    known: dict[str, tuple[Any, ...]] = {v.name: ("network", v.dtype, v.shape) for v in manifest.inputs}
    for n, stage in enumerate(manifest.stages, 1):
        answers = [v.name for v in stage.outputs[:3]]
        unknown = [v.name for v in stage.inputs if known.get(v.name) != (v.source, v.dtype, v.shape)]
        if unknown or not stage.inputs or answers != ["label", "score", "output"]:
            raise FileError(f"the inputs and outputs of stage {n} in {path} do not fit the other stages; {_REMEDY}")
        known |= {v.name: (n, v.dtype, v.shape) for v in stage.outputs[3:]}


def _check_file(path: Path, stage: StageEntry, n: int, folder: str | os.PathLike[str]) -> None:
    if not path.exists():
        raise FileError(f"stage {n} of {folder} is missing: there is no {path.name}; {_REMEDY}")
    if check_seal(path) != stage.sha256:
        raise FileError(f"{path.name} in {folder} belongs to another export, or was changed since; {_REMEDY}")
