"""The ONNX Runtime engine: one exported file, numpy in and out."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ..errors import FileError, InputError
from ..types import Policy, Prediction

FORMAT = 1
METADATA_KEY = "branchynet"
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True)
class Input:
    """One input of the network: its name, numpy dtype, and shape without the batch (None where a length is free)."""

    name: str
    dtype: Any
    shape: tuple[int | None, ...]

    def accepts(self, array: Any) -> bool:
        """Whether `array` has this dtype and this shape behind its batch dimension."""
        if not isinstance(array, np.ndarray) or array.dtype != self.dtype or array.ndim != len(self.shape) + 1:
            return False
        return array.shape[1:] == self.shape or all(
            want is None or have == want for have, want in zip(array.shape[1:], self.shape, strict=True)
        )

    def __str__(self) -> str:
        """Such as ``x: float32 (B, 1, 28, 28)``."""
        dims = ", ".join(["B", *("?" if d is None else str(d) for d in self.shape)])
        return f"{self.name}: {np.dtype(self.dtype).name} ({dims})"


class Engine:
    """An exported network, ready to answer. Made by `load`.

    Calls are thread-safe: an engine holds no state between calls, and ONNX Runtime sessions may run concurrently.

    Attributes:
        inputs: what the network reads.
        policy: score and default thresholds; None for a flat file (exported with ``policy=None``).
        exits: N.
        labels: class names, or () where none were given.
        metadata: all that the file says of itself.
    """

    def __init__(self, session: onnxruntime.InferenceSession, metadata: dict[str, Any]) -> None:
        self._run: Any = session.run  # typed as sparse tensors and maps too, which our files never hold
        self.metadata = metadata
        self.policy = None if metadata["policy"] is None else Policy.from_json(metadata["policy"])
        self.exits: int = metadata["exits"]
        self.labels: tuple[str, ...] = tuple(metadata["labels"])
        self._names = [output.name for output in session.get_outputs()]
        self._fixed_batch = metadata["batch"] == 1
        self.inputs = tuple(
            Input(i.name, _DTYPES.get(i.type, i.type), tuple(d if isinstance(d, int) else None for d in i.shape[1:]))
            for i in session.get_inputs()
            if not re.fullmatch(r"threshold_\d+", i.name)
        )
        thresholds = self.policy.thresholds if self.policy else ()
        required = metadata["thresholds"] == "input"
        self._defaults = _threshold_feeds(thresholds) if required else {}

    def __call__(self, *inputs: NDArray[Any], thresholds: Sequence[float | None] | None = None) -> Prediction:
        """Answer a batch of any size, zero included, each sample at the first exit that is sure enough.

        Args:
            inputs: arrays as `inputs` says, all with the same leading batch size B.
            thresholds: N-1 figures to use in this call instead of the file's own; None at an exit means never leave
                there.

        Raises:
            InputError: wrong number, shape or dtype of inputs, or wrong number of thresholds.
        """
        if self.policy is None:
            if thresholds is not None:
                raise InputError("this file was exported with policy=None and has no thresholds; export it with a policy")
            results = self.outputs(*inputs)
            rows = len(results[0])
            return Prediction(results[0], np.full(rows, self.exits), np.full(rows, np.nan, np.float32), results[-1])
        feeds = self._feeds(inputs)
        feeds.update(self._defaults if thresholds is None else self._override(thresholds))
        if not len(inputs[0]):
            return Prediction(*self._empty())
        return Prediction(*self._run(self._names, feeds))

    def outputs(self, *inputs: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """The graph's outputs in the order of the file: for a flat file ``(label, output_1, ..., output_N)``."""
        feeds = self._feeds(inputs)
        feeds.update(self._defaults)
        if not len(inputs[0]):
            return self._empty()
        return tuple(self._run(self._names, feeds))

    def _feeds(self, inputs: tuple[NDArray[Any], ...]) -> dict[str, NDArray[Any]]:
        if len(inputs) != len(self.inputs):
            raise InputError(f"{len(inputs)} inputs given; the network reads {len(self.inputs)}: {self._expected()}")
        feeds = {}
        for given, wanted in zip(inputs, self.inputs, strict=True):
            if not wanted.accepts(given):
                have = f"{given.dtype} {given.shape}" if isinstance(given, np.ndarray) else type(given).__name__
                raise InputError(f"input {wanted.name!r} is {have}; the network reads {self._expected()}")
            feeds[wanted.name] = given
        rows = len(inputs[0])
        if any(len(given) != rows for given in inputs):
            raise InputError(f"the inputs have batch sizes {[len(given) for given in inputs]}; they must agree")
        if self._fixed_batch and rows > 1:
            raise InputError(f"this file answers one sample at a time, got {rows}; export with batch='dynamic'")
        return feeds

    def _expected(self) -> str:
        return "; ".join(str(i) for i in self.inputs)

    def _override(self, thresholds: Sequence[float | None]) -> dict[str, NDArray[Any]]:
        assert self.policy is not None
        try:
            thresholds = [None if t is None else float(t) for t in thresholds]
        except (TypeError, ValueError):
            raise InputError(f"thresholds must be a list of numbers, or None for never; got {thresholds!r}") from None
        if len(thresholds) != self.exits - 1:
            raise InputError(f"{len(thresholds)} thresholds given for {self.exits} exits; give {self.exits - 1}")
        if any(t is not None and math.isnan(t) for t in thresholds):
            raise InputError(f"thresholds must be numbers, or None for never; got {thresholds}")
        for n, (given, own) in enumerate(zip(thresholds, self.policy.thresholds, strict=True), 1):
            if own is None and given is not None:
                raise InputError(
                    f"exit {n} was left out of this file (its threshold was never); give None for it, or export again"
                )
        return _threshold_feeds(
            tuple(
                None if own is None else (-math.inf if given is None else given)
                for given, own in zip(thresholds, self.policy.thresholds, strict=True)
            )
        )

    def _empty(self) -> tuple[NDArray[Any], ...]:
        tail = tuple(self.metadata["output_shape"])
        label = np.empty((0, *tail[1:]), np.int64)
        if self.policy is None:
            return (label, *(np.empty((0, *tail), np.float32) for _ in self._names[1:]))
        return label, np.empty(0, np.int64), np.empty(0, np.float32), np.empty((0, *tail), np.float32)


def load(path: str | os.PathLike[str], threads: int | None = None, providers: Sequence[str] | None = None) -> Engine:
    """Open a file that `export` wrote.

    Args:
        path: the ``.onnx`` file.
        threads: threads within an operator; by default as many as ONNX Runtime chooses.
        providers: ONNX Runtime execution providers, in order of preference; by default the CPU.

    Raises:
        FileError: no such file, or it is truncated, or BranchyNet did not write it.
        InputError: threads below 1, or a provider that this build of ONNX Runtime does not have.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads must be at least 1; got {threads}")
    providers = [providers] if isinstance(providers, str) else list(providers or ["CPUExecutionProvider"])
    missing = [p for p in providers if p not in onnxruntime.get_available_providers()]
    if missing:
        raise InputError(f"ONNX Runtime here has no {missing[0]!r}; it has {onnxruntime.get_available_providers()}")
    if not Path(path).is_file():
        raise FileError(f"there is no file {path}; write one with export(...) or `branchynet export`")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # thresholds are inputs with defaults on purpose; the runtime warns of each
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime's errors share no base class of their own
        raise FileError(
            f"{path} is no ONNX file that ONNX Runtime can open ({_brief(error)}); export it again"
        ) from error
    return Engine(session, read_metadata(session.get_modelmeta().custom_metadata_map, path))


def read_metadata(properties: dict[str, str], path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `export` wrote into the file. Raises `FileError` for a foreign file or one of a later format."""
    if METADATA_KEY not in properties:
        raise FileError(f"{path} was not written by BranchyNet (it has no {METADATA_KEY!r} metadata); use export(...)")
    try:
        metadata = json.loads(properties[METADATA_KEY])
        newer = metadata["format"] > FORMAT
    except (ValueError, TypeError, KeyError) as error:
        raise FileError(f"the metadata of {path} cannot be read ({error!r}); export it again") from error
    if newer:
        raise FileError(f"{path} has format {metadata['format']}, newer than {FORMAT}; upgrade branchynet")
    return metadata


def _threshold_feeds(thresholds: Sequence[float | None]) -> dict[str, NDArray[Any]]:
    with np.errstate(over="ignore"):  # beyond float32 is infinite
        return {
            f"threshold_{n}": np.array([t], np.float64).astype(np.float32)
            for n, t in enumerate(thresholds, 1)
            if t is not None
        }


def _brief(error: Exception) -> str:
    text = str(error).splitlines()
    return text[0][:200] if text else type(error).__name__
