"""Nodes that contain subgraphs (If, Loop, Scan, SequenceMap), and the values that these read from outside."""

from collections.abc import Iterator

import onnx_ir as ir


def graphs_of(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the direct subgraphs of a node."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def nodes_of(graph: ir.Graph) -> Iterator[ir.Node]:
    """Yield all nodes of a graph and of its subgraphs."""
    for node in graph:
        yield from within(node)


def within(node: ir.Node) -> Iterator[ir.Node]:
    """Yield the node and all nodes of its subgraphs."""
    yield node
    for graph in graphs_of(node):
        yield from nodes_of(graph)


def reads(node: ir.Node) -> list[ir.Value]:
    """Return the values that a node reads, each once: its inputs, then values that its subgraphs read from outside."""
    found = dict.fromkeys(v for v in node.inputs if v is not None)
    for graph in graphs_of(node):
        found.update(dict.fromkeys(_captured(graph)))
    return list(found)


def _captured(graph: ir.Graph) -> list[ir.Value]:
    local = {*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)}
    used = [v for node in graph for v in reads(node)] + list(graph.outputs)
    return [v for v in used if v not in local]
