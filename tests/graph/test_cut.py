"""The cut rule against its definition, by brute force on random graphs."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from branchynet.graph.cut import cut


@st.composite
def dags(draw):
    """(parents of each node, nodes of each exit); node i reads some earlier nodes."""
    count = draw(st.integers(1, 14))
    parents = [draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else set() for i in range(count)]
    exits = draw(st.lists(st.sets(st.integers(0, count - 1), min_size=1, max_size=3), min_size=1, max_size=5))
    return parents, exits


def reaches(parents):
    """(N, N) whether a path leads from node i to node j, including empty paths: powers of the adjacency matrix."""
    matrix = np.eye(len(parents), dtype=int)
    for child, own in enumerate(parents):
        matrix[list(own), child] = 1
    return np.linalg.matrix_power(matrix, len(parents)) > 0


@given(dags())
def test_a_node_belongs_to_the_first_exit_that_it_is_an_ancestor_of(dag):
    parents, exits = dag
    reach = reaches(parents)
    expected = {}
    for node in range(len(parents)):
        needing = [n for n, needed in enumerate(exits, 1) if reach[node, list(needed)].any()]
        if needing:
            expected[node] = min(needing)
    assert cut(exits, lambda node: parents[node]) == expected


@given(dags())
def test_stages_can_run_one_after_the_other_and_none_does_needless_work(dag):
    parents, exits = dag
    stage = cut(exits, lambda node: parents[node])
    for n, needed in enumerate(exits, 1):
        assert all(stage[node] <= n for node in needed)
    for node, own in stage.items():
        assert all(stage[parent] <= own for parent in parents[node])
        children = [child for child in stage if node in parents[child]]
        wanted = any(node in needed for needed in exits[own - 1 : own])
        assert wanted or any(stage[child] == own for child in children)


def test_very_deep_graphs_and_nodes_of_any_hashable_kind():
    depth = 50_000
    stage = cut([[("layer", 3)], [("layer", depth)]], lambda node: [(node[0], node[1] - 1)] if node[1] else [])
    assert [stage["layer", i] for i in (0, 3, 4, depth)] == [1, 1, 2, 2]
    assert len(stage) == depth + 1


def test_no_exits_need_nothing():
    assert cut([], lambda node: [node]) == {}
