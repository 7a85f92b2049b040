"""What a scheduler moves: requests, their parts, and batches; and the bounds of batches."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from ..policy.values import Ints


@dataclass(frozen=True)
class StageLimit:
    """Bounds of the batches of a stage.

    Attributes:
        rows: the most samples in a batch.
        expected: seconds that a batch takes, until batches have been timed.
    """

    rows: int
    expected: float = 0.01


def stage_limits(
    expected: Sequence[float], most_rows: int, sample_us: Sequence[float] | None = None, most_us: float | None = None
) -> tuple[StageLimit, ...]:
    """Return the limits of all stages.

    Args:
        expected: seconds of a batch of each stage.
        most_rows: the most samples per batch.
        sample_us: expected microseconds per sample of each stage; None if unknown.
        most_us: the most expected microseconds per batch; a batch has at least one sample.
    """
    us = [0.0] * len(expected) if sample_us is None or most_us is None else sample_us
    rows = [most_rows if not each else max(1, min(most_rows, int((most_us or 0) // each))) for each in us]
    return tuple(StageLimit(n, seconds) for n, seconds in zip(rows, expected, strict=True))


class Ticket:
    """The samples of one request.

    Attributes:
        rows: number of samples, at least 1.
        held: what the first stage reads for these samples; the scheduler passes it on.
        kind: tickets of other kinds never share a batch with this one.
        deadline: the time after which an answer is useless; infinity for none.
        content: for the caller; the scheduler ignores it.
        left: samples without a final answer.
        closed: whether it is complete, cancelled or expired.
    """

    __slots__ = ("closed", "content", "deadline", "held", "kind", "left", "parts", "rows")

    def __init__(
        self, rows: int, held: Any = None, kind: Hashable = None, deadline: float = math.inf, content: Any = None
    ) -> None:
        self.rows, self.held, self.kind, self.deadline, self.content = rows, held, kind, deadline, content
        self.left, self.closed = rows, False
        self.parts: dict[int, int] = {}  # the stage of each part in a queue


@dataclass(slots=True, eq=False)
class Part:
    """Samples of one ticket at one stage.

    Attributes:
        ticket: the request.
        rows: their positions in the request.
        held: what the stage reads, for these and perhaps other samples.
        start: the position of the first of these in `held`; the others follow it.
        since: when they came to the stage.
    """

    ticket: Ticket
    rows: Ints
    held: Any
    start: int
    since: float


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples that run together.

    Attributes:
        stage: the number of the stage, from 0.
        parts: in the order of the batch.
        rows: number of samples.
        started: when it was taken.
    """

    stage: int
    parts: tuple[Part, ...]
    rows: int
    started: float
