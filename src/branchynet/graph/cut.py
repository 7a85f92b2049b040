"""The cut: which stage of the computation a node belongs to.

One rule serves every graph, of whatever origin and shape: ``stage(node) = min{n : node is an ancestor of exit n}``.
Running stage after stage then computes exactly what each exit needs, for chains, residual networks, several inputs and
trees alike.

What a later stage needs of an earlier one is picked by rows, or else computed again: `Dependence` tells which.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

Node = TypeVar("Node", bound=Hashable)


def cut(exits: Sequence[Iterable[Node]], parents: Callable[[Node], Iterable[Node]]) -> dict[Node, int]:
    """The stage of every node that some exit needs, from 1; nodes that none needs are absent.

    Args:
        exits: for each exit, in order, the nodes whose results it gives out.
        parents: the nodes whose results a node reads.
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
    """How the values of a graph depend on the batch. Values are added sources first.

    A value made of the number of samples alone, such as their places in the batch, is another one for a smaller batch,
    so its rows cannot be picked. Numbers that are made of such values inherit this. Features do not, since a sample's
    answer does not depend on its place.

    Attributes:
        samples: values that depend on the samples.
        size: values that depend on how many samples there are, and on nothing else of the batch.
        again: those of both that a smaller batch computes again.
    """

    def __init__(self, inputs: Iterable[Node], integers: Iterable[Node]) -> None:
        self.samples = set(inputs)
        self.size: set[Node] = set()
        self.again: set[Node] = set()
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
        """Add a value that a node makes.

        Args:
            value: it.
            reads: all values that the node reads.
            data: those of `reads` that become part of the value; others say where or how large.
            number: whether the value holds integers; None if that depends on what it is made of, as with casts.
            costly: the node is not to be computed again.
            measures: the node reads the sizes of values alone.
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
            self.again.add(value)
        elif number or (number is None and made_of and self._numbers.issuperset(made_of)):
            self._numbers.add(value)
            if not self.again.isdisjoint(made_of):
                self.again.add(value)
