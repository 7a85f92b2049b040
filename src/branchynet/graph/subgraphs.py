"""Nodes that hold graphs (If, Loop, Scan, SequenceMap): what these read of the graph around them."""

from collections.abc import Iterator

import onnx_ir as ir


def graphs_of(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs that a node holds itself."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def nodes_of(graph: ir.Graph) -> Iterator[ir.Node]:
    """All nodes of a graph, and those of the graphs that they hold."""
    for node in graph:
        yield from within(node)


def within(node: ir.Node) -> Iterator[ir.Node]:
    """The node, and all nodes of the graphs that it holds."""
    yield node
    for graph in graphs_of(node):
        yield from nodes_of(graph)


def reads(node: ir.Node) -> list[ir.Value]:
    """What a node reads: its inputs, then what the graphs that it holds take from around it, each once."""
    found = dict.fromkeys(v for v in node.inputs if v is not None)
    for graph in graphs_of(node):
        found.update(dict.fromkeys(_captured(graph)))
    return list(found)


def _captured(graph: ir.Graph) -> list[ir.Value]:
    own = {*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)}
    used = [v for node in graph for v in reads(node)] + list(graph.outputs)
    return [v for v in used if v not in own]
