"""The parts of a network whose times give the costs of its stages, and how a runtime opens them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import numpy as np

from ..graph.torch_program import tensors_of
from ..policy.values import Policy
from .target import Target

ALWAYS, NEVER = 3e38, -3e38  # thresholds that every score passes, and that none passes
PLAIN = "plain"  # in a list of outputs: that of the plain network, without its score
Call = Callable[..., Any]
Macs = tuple[tuple[float, ...], tuple[float, ...]]


class Parts(Protocol):
    """A network, ready to be opened in the runtime of a target, whole or in parts.

    Every call of a part takes arrays and returns when the answers are on the host, so that wall-clock times of parts
    and of the whole network hold the same work: transfers, launches, and waiting for the device.

    Attributes:
        num_exits: N.
        macs: multiply-accumulates per sample of trunk and branches, as in `ExitCost`; () if they are unknown.
        averaged: whether the last exit reads branches, so that the plain network is another graph.
    """

    @property
    def num_exits(self) -> int:
        """See the class."""
        ...

    @property
    def macs(self) -> Macs:
        """See the class."""
        ...

    @property
    def averaged(self) -> bool:
        """See the class."""
        ...

    def opened(
        self, graphs: Mapping[str, Policy | Sequence[str]], target: Target
    ) -> AbstractContextManager[dict[str, Call]]:
        """Open the network with each policy, and for each list of outputs the graph that computes them without exits.

        Outputs are named ``output_n`` and ``score_n``, or `PLAIN`; the first is an exit's output. A call of such a
        graph returns the label, then the outputs. A call of the network with a policy returns a `Prediction`.
        """
        ...

    def deployed(self, path: Any, policy: Policy, target: Target) -> AbstractContextManager[Call]:
        """Open the network as it is deployed: the file at `path`, or in PyTorch the network with the file's policy."""
        ...

    def check_cut(self, policy: Policy) -> None:
        """Raise `GraphError` if the network cannot be cut at the exits that `policy` enables."""
        ...


def part_outputs(parts: Parts, enabled: Sequence[int] | None = None, alone: bool = True) -> dict[str, list[str]]:
    """Return the outputs of the graphs without decisions, by name.

    ``plain`` is the plain network. ``upto_n`` is all enabled exits up to n with their scores, and ``alone_n`` exit n
    with its score. ``last`` is the last exit without its score, if it is not the plain network.
    """
    exits = enabled or range(1, parts.num_exits + 1)
    wanted = {"plain": [PLAIN]}
    if alone and parts.averaged:
        wanted["last"] = [f"output_{parts.num_exits}"]
    for n in exits:
        wanted[f"upto_{n}"] = [f"output_{n}", *(f"score_{k}" for k in exits if k <= n)]
        if alone and n > 1:
            wanted[f"alone_{n}"] = [f"output_{n}", f"score_{n}"]
    return wanted


def leaving_policies(num_exits: int) -> dict[str, Policy]:
    """Return policies ``leave_n`` by which every sample leaves at exit n, with all exits enabled."""
    exits = range(1, num_exits + 1)
    return {f"leave_{n}": Policy(thresholds=tuple(ALWAYS if k == n else NEVER for k in exits[:-1])) for n in exits}


def calls_of_sizes(calls: Iterable[Call], example: Any, sizes: Sequence[int]) -> list[Callable[[], Any]]:
    """Return every call with the example's inputs, repeated or cut to the first batch size, then to the next."""
    inputs = [tensor.cpu().numpy() for tensor in tensors_of(example)]
    batches = [[np.resize(array, (rows, *array.shape[1:])) for array in inputs] for rows in sizes]
    return [partial(call, *batch) for batch in batches for call in calls]
