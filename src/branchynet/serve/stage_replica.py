"""One stage of a model in a process of its own, as it runs on a cluster."""

import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import BranchyNetError
from .backends import Backend, Block, Call, Stepped, open_backend
from .models import limits_of
from .runner import SWITCH, Runner, Step
from .settings import ServeSettings

_CARRIED = ""  # among the outputs: where what the next stage reads of each sample is
_UNBOUNDED = 1 << 40  # samples; the server that sends requests counts them


class Ran(NamedTuple):
    """What a stage gives for a request.

    Attributes:
        outputs: the outputs of its samples, by name.
        leaves: which of them leave.
        carried: what the next stage reads for the others.
        steps: the batches that they ran in.
    """

    outputs: dict[str, NDArray[Any]]
    leaves: NDArray[np.bool_]
    carried: Block
    steps: tuple[Step, ...]


class OneStage:
    """A stage of a backend as a backend. Its outputs include the place of what the next stage reads of each sample."""

    def __init__(self, backend: Backend, stage: int) -> None:
        self._backend, self._stage = backend, stage
        self.inputs, self.outputs, self.shapes = backend.inputs, backend.outputs, backend.shapes
        self.exits = backend.exits[stage : stage + 1]
        self.platform, self.engine, self.whole = backend.platform, backend.engine, backend.whole

    def call(self, inputs: Mapping[str, NDArray[Any]], thresholds: Any) -> Call:
        """Check the inputs of a request. Raises `InputError`."""
        return self._backend.call(inputs, thresholds)

    def run(self, stage: int, held: Block, kind: Hashable) -> Stepped:
        """Run the stage on samples of one kind."""
        outputs, leaves, carried = self._backend.run(self._stage, held, kind)
        if not self.whole:
            places = np.full(len(leaves), None, object)
            for at, row in enumerate((~leaves).nonzero()[0].tolist()):
                places[row] = carried, at
            outputs = {**outputs, _CARRIED: places}
        return outputs, np.ones(len(leaves), bool), {}


class StageReplica:
    """A process that runs a stage of a model.

    Our own scheduler makes its batches: it counts samples, not requests, keeps kinds apart, and lets a request that the
    runtime refuses fail alone.

    Args:
        path: the file or folder of the model, on this machine.
        stage: counted from 0.
        settings: the settings of the server.
        sample_us: expected microseconds per sample of each stage; None if unknown.

    Raises:
        BranchyNetError: its files cannot be served.
    """

    def __init__(
        self, path: str, stage: int, settings: ServeSettings, sample_us: Sequence[float] | None = None
    ) -> None:
        sys.setswitchinterval(SWITCH)
        backend = open_backend(path, settings.threads, settings.runtime)
        first: dict[str, Any] = {}
        if stage == 0:  # a request that a stage has answered is accepted
            first = {"max_wait": settings.max_wait_ms / 1e3, "most_wait": settings.queue_ms / 1e3}
        limit = limits_of(backend, settings, sample_us)[stage]
        self._runner = Runner(OneStage(backend, stage), [limit], bound=_UNBOUNDED, **first)

    async def run(self, call: Call, timeout: float) -> Ran | BranchyNetError:
        """Run the stage on the samples of a request, within `timeout` seconds; errors of BranchyNet are returned."""
        try:
            answer = await self._runner.answer(call, timeout)
        except BranchyNetError as error:
            return error
        outputs = dict(answer.outputs)
        places = outputs.pop(_CARRIED, None)
        if places is None:
            return Ran(outputs, np.ones(call.rows, bool), {}, answer.steps)
        kept = [place for place in places if place is not None]
        return Ran(outputs, np.array([place is None for place in places]), _gathered(kept), answer.steps)


def _gathered(places: Iterable[tuple[Block, int]]) -> Block:
    """Return the rows at these places, in their order, as one block."""
    parts = []
    for _, group in groupby(places, key=lambda place: id(place[0])):
        near = list(group)
        rows = [row for _, row in near]
        parts.append({name: value[rows] for name, value in near[0][0].items()})
    if len(parts) < 2:
        return parts[0] if parts else {}
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
