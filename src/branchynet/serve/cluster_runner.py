"""Answers requests to a model whose stages run in processes of a Ray cluster."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from ..errors import BranchyNetError, first_line
from .backends import Call
from .faults import DeadlineError, RunError, StoppedError, too_late
from .runner import Answer, Observer, Step
from .scheduler import check_room
from .stage_replica import Ran

log = logging.getLogger("branchynet.serve")

_GRACE = 1.0  # seconds that a batch may still run when the deadline has passed
_PAUSE = 0.05  # seconds before a request is sent again
_DECAY = 0.98  # weight of the past in the mean seconds of a request


class ClusterRunner:
    """Sends the samples of a request from stage to stage until they leave.

    It keeps the inputs of a stage until the stage has answered. If a replica dies, it sends the same arrays to another
    one. Stages keep no state, so a sample may run twice, and its request is still answered once.

    Args:
        stages: the stages of the model.
        bound: the most unanswered samples.
        observer: receives each answer; None for nobody.
        drain_s: the most seconds that `stop` waits for answers.
        ended: called when it has stopped.

    Attributes:
        waiting: unanswered samples.
    """

    def __init__(
        self,
        stages: Sequence[DeploymentHandle[Any]],
        *,
        bound: int = 1024,
        observer: Observer | None = None,
        drain_s: float = 30.0,
        ended: Callable[[], None] | None = None,
    ) -> None:
        self._stages, self._bound, self._observer = tuple(stages), bound, observer
        self._drain_s, self._ended = drain_s, ended
        self._seconds, self._stopping = 0.0, False
        self.waiting = 0

    async def answer(self, call: Call, timeout: float = math.inf) -> Answer:
        """Answer a request; if the task is cancelled, its stage is notified.

        Arguments and errors are those of `Runner.answer`; if the runtime refuses the request, it raises `InputError`.
        """
        if self._stopping:
            raise StoppedError("the model is being unloaded or the server stops; send the request again later")
        check_room(call.rows, self.waiting, self._bound, self._seconds)
        started = time.monotonic()
        self.waiting += call.rows
        try:
            outputs, unfinished, steps = await self._through(call, started, timeout)
        finally:
            self.waiting -= call.rows
        seconds = time.monotonic() - started
        self._seconds = _DECAY * self._seconds + (1 - _DECAY) * seconds
        if self._observer is not None:
            self._observer.answered(outputs, seconds, call.default)
        return Answer(outputs, unfinished, tuple(steps), 1e6 * seconds)

    def stop(self) -> None:
        """Refuse new requests, and wait until all accepted ones are answered."""
        self._stopping = True
        end = time.monotonic() + self._drain_s
        while self.waiting and time.monotonic() < end:
            time.sleep(_PAUSE)
        ended, self._ended = self._ended, None
        if ended is not None:
            ended()

    async def _through(
        self, call: Call, started: float, timeout: float
    ) -> tuple[dict[str, NDArray[Any]], int, list[Step]]:
        """Return the outputs of all samples, how many are unfinished, and the steps."""
        outputs: dict[str, NDArray[Any]] = {}
        rows, steps, total, kind = np.arange(call.rows), [], call.rows, call.kind
        for stage in range(len(self._stages)):
            ran = await self._ran(stage, call, started + timeout)
            if ran is None and not outputs:
                raise too_late(time.monotonic() - started, total, total)
            if ran is None:
                break
            steps += ran.steps
            if ran.leaves.all() and not outputs:
                return ran.outputs, 0, steps
            if not outputs:
                outputs = {name: values.copy() for name, values in ran.outputs.items()}  # Ray's are read-only
            else:
                for name, values in ran.outputs.items():
                    outputs[name][rows] = values
            rows = rows[~ran.leaves]
            if not len(rows):
                break
            call = Call(len(rows), ran.carried, kind)
        return outputs, len(rows), steps

    async def _ran(self, stage: int, call: Call, end: float) -> Ran | None:
        """Run a stage, again if its replica dies; None if the deadline passes."""
        while (left := end - time.monotonic()) > 0:
            response = self._stages[stage].run.remote(call, left)
            try:
                async with asyncio.timeout(left + _GRACE if left < math.inf else None):
                    found = await response
            except TimeoutError:
                response.cancel()
                return None
            except RayTaskError as error:  # of code that runs in the replica
                raise RunError(f"stage {stage + 1} failed ({first_line(error)}); its log says why") from error
            except asyncio.CancelledError:
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    response.cancel()
                    raise
                log.warning("a replica of stage %d ended; its request runs again", stage + 1)
            except (RayError, RayServeException) as error:
                log.warning("a replica of stage %d failed (%s); its request runs again", stage + 1, first_line(error))
            else:
                if isinstance(found, DeadlineError):
                    return None
                if isinstance(found, BranchyNetError):
                    raise found
                return found
            await asyncio.sleep(_PAUSE)
        return None
