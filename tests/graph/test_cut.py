"""The cut rule against its definition, by brute force on random graphs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchynet.errors import GraphError
from branchynet.graph.cut import Dependence, cut, plan_stages


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


@given(dags(), st.data())
def test_a_stage_has_every_value_that_it_reads(dag, data):
    parents, exits = dag
    nodes = range(len(parents))
    kinds = data.draw(st.lists(st.sampled_from(["rows", "none", "whole"]), min_size=len(nodes), max_size=len(nodes)))
    inputs = [node for node in nodes if not parents[node]]
    stage = cut(exits, lambda node: parents[node]) | dict.fromkeys(inputs, 0)
    dependence = Dependence(["batch"], [])
    dependence.samples |= {node for node in nodes if kinds[node] != "whole" or node in inputs}
    axes = {node: 0 if kinds[node] == "rows" or node in inputs else None for node in nodes}
    plans = plan_stages(exits, stage, lambda node: parents[node], axes.get, dependence, str)
    for n, (plan, needed) in enumerate(zip(plans, exits, strict=True), 1):
        made = {node for node, own in stage.items() if own == n} | plan.recomputes
        assert made.isdisjoint(plan.takes) and made | plan.takes.keys() >= {
            *needed,
            *(p for m in made for p in parents[m]),
        }
        read = {*needed, *(parent for node in made for parent in parents[node])}
        assert read >= plan.takes.keys() | plan.recomputes
        for node, axis in plan.takes.items():
            assert stage[node] < n and axis == (0 if kinds[node] == "rows" or node in inputs else None)
            assert stage[node] == 0 or node in plans[stage[node] - 1].gives
            assert node in inputs or kinds[node] != "none"
        assert all(stage[node] < n and kinds[node] == "none" for node in plan.recomputes)
        assert set(plan.gives) == {node for later in plans[n:] for node in later.takes if stage[node] == n}


def test_a_costly_value_without_rows_cannot_cross():
    chain = {"x": [], "product": ["x"], "one": ["product"], "two": ["product"]}
    stage = cut([["one"], ["two"]], chain.__getitem__) | {"x": 0}
    dependence = Dependence(["x"], [])
    for node in ("product", "one", "two"):
        dependence.add(node, chain[node], chain[node], number=False, costly=node == "product")
    arguments = ([["one"], ["two"]], stage, chain.__getitem__)
    assert plan_stages(*arguments, lambda node: 0, dependence, str)[1].takes == {"product": 0}
    with pytest.raises(GraphError, match="the value product crosses from one stage to the next"):
        plan_stages(*arguments, lambda node: 0 if node == "x" else None, dependence, str)
