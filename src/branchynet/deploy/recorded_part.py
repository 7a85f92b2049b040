"""Run a part of a network without decisions on fixed memory: one CUDA graph per batch size.

Shape letters: R rows of a call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from ..graph.torch_stages import Stage
from .eager_stages import as_tensor
from .memory import largest_fitting
from .recorder import Recorder, Replay


@dataclass(frozen=True, eq=False)
class _Size:
    """The memory of one batch size: inputs and their pinned copies, results, and label and output on the host."""

    inputs: dict[str, Tensor]
    staging: dict[str, Tensor]
    results: list[Tensor]
    host: list[Tensor]
    replay: Replay


class RecordedPart:
    """The computation of an exit's output and of some scores, recorded once per batch size.

    It does the work of the part and nothing else, so the plain network runs as fast as PyTorch can run it: inputs go
    through pinned memory, the recorded graph runs, and label and output come back. `RecordedStages` adds the decisions.

    Args:
        stage: the part, as a stage that gives nothing to others.
        names: the names of the network's inputs.
        example: inputs of the network, on the device, in their type and memory layout.
        recorder: records on that device. Parts that share one also share the memory of what they compute in between.
    """

    def __init__(self, stage: Stage, names: Sequence[str], example: Sequence[Tensor], recorder: Recorder) -> None:
        self._stage = stage
        self._example = dict(zip(names, example, strict=True))
        self._device = example[0].device
        self._recorder = recorder
        self._sizes: dict[int, _Size] = {}

    def __call__(self, *arrays: NDArray[Any]) -> tuple[Any, ...]:
        """Return label `(R, ...)` and output `(R, C, ...)` as arrays, and the scores `(R,)` on the device.

        Raises:
            InputError: there is not enough memory for R rows; the message says which number fits.
        """
        rows = len(arrays[0])
        with self._recorder.running():
            if rows not in self._sizes:
                self._sizes[rows] = self._made(rows)
            size = self._sizes[rows]
            for (name, buffer), array in zip(size.inputs.items(), arrays, strict=True):
                given = as_tensor(array)
                buffer.copy_(size.staging[name].copy_(given) if size.staging else given, non_blocking=True)
            size.replay()
            for here, value in zip(size.host, size.results[:2], strict=True):
                here.copy_(value, non_blocking=True)
            self._recorder.wait()
            label, output = (here.numpy().copy() for here in size.host)
        return label, output, *size.results[2:]

    def _made(self, rows: int) -> _Size:
        made, size, cause = largest_fitting(self._record, [rows >> k for k in range(rows.bit_length())])
        if made is not None and not cause:
            return made
        short = f"there is not enough memory on {self._device} for batch_size={rows} ({cause})"
        raise InputError(f"{short}, nor for 1" if made is None else f"{short}; batch_size={size} fits")

    def _record(self, rows: int) -> _Size:
        stage, pins = self._stage, self._recorder.pins
        inputs = {name: _like(value, rows, device=self._device) for name, value in self._example.items()}
        staging = {name: _like(v, rows, device="cpu", pin_memory=True) for name, v in self._example.items() if pins}

        def compute() -> list[Tensor]:
            output, *scores = stage.module(rows, *(inputs[taken.name] for taken in stage.takes))
            return [output.argmax(dim=1), output, *scores]

        results = [torch.empty_like(value, memory_format=torch.contiguous_format) for value in compute()]

        def step() -> None:
            for kept, value in zip(results, compute(), strict=True):
                kept.copy_(value)

        step()
        host = [torch.empty(value.shape, dtype=value.dtype, pin_memory=pins) for value in results[:2]]
        return _Size(inputs, staging, results, host, self._recorder.record(step))


def _like(value: Tensor, rows: int, **where: Any) -> Tensor:
    """Return zeros, which any network can read, of some rows in the type and memory layout of a value."""
    size = (rows, *value.shape[1:])
    return torch.empty_permuted(size, value.dim_order(), dtype=value.dtype, **where).zero_()
