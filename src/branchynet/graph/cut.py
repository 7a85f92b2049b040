"""The cut: which stage of the computation a node belongs to.

One rule serves every graph: ``stage(node) = min{n : node is an ancestor of exit n}``. Running the stages in order then
computes exactly what each exit needs, for chains, residual networks, several inputs and trees.

A stage takes the values that it reads from earlier stages, on the rows of the samples that reach it, or recomputes them
for these samples. `Dependence` decides which, and `plan_stages` lists both per stage.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..errors import GraphError

Node = TypeVar("Node", bound=Hashable)


def cut(exits: Sequence[Iterable[Node]], parents: Callable[[Node], Iterable[Node]]) -> dict[Node, int]:
    """Return the stage of every node that some exit needs, counted from 1; other nodes are absent.

    Args:
        exits: for each exit, in order, its output nodes.
        parents: returns the nodes that a node reads.
    """
    stage: dict[Node, int] = {}
    for n, needed in enumerate(exits, 1):
        waiting = list(needed)
        while waiting:
            node = waiting.pop()
            if node not in stage:
                stage[node] = n
                waiting.extend(parents(node))
    return stage


def divided(
    exits: Sequence[Sequence[Node]],
    parents: Callable[[Node], Iterable[Node]],
    work: Iterable[tuple[Sequence[Node], float]],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Divide work between trunk and branches: return `(trunk, branch)`, with one number per exit each.

    The nodes that the last exit needs are the trunk; each counts in the segment up to the first exit that needs it. All
    other nodes belong to branches and count with the first exit that needs them, even if several exits share them (a
    branch that is itself a tree). The numbers of an exit therefore assume that all earlier exits are enabled; the
    network without early exits costs its trunk. If the first exit of a shared branch is disabled, the shared nodes are
    missing from the cost of the other exits.

    Args:
        exits: for each exit, in order, its output nodes.
        parents: returns the nodes that a node reads.
        work: groups of nodes that are computed together, with their work.
    """
    first, backbone = cut(exits, parents), cut(exits[-1:], parents)
    trunk, branch = [0.0] * len(exits), [0.0] * len(exits)
    for nodes, amount in work:
        n = min((first[node] for node in nodes if node in first), default=None)
        if n is not None:
            (trunk if any(node in backbone for node in nodes) else branch)[n - 1] += amount
    return tuple(trunk), tuple(branch)


class Dependence(Generic[Node]):
    """How the values of a graph depend on the batch. Add values in topological order.

    A value that is computed only from the number of samples, such as their positions in the batch, differs for a
    smaller batch, so its rows cannot be picked. Integers that are computed from such values inherit this. Features do
    not, because a sample's output does not depend on its position.

    Attributes:
        samples: values that depend on the samples.
        size: values that depend on the number of samples, and on nothing else of the batch.
        recomputed: values of both kinds that must be recomputed for a smaller batch.
        costly: values that are too expensive to recompute.
    """

    def __init__(self, inputs: Iterable[Node], integers: Iterable[Node]) -> None:
        self.samples = set(inputs)
        self.size: set[Node] = set()
        self.recomputed: set[Node] = set()
        self.costly: set[Node] = set()
        self._numbers = set(integers)

    def varies(self, value: Node) -> bool:
        """Whether the value depends on the batch at all."""
        return value in self.samples or value in self.size

    def crosses(self, value: Node, axis: int | None) -> bool:
        """Whether later stages can take the value: it is the same for every batch, or its rows can be picked.

        Args:
            value: a value of the graph.
            axis: the dimension of the value that is the batch; None if none is.
        """
        return value not in self.recomputed and (axis is not None or not self.varies(value))

    def add(
        self,
        value: Node,
        reads: Iterable[Node],
        data: Iterable[Node],
        *,
        number: bool | None,
        costly: bool = False,
        measures: bool = False,
    ) -> None:
        """Add an output of a node.

        Args:
            value: the output.
            reads: all values that the node reads.
            data: the values of `reads` that become part of the output; the others are indices or sizes.
            number: whether the output holds integers; None if that depends on `data`, as for casts.
            costly: whether the node is too expensive to recompute.
            measures: whether the node reads only the sizes of values.
        """
        if costly:
            self.costly.add(value)
        reads = [v for v in reads if self.varies(v)]
        if not reads:
            return
        if measures or self.samples.isdisjoint(reads):
            self.size.add(value)
        else:
            self.samples.add(value)
        if costly:
            return
        made_of = [v for v in data if self.varies(v)]
        if value in self.size:
            self._numbers.add(value)
            self.recomputed.add(value)
        elif number or (number is None and made_of and self._numbers.issuperset(made_of)):
            self._numbers.add(value)
            if not self.recomputed.isdisjoint(made_of):
                self.recomputed.add(value)


@dataclass(frozen=True)
class StagePlan(Generic[Node]):
    """What a stage exchanges with the other stages.

    Attributes:
        takes: the values that cross into this stage, from earlier stages or from the inputs, each with its batch
            dimension. The stage takes only the rows of the samples that reach it. The dimension is None if the value is
            the same for every batch.
        recomputes: values of earlier stages that this stage computes itself, for the samples that reach it.
        gives: values of this stage that later stages take.
    """

    takes: dict[Node, int | None]
    recomputes: set[Node]
    gives: tuple[Node, ...]


def plan_stages(
    exits: Sequence[Iterable[Node]],
    stage: Mapping[Node, int],
    parents: Callable[[Node], Iterable[Node]],
    axis: Callable[[Node], int | None],
    dependence: Dependence[Node],
    describe: Callable[[Node], str],
) -> list[StagePlan[Node]]:
    """Return the plan of every stage. What crosses from stage a to stage b is what b takes that belongs to a.

    Args:
        exits: for each exit, in order, its output nodes.
        stage: the stage of every node, as from `cut`, but 0 for the inputs.
        parents: returns the nodes that a node reads; without constants, which every stage can hold.
        axis: returns the dimension of a value that is the batch; None if none is.
        dependence: how the values depend on the batch.
        describe: returns a value's name and shape, for the error message.

    Raises:
        GraphError: a value can neither cross nor be recomputed cheaply.
    """
    takes: list[dict[Node, int | None]] = [{} for _ in exits]
    recomputes: list[set[Node]] = [set() for _ in exits]
    for n, needed in enumerate(exits, 1):
        taken, again = takes[n - 1], recomputes[n - 1]
        waiting = [*needed, *(parent for node, own in stage.items() if own == n for parent in parents(node))]
        for value in waiting:  # grows in the loop
            if stage[value] == n or value in taken or value in again:
                continue
            if dependence.crosses(value, axis(value)):
                taken[value] = axis(value) if dependence.varies(value) else None
            elif value in dependence.costly:
                raise GraphError(
                    f"the value {describe(value)} crosses from one stage to the next, but none of its dimensions is "
                    "the batch alone, so the samples that stay cannot be picked from it; tap a submodule whose output "
                    "has the batch as a dimension"
                )
            else:
                again.add(value)
                waiting.extend(parents(value))
    return [
        StagePlan(taken, again, tuple(dict.fromkeys(v for later in takes[n:] for v in later if stage[v] == n)))
        for n, (taken, again) in enumerate(zip(takes, recomputes, strict=True), 1)
    ]
