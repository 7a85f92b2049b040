"""Samples stored in a file with the outputs of its exits, for a comparison on another machine."""

import base64
import io
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ..argument_checks import has_sizes
from ..array_files import read_arrays
from ..errors import FileError
from ..onnx_files import entries, parse_model
from .engine import Engine

SAMPLES_KEY = "branchynet.samples"
MAX_SAMPLES = 8
_BYTES, _MOST_BYTES = 2**20, 2**24  # for all stored samples, and for a single one
_MOST_UNPACKED = 2**26  # `pack` writes one sample, or several of 1 MiB in total, and slack of at most twice that size
_FAR = 10  # limit of mean differences of scores, relative to the largest stored score


@dataclass(frozen=True)
class Samples:
    """Samples and the expected outputs of every exit.

    Attributes:
        inputs: `(S, ...)` each, in the order of the file's inputs.
        outputs: `(S, C, ...)` per exit.
        scores: `(S,)` per exit; () for a flat file.
        slack: `(N, C)` mean difference from float32, per exit and column of its output, or `(N, 1)` per exit;
            0 for a float32 network.
        score_slack: mean difference of scores, per exit.
    """

    inputs: tuple[NDArray[Any], ...]
    outputs: tuple[NDArray[Any], ...]
    scores: tuple[NDArray[Any], ...]
    slack: NDArray[Any]
    score_slack: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.inputs[0])


def pack(samples: Samples, kept: Sequence[int], limit: int) -> str:
    """Return at most `limit` samples, with the exits `kept` (from 1), as text; "" if a single sample is too large."""
    arrays = {f"input_{i}": a for i, a in enumerate(samples.inputs)}
    arrays |= {f"output_{n}": samples.outputs[n - 1] for n in kept}
    arrays |= {f"score_{n}": samples.scores[n - 1] for n in kept if samples.scores}
    each = max(1, sum(a.nbytes for a in arrays.values()) // max(1, len(samples)))
    rows = min(limit, len(samples), max(1, _BYTES // each))
    if rows < 1 or each > _MOST_BYTES:
        return ""
    buffer = io.BytesIO()
    stored: dict[str, Any] = {name: a[:rows] for name, a in arrays.items()}
    stored |= {"slack": samples.slack, "score_slack": np.array(samples.score_slack)}
    np.savez_compressed(buffer, **stored)
    return base64.b64encode(buffer.getvalue()).decode()


def read_samples(path: str | os.PathLike[str]) -> Samples:
    """Read the samples in a file. Raise `FileError` if it holds none, or damaged ones."""
    return samples_in(parse_model(path), path)


def samples_in(model: onnx.ModelProto, path: str | os.PathLike[str], engine: Engine | None = None) -> Samples:
    """Like `read_samples`, for a model that has been read. Samples that do not fit `engine` are damaged too."""
    text = entries(model, path).get(SAMPLES_KEY, "")
    if not text:
        raise FileError(f"{path} holds no samples to verify it with; export it again, with samples=8")
    try:
        found = _unpack(base64.b64decode(text, validate=True))
        if engine is not None:
            _check_fit(found, engine)
    except (
        ValueError,
        KeyError,
        OSError,
        EOFError,
        RuntimeError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise FileError(f"the samples in {path} cannot be read ({error}); export it again") from error
    return found


def _unpack(content: bytes) -> Samples:
    arrays = read_arrays(io.BytesIO(content), _MOST_UNPACKED)
    slack, score_slack = arrays["slack"], arrays["score_slack"]
    for name, array, most in (("slack", slack, 2), ("score_slack", score_slack, 1)):
        if not 1 <= array.ndim <= most or array.dtype.kind != "f" or not (np.isfinite(array) & (array >= 0)).all():
            raise ValueError(f"{name} is {array.dtype} {array.shape}, not one number per exit")
    exits, inputs = len(slack), sum(name.startswith("input_") for name in arrays)
    return Samples(
        tuple(arrays[f"input_{i}"] for i in range(inputs)),
        tuple(arrays.get(f"output_{n}", np.empty(0)) for n in range(1, exits + 1)),
        tuple(arrays.get(f"score_{n}", np.empty(0)) for n in range(1, exits + 1) if f"score_{exits}" in arrays),
        slack.reshape(exits, -1),  # in earlier files one number per exit
        tuple(score_slack.tolist()),
    )


def _check_fit(samples: Samples, engine: Engine) -> None:
    """Raise `ValueError` for samples that do not belong to this engine's file."""
    if len(samples.slack) != engine.num_exits or len(samples.score_slack) != engine.num_exits:
        raise ValueError(
            f"they have slack for {len(samples.slack)} exits and {len(samples.score_slack)} scores, but the file "
            f"expects {engine.num_exits} exits"
        )
    if len(samples.inputs) != len(engine.inputs):
        raise ValueError(f"they have {len(samples.inputs)} inputs, but the file expects {len(engine.inputs)}")
    for array, want in zip(samples.inputs, engine.inputs, strict=True):
        if not want.accepts(array):
            raise ValueError(f"input {want.name!r} is {want.describe(array)}, but the file expects {want}")
    rows = len(samples)
    if rows < 1 or any(len(array) != rows for array in samples.inputs):
        raise ValueError(f"their inputs have {[len(array) for array in samples.inputs]} rows")
    if bool(samples.scores) != (engine.policy is not None):
        raise ValueError("they belong to a flat file" if engine.policy else "they belong to a file with early exits")
    tail = tuple(engine.metadata["output_shape"])
    for n in range(1, engine.num_exits + 1):
        if engine.policy is None or engine.policy.enabled[n - 1]:
            _check_array(f"output {n}", samples.outputs[n - 1], (rows, *tail))
            if samples.scores:
                _check_array(f"score {n}", samples.scores[n - 1], (rows,))
    _check_slack(samples, engine)


def _check_array(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Raise `ValueError` unless `array` holds floats in this shape; 0 means any size."""
    if array.dtype.kind != "f" or not has_sizes(array.shape, [size or None for size in shape]):
        raise ValueError(f"{name} is {array.dtype} {array.shape}, not floats {shape}")


def _check_slack(samples: Samples, engine: Engine) -> None:
    """Raise `ValueError` for slack that `export` does not write, which would let wrong outputs pass."""
    precision = engine.metadata.get("precision")
    report: Any = precision.get("mean_difference") if precision else [0.0] * engine.num_exits
    mean, columns = samples.slack.mean(axis=1), samples.slack.shape[1]
    numbers = isinstance(report, list) and len(report) == len(mean) and {*map(type, report)} <= {float, int}
    if not (numbers and np.allclose(mean, report, 1e-6, 0) and columns in (1, engine.metadata["output_shape"][0])):
        raise ValueError(f"slack is {samples.slack.tolist()}, but the metadata has a mean difference of {report}")
    for n, slack in enumerate(samples.score_slack, 1):
        most = 0.0
        if precision and samples.scores:
            scores = samples.scores[n - 1]
            most = _FAR * float(np.abs(scores[np.isfinite(scores)]).max(initial=1.0))
        if slack > most:
            raise ValueError(f"the slack of score {n} is {slack:.3g}, above {most:.3g}")
