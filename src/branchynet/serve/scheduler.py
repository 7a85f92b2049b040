"""Decide which samples run together, at which stage, and when. No threads, no clock, no network.

Every call takes the time `now` in seconds, from any monotonic clock.

A request is a `Ticket` of one or more samples. Each stage has a queue of parts of requests; a part larger than the room
in a batch is split. A sample that leaves does not wait for others of its batch; a ticket is complete when all its
samples have left, whichever batches they took.

**When a stage runs.** A stage is *due* if it has a full batch; or if a deadline minus the time that it and the stages
after it take (95th percentiles) has come; or if its oldest sample has waited long enough. For the first stage, that is
`max_wait`, which is 0 by default, so an idle worker never waits. For a later stage, it is the 95th percentile of its
own batches: a sample then waits for others at most as long as the stage runs, which at most doubles the time. The
latest stage that is due runs first. If none is due, the worker is idle, and the earliest later stage that has samples
runs.

A batch takes first the samples with a deadline that is due, by deadline, and then the oldest samples. Only samples of
tickets of the same `kind` share a batch.
"""

import heapq
import math
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .faults import QueueFull
from .tickets import Batch, Part, StageLimit, Ticket

_REMEMBERED = 64  # durations per stage, for their 95th percentile
_DECAY = 0.98  # weight of the past in the mean time per sample, per batch


@dataclass(eq=False)
class _Parts:
    """Parts of tickets by number, oldest first, and a heap of their deadlines."""

    parts: OrderedDict[int, Part] = field(default_factory=OrderedDict)
    deadlines: list[tuple[float, int]] = field(default_factory=list)  # numbers of parts that left remain in it

    def add(self, number: int, part: Part) -> None:
        self.parts[number] = part
        if part.ticket.deadline < math.inf:
            heapq.heappush(self.deadlines, (part.ticket.deadline, number))

    def oldest(self) -> int:
        return next(iter(self.parts))

    def urgent(self) -> tuple[float, int] | None:
        """Return the earliest deadline, and the number of its part."""
        while self.deadlines and self.deadlines[0][1] not in self.parts:
            heapq.heappop(self.deadlines)
        return self.deadlines[0] if self.deadlines else None

    def first(self, soon: float) -> int:
        """Return the number of the part with the earliest deadline until `soon`, or else of the oldest."""
        urgent = self.urgent()
        return urgent[1] if urgent and urgent[0] <= soon else self.oldest()


class _Queue(_Parts):
    """The parts that wait for one stage."""

    def __init__(self, limit: StageLimit) -> None:
        super().__init__()
        self.limit, self.p95, self.median = limit, limit.expected, limit.expected
        self.kinds: dict[Hashable, _Parts] = {}
        self.rows = 0
        self._took: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, number: int, part: Part) -> None:
        super().add(number, part)
        self.kinds.setdefault(part.ticket.kind, _Parts()).add(number, part)
        self.rows += len(part.rows)

    def remove(self, number: int) -> Part:
        part = self.parts.pop(number)
        kind = part.ticket.kind
        del self.kinds[kind].parts[number]
        if not self.kinds[kind].parts:
            del self.kinds[kind]
        self.rows -= len(part.rows)
        return part

    def split(self, number: int, count: int) -> Part:
        """Take the first `count` samples of a part; the rest keeps its place."""
        part = self.parts[number]
        taken = Part(part.ticket, part.rows[:count], part.held, part.start, part.since)
        part.rows, part.start = part.rows[count:], part.start + count
        self.rows -= count
        return taken

    def timed(self, seconds: float) -> None:
        if len(self._took) == _REMEMBERED:
            del self._sorted[bisect_left(self._sorted, self._took.popleft())]
        self._took.append(seconds)
        insort(self._sorted, seconds)
        count = len(self._sorted)
        self.p95, self.median = self._sorted[math.ceil(0.95 * count) - 1], self._sorted[count // 2]


def check_room(rows: int, waiting: int, bound: int, after: float, most_wait: float = math.inf) -> None:
    """Raise an error unless a request may wait.

    Args:
        rows: its samples.
        waiting: unanswered samples before it.
        bound: the most unanswered samples.
        after: seconds that the samples before it are expected to take.
        most_wait: the most such seconds, if any sample waits.

    Raises:
        QueueFull: there is no room now.
        InputError: there never will be, or the request has no samples.
    """
    if not 1 <= rows <= bound:
        raise InputError(
            f"a request must have 1 to {bound} samples, because the queue has room for {bound}; got {rows}: send "
            "several requests, or start the server with a larger queue"
        )
    if waiting + rows > bound or (waiting and after > most_wait):
        raise QueueFull(
            f"the queue is full: {waiting} of at most {bound} samples wait for about {after:.2g} s, and this request "
            f"has {rows} more; try again later",
            after,
        )


class Scheduler:
    """Queues of samples, one per stage. Not thread-safe.

    Args:
        limits: one per stage.
        max_wait: seconds that a sample may wait at the first stage for others to share its batch.
        bound: the most unanswered samples of all requests together.
        most_wait: the most seconds that the samples before a request are expected to take; a request always finds room
            in empty queues.

    Attributes:
        waiting: unanswered samples.

    Example:
        >>> scheduler = Scheduler([StageLimit(8), StageLimit(8)], bound=100)
        >>> scheduler.submit(Ticket(3), now=0.0)
        >>> batch = scheduler.next_batch(now=0.0)
        >>> batch.stage, batch.rows
        (0, 3)
        >>> scheduler.finished(batch, np.array([True, False, True]), None, now=0.1)  # one sample stays
        []
        >>> batch = scheduler.next_batch(now=0.1)
        >>> batch.stage, batch.parts[0].rows.tolist()
        (1, [1])
        >>> len(scheduler.finished(batch, np.array([True]), None, now=0.2))
        1
    """

    def __init__(
        self, limits: Sequence[StageLimit], *, max_wait: float = 0.0, bound: int = 1024, most_wait: float = math.inf
    ) -> None:
        self._queues = [_Queue(limit) for limit in limits]
        self._max_wait, self._bound, self._most_wait = max_wait, bound, most_wait
        self._numbers = 0
        self._busy = sum(q.limit.expected for q in self._queues)  # decayed seconds of batches, and samples that left
        self._left = 1.0
        self.waiting = 0

    @property
    def typical(self) -> float:
        """The seconds of a batch through all stages: a sum of medians, which rare pauses do not change."""
        return sum(queue.median for queue in self._queues)

    def submit(self, ticket: Ticket, now: float) -> None:
        """Add a request.

        Raises:
            QueueFull: there is no room now.
            InputError: there never will be, or the request has no samples.
        """
        after = self.waiting * self._busy / max(self._left, 1e-9)
        check_room(ticket.rows, self.waiting, self._bound, after, self._most_wait)
        self.waiting += ticket.rows
        self._add(0, Part(ticket, np.arange(ticket.rows), ticket.held, 0, now))

    def cancel(self, ticket: Ticket) -> None:
        """Remove a request from the queues. Nothing happens if it is closed."""
        if ticket.closed:
            return
        ticket.closed = True
        self.waiting -= ticket.left
        for number, stage in ticket.parts.items():
            self._queues[stage].remove(number)
        ticket.parts.clear()

    def expired(self, now: float) -> list[Ticket]:
        """Close and return the requests whose deadlines have passed, among those with samples in a queue."""
        found = []
        for queue in self._queues:
            while (urgent := queue.urgent()) and urgent[0] <= now:
                ticket = queue.parts[urgent[1]].ticket
                self.cancel(ticket)
                found.append(ticket)
        return found

    def next_batch(self, now: float) -> Batch | None:
        """Take the next batch, or None if nothing is ready; then `wake_at` returns when to ask again."""
        for stage in range(len(self._queues) - 1, -1, -1):
            if self._due_at(stage) <= now:
                return self._take(stage, now)
        for stage in range(1, len(self._queues)):
            if self._queues[stage].parts:
                return self._take(stage, now)
        return None

    def wake_at(self, now: float) -> float | None:
        """Return when the next batch is ready, if nothing else happens until then; None if nothing waits."""
        if any(queue.parts for queue in self._queues[1:]):
            return now
        at = self._due_at(0)
        return None if at == math.inf else max(at, now)

    def finished(self, batch: Batch, leaves: NDArray[np.bool_], held: Any, now: float) -> list[Ticket]:
        """Record the result of a batch.

        Args:
            batch: as taken.
            leaves: `(batch.rows,)`, which samples leave; at the last stage all.
            held: what the next stage reads for those that stay, in their order.
            now: the time.

        Returns:
            The requests that are now complete.
        """
        seconds = now - batch.started
        self._queues[batch.stage].timed(seconds)
        self._busy = _DECAY * self._busy + seconds
        self._left = _DECAY * self._left + int(leaves.sum())
        done, at, kept = [], 0, 0
        for part in batch.parts:
            ticket, count = part.ticket, len(part.rows)
            leave = leaves[at : at + count]
            staying = count - int(np.count_nonzero(leave))
            if not ticket.closed:
                ticket.left -= count - staying
                self.waiting -= count - staying
                if staying:
                    rows = part.rows if staying == count else part.rows[~leave]
                    self._add(batch.stage + 1, Part(ticket, rows, held, kept, now))
                elif not ticket.left:
                    ticket.closed = True
                    done.append(ticket)
            at, kept = at + count, kept + staying
        return done

    def _add(self, stage: int, part: Part) -> None:
        self._numbers += 1
        self._queues[stage].add(self._numbers, part)
        part.ticket.parts[self._numbers] = stage

    def _due_at(self, stage: int) -> float:
        """Return when a stage is due; infinity if no sample waits for it."""
        queue = self._queues[stage]
        if not queue.parts:
            return math.inf
        if queue.rows >= queue.limit.rows:
            return -math.inf
        at = queue.parts[queue.oldest()].since + (queue.p95 if stage else self._max_wait)
        if urgent := queue.urgent():
            at = min(at, urgent[0] - self._ahead(stage))
        return at

    def _ahead(self, stage: int) -> float:
        return sum(queue.p95 for queue in self._queues[stage:])

    def _take(self, stage: int, now: float) -> Batch:
        queue, soon = self._queues[stage], now + self._ahead(stage)
        kind = queue.parts[queue.first(soon)].ticket.kind
        parts, room = [], queue.limit.rows
        while room and kind in queue.kinds:
            number = queue.kinds[kind].first(soon)
            part = queue.parts[number]
            if len(part.rows) > room:
                part = queue.split(number, room)
            else:
                queue.remove(number)
                del part.ticket.parts[number]
            parts.append(part)
            room -= len(part.rows)
        return Batch(stage, tuple(parts), queue.limit.rows - room, now)
