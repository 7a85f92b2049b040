"""The cut: which stage of the computation a node belongs to.

One rule serves every graph, of whatever origin and shape: ``stage(node) = min{n : node is an ancestor of exit n}``.
Running stage after stage then computes exactly what each exit needs, for chains, residual networks, several inputs and
trees alike.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

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
