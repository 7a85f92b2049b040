"""The fixed memory on which recorded stages work.

Shape letters: M rows that the buffers hold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..graph.torch_stages import Stages

INPUTS = -1  # the source of the network's inputs; the source of other values is the place of their stage


@dataclass(frozen=True, eq=False)
class Level:
    """The buffers of one stage.

    Attributes:
        sources: what the positions of the stage refer to: the batch, then earlier stages whose values are still read.
        positions: `(M,)` for each source.
        count: `(1,)`, how many samples reach the stage.
        kept: `(M+1,)`, their rows in the previous stage.
        threshold: `(M,)` per row of the batch.
        stayed: `(1,)` on the host, how many samples stay.
    """

    sources: tuple[int, ...]
    positions: tuple[Tensor, ...]
    count: Tensor
    kept: Tensor
    threshold: Tensor
    stayed: Tensor


@dataclass(frozen=True, eq=False)
class Buffers:
    """The buffers of all stages.

    Attributes:
        place: `(M,)`, 0, 1, ...
        levels: one per stage.
        values: the inputs and the values that cross between stages.
        staging: pinned copies of the inputs on the host; empty on the CPU.
        answers: output `(M+1, C, ...)`, score and exit `(M+1,)`, with a last row that nobody reads.
        host: label `(M, ...)`, exit, score and output, on the host.
    """

    place: Tensor
    levels: tuple[Level, ...]
    values: dict[str, Tensor]
    staging: dict[str, Tensor]
    answers: tuple[Tensor, Tensor, Tensor]
    host: tuple[Tensor, ...]


def sources_of(cut: Stages) -> dict[str, int]:
    """Return where each value comes from: `INPUTS`, or the place of the stage that gives it."""
    given = {name: i for i, stage in enumerate(cut.stages) for name in stage.gives}
    return dict.fromkeys(cut.inputs, INPUTS) | given


def axes_of(cut: Stages) -> dict[str, int | None]:
    """Return which dimension of each value is the batch; None for values that are the same for every batch."""
    return dict.fromkeys(cut.inputs, 0) | {t.name: t.axis for stage in cut.stages for t in stage.takes}


@torch.no_grad()
def carried(cut: Stages, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the inputs and the values that cross between stages, if all samples reach the last stage."""
    held = dict(zip(cut.inputs, inputs, strict=True))
    for stage in cut.stages:
        _, _, *given = stage.module(len(inputs[0]), *(held[t.name] for t in stage.takes))
        held.update(zip(stage.gives, given, strict=True))
    return held


def bytes_per_row(cut: Stages, values: Mapping[str, Tensor]) -> float:
    """Return how much memory the values of one sample take."""
    axes = axes_of(cut)
    return sum(v.nbytes / v.shape[axis] for name, v in values.items() if (axis := axes[name]) is not None)


def allocate(cut: Stages, values: Mapping[str, Tensor], rows: int, device: torch.device) -> Buffers:
    """Allocate buffers of M = `rows` rows in the memory layout of `values`. They hold 0, which any network can read."""
    pin = device.type == "cuda"
    axes, source, tail = axes_of(cut), sources_of(cut), cut.output_shape
    place = torch.arange(rows, device=device)
    levels = []
    for i in range(len(cut.stages)):
        read = {source[t.name] for later in cut.stages[i:] for t in later.takes if t.axis is not None}
        sources = (INPUTS, *sorted(read & set(range(i))))
        levels.append(
            Level(
                sources,
                (place,) if not i else tuple(_integers(rows, device=device) for _ in sources),
                count=_integers(1, device=device),
                kept=_integers(rows + 1, device=device),
                threshold=torch.zeros(rows, device=device),
                stayed=_integers(1, pin_memory=pin),
            )
        )
    return Buffers(
        place,
        tuple(levels),
        values={name: _like(value, axes[name], rows, device=device) for name, value in values.items()},
        staging={name: _like(values[name], 0, rows, device="cpu", pin_memory=True) for name in cut.inputs if pin},
        answers=(
            torch.zeros(rows + 1, *tail, device=device),
            torch.zeros(rows + 1, device=device),
            _integers(rows + 1, device=device),
        ),
        host=(
            _integers(rows, *tail[1:], pin_memory=pin),
            _integers(rows, pin_memory=pin),
            torch.zeros(rows, pin_memory=pin),
            torch.zeros(rows, *tail, pin_memory=pin),
        ),
    )


def narrowed(value: Tensor, axis: int | None, rows: int) -> Tensor:
    """Return the first rows of a buffer."""
    return value if axis is None else value.narrow(axis, 0, rows)


def _integers(*size: int, **where: Any) -> Tensor:
    return torch.zeros(*size, dtype=torch.int64, **where)


def _like(value: Tensor, axis: int | None, rows: int, **where: Any) -> Tensor:
    size = list(value.shape)
    if axis is not None:
        size[axis] = rows
    return torch.empty_permuted(size, value.dim_order(), dtype=value.dtype, **where).zero_()
