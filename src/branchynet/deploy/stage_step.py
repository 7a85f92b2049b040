"""One stage of a network as operations on fixed memory, none of which waits for the host.

Shape letters: S rows that a step computes, M rows that the buffers hold. The first *count* of the S rows are samples;
the others repeat the first one.
"""

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..graph.torch_stages import Stage
from ..policy.exit_rule import stays


@dataclass(frozen=True)
class Read:
    """How a step reads a value from a buffer.

    Attributes:
        axis: the dimension of the value that is the batch.
        order: the dimensions of the buffer, from the slowest to the fastest in memory.
        slot: which of the positions (see `Rows`) to read; None for the buffer as it is.
    """

    axis: int
    order: tuple[int, ...]
    slot: int | None


class Rows(NamedTuple):
    """Which samples a step computes.

    Where they are in the buffers is a list of *positions* `(S,)`: first their rows in the batch, then their rows in
    each earlier stage whose values are still read.

    Attributes:
        place: `(S,)` 0, 1, ...
        count: `(1,)`, the number of samples.
        kept: `(S,)`, their rows in the previous stage; None in the first stage.
        before: the positions `(M,)` of the previous stage.
    """

    place: Tensor
    count: Tensor
    kept: Tensor | None
    before: Sequence[Tensor]


class Results(NamedTuple):
    """Where a step writes.

    Attributes:
        answers: output `(M+1, C, ...)`, score and exit `(M+1,)` per row of the batch; nobody reads the last row.
        positions: `(S,)` each, of the samples of the step.
        gives: the values that later stages take.
        after: the number `(1,)` and the rows `(M+1,)` of the samples that stay.
    """

    answers: tuple[Tensor, Tensor, Tensor]
    positions: Sequence[Tensor]
    gives: Sequence[Tensor]
    after: Sequence[Tensor]


def step_of(
    stage: Stage, reads: Sequence[Read], chain: Sequence[int | None], *, compile: bool = False
) -> Callable[[Rows, Sequence[Tensor], Tensor | None, Results], None]:
    """Return a function that picks the samples that reach a stage, runs it, and writes the answers and who stays.

    Args:
        stage: the stage.
        reads: how to read each value that the stage takes.
        chain: for each entry of the positions, its place in those of the previous stage; None for the rows in the
            previous stage itself.
        compile: whether to compile the function.

    Returns:
        A function of the rows, the values that the stage takes, the thresholds `(M,)` per row of the batch (None in the
        last stage), and the results to write.
    """
    module, exit = stage.module, stage.exit

    def step(rows: Rows, values: Sequence[Tensor], threshold: Tensor | None, results: Results) -> None:
        place = rows.place
        reached, found = place < rows.count, [place]
        if rows.kept is not None:
            kept = torch.where(reached, rows.kept, rows.kept[:1])
            found = [kept if slot is None else rows.before[slot].index_select(0, kept) for slot in chain]
        taken = [_picked(value, read, found) for value, read in zip(values, reads, strict=True)]
        output, score, *given = module(place.shape[0], *taken)
        leaves = reached
        if threshold is not None:
            stay = reached & stays(score, threshold.index_select(0, found[0]))
            leaves = reached & ~stay
            ends = stay.cumsum(0)
            number, staying = results.after
            number.copy_(ends[-1:])
            staying.scatter_(0, (ends - 1).masked_fill(~stay, staying.shape[0] - 1), place)
            made = *found[: len(results.positions)], *given
            for buffer, value in zip((*results.positions, *results.gives), made, strict=True):
                buffer.copy_(value)
        outputs, scores, exits = results.answers
        to = found[0].masked_fill(~leaves, scores.shape[0] - 1)
        outputs.index_copy_(0, to, output)
        scores.index_copy_(0, to, score)
        exits.index_fill_(0, to, exit)

    return torch.compile(_with_own_code(step), fullgraph=True) if compile else step


def _picked(value: Tensor, read: Read, positions: Sequence[Tensor]) -> Tensor:
    """Return the rows of a value; they keep its memory layout."""
    if read.slot is None:
        return value
    rows = value.permute(read.order).index_select(read.order.index(read.axis), positions[read.slot])
    return rows.permute([read.order.index(axis) for axis in range(value.dim())])


def _with_own_code(function: Any) -> Any:
    """Return the function with its own copy of the code: torch.compile limits how often it compiles one code."""
    code = function.__code__.replace(co_name=function.__name__)
    return types.FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)
