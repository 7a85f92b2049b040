"""The cut: which stage of the computation a node belongs to.

One rule serves every graph: ``stage(node) = min{n : node is an ancestor of exit n}``. Running the stages in order then
computes exactly what each exit needs, for chains, residual networks, several inputs and trees.

Values that a later stage reads from an earlier one are picked by rows or recomputed; `Dependence` decides which.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

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


class Dependence(Generic[Node]):
    """How the values of a graph depend on the batch. Add values in topological order.

    A value that is computed only from the number of samples, such as their positions in the batch, differs for a
    smaller batch, so its rows cannot be picked. Integers that are computed from such values inherit this. Features do
    not, because a sample's output does not depend on its position.

    Attributes:
        samples: values that depend on the samples.
        size: values that depend on the number of samples, and on nothing else of the batch.
        recomputed: values of both kinds that must be recomputed for a smaller batch.
    """

    def __init__(self, inputs: Iterable[Node], integers: Iterable[Node]) -> None:
        self.samples = set(inputs)
        self.size: set[Node] = set()
        self.recomputed: set[Node] = set()
        self._numbers = set(integers)

    def varies(self, value: Node) -> bool:
        """Whether the value depends on the batch at all."""
        return value in self.samples or value in self.size

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
