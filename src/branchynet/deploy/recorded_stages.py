"""Run the stages of a network as recorded steps: one CUDA graph per stage and batch size.

Shape letters: M rows that the buffers hold.
"""

import contextlib
import math
import re
import threading
import traceback
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import GraphError, InputError, first_line
from ..graph.torch_stages import Stages
from ..policy.prediction import Prediction
from .eager_stages import Limits, as_compile_errors, as_tensor
from .memory import is_memory_error, largest_fitting
from .recorder import Recorder, Replay
from .stage_buffers import allocate, axes_of, bytes_per_row, carried, narrowed, sources_of
from .stage_step import Read, Results, Rows, step_of

T = TypeVar("T")

BATCH_SIZES = (
    *(1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64),
    *(80, 96, 112, 128, 160, 192, 224, 256),
)
_SHARE = 0.25  # of the free memory that the values of the default sizes may take


class RecordedStages:
    """The stages of a network as steps on fixed memory, each recorded once per batch size.

    Between two stages, the host waits for one number, how many samples stay, and replays the next step at the smallest
    size that holds them. The first use of a stage at a size records it.

    Args:
        cut: the stages.
        example: inputs of the network, two rows or more, on the device where the stages run.
        sizes: the batch sizes, ascending; by default `BATCH_SIZES`, as far as there is memory.
        compile: whether to compile each step.

    Attributes:
        sizes: the batch sizes; the last one is M.

    Raises:
        InputError: the buffers for the largest size do not fit in memory.
    """

    def __init__(
        self, cut: Stages, example: Sequence[Tensor], sizes: Sequence[int] | None, *, compile: bool = False
    ) -> None:
        self._cut, self._compile, self._device = cut, compile, example[0].device
        self._recorder = Recorder(self._device)
        self._lock = threading.Lock()
        self._replays: dict[tuple[int, int], Replay] = {}
        self._filled: dict[int, float] = {}  # thresholds that the buffers hold
        with self._recorder.running():
            values = carried(cut, example)
            self.sizes = tuple(sizes or _default_sizes(bytes_per_row(cut, values), self._device))
            self._buffers = self._fitting(
                lambda rows: allocate(cut, values, rows, self._device), self.sizes, "the buffers"
            )
            self._recorder.wait()
        self._steps = [self._step(i) for i in range(len(cut.stages))]

    def __call__(self, inputs: Sequence[NDArray[Any] | Tensor], limits: Limits) -> Prediction:
        """Predict 1 to M rows, given a threshold, or one per row, for each stage but the last."""
        rows = len(inputs[0])
        with self._lock, self._recorder.running():
            size = self._size(rows)
            self._load(inputs, rows, size)
            self._load_thresholds(limits, rows)
            for i, limit in enumerate((*limits, None)):
                self._replay(i, size)
                if limit is None:
                    break
                if isinstance(limit, float) and limit == -math.inf:  # all stay, so there is nothing to wait for
                    continue
                self._recorder.wait()
                stayed = int(self._buffers.levels[i].stayed[0])
                if not stayed:
                    break
                size = self._size(stayed)
            return self._answers(rows)

    def _size(self, rows: int) -> int:
        """The smallest size that holds the rows."""
        return self.sizes[bisect_left(self.sizes, rows)]

    def _load(self, inputs: Sequence[NDArray[Any] | Tensor], rows: int, size: int) -> None:
        """Copy the inputs; further rows of the step repeat the first one."""
        for name, given in zip(self._cut.inputs, inputs, strict=True):
            buffer, tensor = self._buffers.values[name], as_tensor(given).detach()
            staging = self._buffers.staging.get(name)
            if staging is not None and tensor.device.type == "cpu":
                if not tensor.is_pinned() or tensor.dtype != buffer.dtype:
                    tensor = staging[:rows].copy_(tensor)
            buffer[:rows].copy_(tensor, non_blocking=True)
            if rows < size:
                buffer[rows:size].copy_(buffer[:1])
        self._buffers.levels[0].count.fill_(rows)

    def _load_thresholds(self, limits: Limits, rows: int) -> None:
        for i, limit in enumerate(limits):
            threshold = self._buffers.levels[i].threshold
            if isinstance(limit, np.ndarray):
                threshold[:rows].copy_(as_tensor(limit))
                self._filled.pop(i, None)
            elif self._filled.get(i) != limit:
                threshold.fill_(limit)
                self._filled[i] = limit

    def _answers(self, rows: int) -> Prediction:
        output, score, exit = (answer[:rows] for answer in self._buffers.answers)
        found = output.argmax(dim=1), exit, score, output
        for host, value in zip(self._buffers.host, found, strict=True):
            host[:rows].copy_(value, non_blocking=True)
        self._recorder.wait()
        return Prediction(*(host[:rows].numpy().copy() for host in self._buffers.host))

    def _step(self, i: int) -> Callable[..., None]:
        stage, source, levels = self._cut.stages[i], sources_of(self._cut), self._buffers.levels
        sources, before = levels[i].sources, levels[i - 1].sources if i else ()
        reads = [
            Read(
                taken.axis or 0,
                tuple(self._buffers.values[taken.name].dim_order()),
                # The first stage reads the inputs as they are.
                None if taken.axis is None or not i else sources.index(source[taken.name]),
            )
            for taken in stage.takes
        ]
        chain = [before.index(one) if one in before else None for one in sources]
        return step_of(stage, reads, chain, compile=self._compile)

    def _bound(self, i: int, size: int) -> Callable[[], None]:
        """Return the step of a stage for the first `size` rows of its buffers."""
        stage, axes, buffers = self._cut.stages[i], axes_of(self._cut), self._buffers
        step, level, last = self._steps[i], buffers.levels[i], i == len(buffers.levels) - 1
        after = () if last else (buffers.levels[i + 1].count, buffers.levels[i + 1].kept)

        def rows(value: Tensor, axis: int | None = 0) -> Tensor:
            part = narrowed(value, axis, size)
            if self._compile and axis is not None and size > 1:  # torch.compile fixes sizes of 1
                torch._dynamo.maybe_mark_dynamic(part, axis)
            return part

        reached = Rows(
            rows(buffers.place),
            level.count,
            rows(level.kept) if i else None,
            buffers.levels[i - 1].positions if i else (),
        )
        values = [buffers.values[t.name] if i else rows(buffers.values[t.name], t.axis) for t in stage.takes]
        results = Results(
            buffers.answers,
            [rows(positions) for positions in level.positions] if i and not last else [],
            [rows(buffers.values[name], axes[name]) for name in stage.gives],
            after,
        )

        def run() -> None:
            step(reached, values, None if last else level.threshold, results)
            if after:
                level.stayed.copy_(after[0], non_blocking=True)

        return run

    def _replay(self, i: int, size: int) -> None:
        replay = self._replays.get((i, size))
        if replay is None:
            what = f"exit {self._cut.stages[i].exit}"
            smaller = self.sizes[: self.sizes.index(size) + 1]
            replay = self._replays[i, size] = self._fitting(lambda rows: self._record(i, rows), smaller, what)
        replay()

    def _record(self, i: int, size: int) -> Replay:
        step, exit = self._bound(i, size), self._cut.stages[i].exit
        with as_compile_errors(exit) if self._compile else contextlib.nullcontext():
            step()
        try:
            return self._recorder.record(step)
        except Exception as error:
            if is_memory_error(error):
                raise
            raise GraphError(
                f"the stage of exit {exit} cannot be recorded as a CUDA graph{_operator(error)} ({first_line(error)}); "
                "give batch_sizes=(), so that its operators run one by one"
            ) from error

    def _fitting(self, make: Callable[[int], T], sizes: Sequence[int], what: str) -> T:
        """Return ``make`` of the largest size. Raise `InputError` with the largest that fits if there is no memory."""
        made, size, cause = largest_fitting(make, sizes[::-1])
        if made is not None and not cause:
            return made
        short = f"there is not enough memory on {self._device} for {what} with a batch of {sizes[-1]} ({cause})"
        if made is None:
            raise InputError(f"{short}, nor of {size}: free memory of the device, or give batch_sizes=()")
        fitting = self.sizes[: self.sizes.index(size) + 1]
        raise InputError(f"{short}; a batch of {size} fits: give batch_sizes={fitting}")


def _default_sizes(row_bytes: float, device: torch.device) -> tuple[int, ...]:
    if device.type != "cuda":
        return BATCH_SIZES
    free = torch.cuda.mem_get_info(device)[0]
    return tuple(size for size in BATCH_SIZES if size * row_bytes <= _SHARE * free) or BATCH_SIZES[:1]


def _operator(error: BaseException) -> str:
    """Return `` at 'aten.nonzero'``, as far as the code of a stage shows which operator failed."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if found := re.search(r"torch\.ops\.(\w+\.\w+)", frame.line or ""):
            return f" at {found[1]!r}"
    return ""
