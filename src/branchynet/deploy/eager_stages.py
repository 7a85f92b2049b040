"""Run the stages of a network one operator at a time, for batches of any size."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import GraphError, first_line
from ..graph.torch_stages import Stages
from ..policy.exit_rule import stays
from ..policy.prediction import Prediction
from .memory import is_memory_error

Limits = Sequence[float | NDArray[Any]]


class EagerStages:
    """The stages of a network as plain calls of PyTorch.

    Each exit costs one `nonzero`, for which a GPU waits for the host, and one `index_select` per tensor that the next
    stage reads.

    Args:
        cut: the stages.
        device: where they run.
        dtypes: the types of the network's inputs.
        compile: whether to compile each stage.
    """

    def __init__(self, cut: Stages, device: torch.device, dtypes: Sequence[torch.dtype], *, compile: bool) -> None:
        self._cut, self._device, self._dtypes = cut, device, dtypes
        self._compile = compile
        self._modules = [torch.compile(s.module, dynamic=True) if compile else s.module for s in cut.stages]
        self._later = tuple({t.name for s in cut.stages[i + 1 :] for t in s.takes} for i in range(len(cut.stages)))

    def __call__(self, inputs: Sequence[NDArray[Any] | Tensor], limits: Limits) -> Prediction:
        """Predict a batch of at least one row, given a threshold, or one per row, for each exit except the last."""
        thresholds = [torch.from_numpy(t.copy()).to(self._device) if isinstance(t, np.ndarray) else t for t in limits]
        with torch.inference_mode():
            given = [as_tensor(x).to(self._device, dtype) for x, dtype in zip(inputs, self._dtypes, strict=True)]
            output, score, exit = self._answer(given, thresholds)
            return Prediction(*(t.cpu().numpy() for t in (output.argmax(dim=1), exit, score, output)))

    def _answer(self, inputs: Sequence[Tensor], thresholds: Sequence[float | Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return every sample's (output, score, exit), given the thresholds of the enabled exits except the last."""
        held = {name: (tensor, 0) for name, tensor in zip(self._cut.inputs, inputs, strict=True)}
        left: list[Tensor | None] = [None]  # the remaining rows after each narrowing of the batch; None for all
        rows = len(inputs[0])
        answer: tuple[Tensor, Tensor, Tensor] | None = None
        steps = zip(self._cut.stages, self._modules, self._later, (*thresholds, None), strict=True)
        for stage, module, later, threshold in steps:
            for taken in stage.takes:
                held[taken.name] = _pick(*held[taken.name], taken.axis, left)
            with as_compile_errors(stage.exit) if self._compile else contextlib.nullcontext():
                output, score, *given = module(rows, *(held[taken.name][0] for taken in stage.takes))
            held.update((name, (value, len(left) - 1)) for name, value in zip(stage.gives, given, strict=True))
            held = {name: value for name, value in held.items() if name in later}
            del given  # free the larger batch before later stages run
            answer = _put_back(answer, output, score, stage.exit, left[0])
            if threshold is None:
                break
            if isinstance(threshold, Tensor) and left[0] is not None:
                threshold = threshold.index_select(0, left[0])
            deeper = stays(score, threshold).nonzero().squeeze(1)
            if not len(deeper):
                break
            if len(deeper) < rows:
                rows = len(deeper)
                left = [deeper if picked is None else picked.index_select(0, deeper) for picked in left] + [None]
        assert answer is not None
        return answer


@contextlib.contextmanager
def as_compile_errors(exit: int) -> Iterator[None]:
    """Convert errors in the first call of a compiled stage to `GraphError`, except for errors of memory."""
    try:
        yield
    except Exception as error:
        if is_memory_error(error):
            raise
        raise GraphError(
            f"the stage of exit {exit} cannot be compiled ({first_line(error)}); leave out compile=True"
        ) from error


def as_tensor(given: NDArray[Any] | Tensor) -> Tensor:
    """Return an array as a tensor, which shares its memory where possible."""
    if isinstance(given, Tensor):
        return given
    if not given.flags.writeable or min(given.strides) < 0:  # torch accepts neither
        given = given.copy()
    return torch.from_numpy(given)


def _pick(value: Tensor, narrowing: int, axis: int | None, left: Sequence[Tensor | None]) -> tuple[Tensor, int]:
    """Return the remaining rows of a value that has the rows of a narrowing, and its new narrowing."""
    rows = left[narrowing]
    if axis is None or rows is None:
        return value, narrowing
    return value.index_select(axis, rows), len(left) - 1


def _put_back(
    answer: tuple[Tensor, Tensor, Tensor] | None, output: Tensor, score: Tensor, exit: int, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Write one exit's outputs into the batch's (output, score, exit) at `rows`; None for all rows."""
    if answer is None or rows is None:
        exits = torch.full_like(score, exit, dtype=torch.int64)
        # An output may be a view of an input or a parameter; later exits write to it.
        return output.clone(memory_format=torch.contiguous_format), score.clone(), exits
    outputs, scores, exits = answer
    return outputs.index_copy_(0, rows, output), scores.index_copy_(0, rows, score), exits.index_fill_(0, rows, exit)
