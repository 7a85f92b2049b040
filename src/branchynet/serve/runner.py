"""The worker of one model: it runs the batches of a scheduler and hands out the answers.

A thread runs them, so that the event loop can read requests meanwhile. If a sample takes less than half a millisecond
through all stages, the event loop runs the batches itself.
"""

import asyncio
import contextlib
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import BranchyNetError, InputError, first_line
from .backends import Backend, Block, Call
from .faults import DeadlineError, RunError, StoppedError, too_late
from .scheduler import Scheduler
from .tickets import Batch, Part, StageLimit, Ticket

SWITCH = 0.0005  # seconds; Python's default of 5 ms delays the worker behind the event loop
_INLINE = 0.0005  # seconds; waking a thread for less takes longer than the work


class Step(NamedTuple):
    """A batch in which samples of a request ran.

    Attributes:
        exit: the exit of its stage.
        us: microseconds that the batch took.
        score: the score at this exit, if the request has only one sample; otherwise None.
    """

    exit: int
    us: float
    score: float | None


@dataclass(frozen=True)
class Answer:
    """The answer to a request.

    Attributes:
        outputs: by name, in the order of the samples.
        unfinished: how many samples have the answer of an earlier exit, because the deadline passed.
        steps: the batches that its samples ran in.
        waited_us: microseconds in queues and batches, from its arrival to the answer.
    """

    outputs: dict[str, NDArray[Any]]
    unfinished: int
    steps: tuple[Step, ...]
    waited_us: float


class Observer(Protocol):
    """Receives what a runner does, in the thread of the runner."""

    def ran(self, exit: int, rows: int, waits: Sequence[float], seconds: float) -> None:
        """A batch of `rows` samples ran; `waits` has the seconds that each part of it waited."""

    def answered(self, outputs: dict[str, NDArray[Any]], seconds: float, default: bool) -> None:
        """A request was answered after `seconds`; `default` is whether it had the thresholds of the file."""


class _Pending:
    """The caller of a ticket, and its answers so far."""

    __slots__ = ("arrived", "default", "future", "loop", "outputs", "steps")

    def __init__(self, loop: asyncio.AbstractEventLoop, arrived: float, default: bool) -> None:
        self.loop, self.arrived, self.default = loop, arrived, default
        self.future: asyncio.Future[Answer] = loop.create_future()
        self.outputs: dict[str, NDArray[Any]] = {}
        self.steps: list[Step] = []


class Runner:
    """Runs one model. Requests come from any event loop; one thread runs all batches.

    Args:
        backend: what to run.
        limits: the bounds of the batches of each stage.
        max_wait: as in `Scheduler`.
        bound: as in `Scheduler`.
        most_wait: as in `Scheduler`.
        observer: receives each batch and each answer; None for nobody.
        clock: returns seconds; a test may replace it.

    Example:
        >>> import asyncio, torch
        >>> from branchynet import BranchyNet, Policy, export
        >>> from branchynet.serve.backends import open_backend
        >>> from branchynet.serve.tickets import StageLimit
        >>> from torch import nn
        >>> net = BranchyNet(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), {"1": nn.Linear(8, 3)})
        >>> path = export(net, "net.onnx", policy=Policy(thresholds=(2.0,)), example=torch.randn(2, 4))
        >>> backend = open_backend(path, threads=1)
        >>> runner = Runner(backend, [StageLimit(8)])
        >>> answer = asyncio.run(runner.answer(backend.call({"input": torch.randn(3, 4).numpy()}, None)))
        >>> answer.outputs["exit"].tolist()
        [1, 1, 1]
        >>> runner.stop()
    """

    def __init__(
        self,
        backend: Backend,
        limits: Sequence[StageLimit],
        *,
        max_wait: float = 0.0,
        bound: int = 1024,
        most_wait: float = math.inf,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend, self._observer, self._clock = backend, observer, clock
        self._scheduler = Scheduler(limits, max_wait=max_wait, bound=bound, most_wait=most_wait)
        self._changed = threading.Condition()
        self._stopping = False
        self._stepping: asyncio.AbstractEventLoop | None = None  # the loop that will run a batch soon
        self._unanswered: Counter[asyncio.AbstractEventLoop] = Counter()
        self._thread = threading.Thread(target=self._work, name="branchynet-runner", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Unanswered samples."""
        return self._scheduler.waiting

    async def answer(self, call: Call, timeout: float = math.inf) -> Answer:
        """Queue a request and wait for its answer; if the task is cancelled, the request leaves the queue.

        Args:
            call: what the backend returned.
            timeout: seconds until its deadline. Then samples get the answer of the last exit that they reached.

        Raises:
            QueueFull: there is no room.
            InputError: the request can never fit.
            DeadlineError: the deadline passed, and a sample has reached no exit.
            StoppedError: the runner stops.
            RunError: the runtime failed.
        """
        now = self._clock()
        pending = _Pending(asyncio.get_running_loop(), now, call.default)
        ticket = Ticket(call.rows, call.held, call.kind, now + timeout, pending)
        with self._changed:
            if self._stopping:
                raise StoppedError("the model is being unloaded or the server stops; send the request again later")
            self._scheduler.submit(ticket, now)
            self._unanswered[pending.loop] += 1
            here = self._scheduler.typical <= _INLINE and self._stepping in (None, pending.loop)
            if not here:
                self._changed.notify()
        if here and self._stepping is None:
            self._step_soon(pending.loop)
        try:
            return await pending.future
        except asyncio.CancelledError:
            with self._changed:
                if not ticket.closed:
                    self._unanswered[pending.loop] -= 1
                self._scheduler.cancel(ticket)
            raise

    def _step_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        self._stepping = loop
        loop.call_soon(self._step, loop)

    def _step(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run a batch in the event loop, after the requests that arrived in this turn of it."""
        self._stepping = None
        with self._changed:
            batch = self._scheduler.next_batch(self._clock())
        if batch is not None:
            self._run(batch, loop)
        with self._changed:
            at = self._scheduler.wake_at(now := self._clock())
            here = at is not None and at <= now and self._scheduler.typical <= _INLINE
            here = here and self._unanswered[loop] > 0  # else the loop may end before the next step
            if self._stopping or (at is not None and not here):
                self._changed.notify()
        if here and self._stepping is None:
            self._step_soon(loop)

    def stop(self, timeout: float | None = None) -> None:
        """Refuse new requests, and wait until all accepted ones are answered."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout)

    def _work(self) -> None:
        while True:
            with self._changed:
                batch, late = self._next()
            self._deliver((ticket, self._late(ticket)) for ticket in late)
            if batch is None and not late:
                return
            if batch is not None:
                self._run(batch)
            batch, late = None, []  # their arrays must not live while the thread waits

    def _next(self) -> tuple[Batch | None, list[Ticket]]:
        """Wait for a batch or an expired request; None and nothing if the runner has stopped."""
        while True:
            now = self._clock()
            late = self._scheduler.expired(now)
            batch = self._scheduler.next_batch(now)
            if batch is not None or late:
                return batch, late
            at = self._scheduler.wake_at(now)
            if self._stopping and not self._scheduler.waiting:
                return None, []
            self._changed.wait(None if at is None else max(at - now, 0.0))

    def _run(self, batch: Batch, loop: asyncio.AbstractEventLoop | None = None) -> None:
        kind = batch.parts[0].ticket.kind
        try:
            block = batch.parts[0].held if self._backend.whole else _gathered(batch.parts)
            outputs, leaves, held = self._backend.run(batch.stage, block, kind)
            now = self._clock()
            self._scatter(batch, outputs, now)
        except Exception as error:  # of any runtime
            self._failed(batch, error, loop)
            return
        with self._changed:
            done = self._scheduler.finished(batch, leaves, held, now)
        self._deliver(((ticket, self._found(ticket, 0, now)) for ticket in done), loop)
        if self._observer is not None:
            waits = [batch.started - part.since for part in batch.parts]
            self._observer.ran(self._backend.exits[batch.stage], batch.rows, waits, now - batch.started)
            for ticket in done:
                pending: _Pending = ticket.content
                self._observer.answered(pending.outputs, now - pending.arrived, pending.default)

    def _failed(self, batch: Batch, error: Exception, loop: asyncio.AbstractEventLoop | None) -> None:
        """Run the parts of a batch one by one, so that a request that the runtime refuses fails alone."""
        first, *others = batch.parts
        if others:
            for part in batch.parts:
                if not part.ticket.closed:
                    self._run(Batch(batch.stage, (part,), len(part.rows), self._clock()), loop)
            return
        ticket = first.ticket
        with self._changed:
            self._scheduler.cancel(ticket)
        text = f"the runtime cannot compute this request ({first_line(error)}); send other values"
        refused = type(error).__name__ == "InvalidArgument"  # ONNX Runtime's, such as for an index out of range
        self._deliver([(ticket, InputError(text) if refused else RunError(text))], loop)

    def _scatter(self, batch: Batch, outputs: dict[str, NDArray[Any]], now: float) -> None:
        """Keep the answers of this exit for all samples: they count if a sample leaves, or if its deadline passes."""
        us, exit, at = 1e6 * (now - batch.started), self._backend.exits[batch.stage], 0
        for part in batch.parts:
            pending: _Pending = part.ticket.content
            count, rows = len(part.rows), part.ticket.rows
            score = float(outputs["score"][at]) if rows == 1 and "score" in outputs else None
            pending.steps.append(Step(exit, us, score))
            if len(batch.parts) == 1 and count == rows:
                pending.outputs = outputs
            elif count == rows:
                pending.outputs = {name: values[at : at + count] for name, values in outputs.items()}
            else:
                if not pending.outputs:
                    pending.outputs = {
                        name: np.zeros((rows, *values.shape[1:]), values.dtype) for name, values in outputs.items()
                    }
                for name, values in outputs.items():
                    pending.outputs[name][part.rows] = values[at : at + count]
            at += count

    def _found(self, ticket: Ticket, unfinished: int, now: float) -> Answer:
        pending: _Pending = ticket.content
        return Answer(pending.outputs, unfinished, tuple(pending.steps), 1e6 * (now - pending.arrived))

    def _late(self, ticket: Ticket) -> Answer | DeadlineError:
        pending: _Pending = ticket.content
        now = self._clock()
        missing = int((pending.outputs["exit"] == 0).sum()) if "exit" in pending.outputs else ticket.rows
        if missing:
            return too_late(now - pending.arrived, missing, ticket.rows)
        return self._found(ticket, ticket.left, now)

    def _deliver(
        self,
        results: Iterable[tuple[Ticket, Answer | BranchyNetError]],
        here: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """Set the futures of requests, with one wake-up per event loop, and none for the loop that runs this."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[_Pending, Answer | BranchyNetError]]] = {}
        for ticket, result in results:
            loops.setdefault(ticket.content.loop, []).append((ticket.content, result))
        if not loops:
            return
        with self._changed:
            for loop, found in loops.items():
                self._unanswered[loop] -= len(found)
                if self._unanswered[loop] <= 0:
                    del self._unanswered[loop]  # so that no loop is kept
        for loop, found in loops.items():
            if loop is here:
                _set(found)
                continue
            with contextlib.suppress(RuntimeError):  # the loop was closed, and nobody waits
                loop.call_soon_threadsafe(_set, found)


def _set(found: list[tuple[_Pending, Answer | BranchyNetError]]) -> None:
    for pending, result in found:
        if not pending.future.done():
            if isinstance(result, Answer):
                pending.future.set_result(result)
            else:
                pending.future.set_exception(result)


def _gathered(parts: Sequence[Part]) -> Block:
    """Return the rows of all parts as one block."""
    if len(parts) == 1:
        part = parts[0]
        stop = part.start + len(part.rows)
        return {
            name: value if part.start == 0 and stop == len(value) else value[part.start : stop]
            for name, value in part.held.items()
        }
    spans: list[list[Any]] = []  # neighbors in one block are taken together
    for part in parts:
        if spans and spans[-1][0] is part.held and spans[-1][2] == part.start:
            spans[-1][2] += len(part.rows)
        else:
            spans.append([part.held, part.start, part.start + len(part.rows)])
    if len(spans) == 1:
        held, start, stop = spans[0]
        return {name: value[start:stop] for name, value in held.items()}
    return {name: np.concatenate([held[name][a:b] for held, a, b in spans]) for name in spans[0][0]}
