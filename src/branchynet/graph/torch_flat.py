"""Export a PyTorch network to one flat torch.fx graph that computes every exit, and simplify it before the cut.

The graph is functional and keeps PyTorch's operators (`linear`, `conv2d`). It shares the parameters and buffers of the
network.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import tree_leaves

from ..errors import GraphError
from ..policy.scores import Score
from .free_lengths import Free
from .free_program import free_program
from .lengths import Length
from .torch_program import (
    NOT_THE_NETWORKS,
    argument_of,
    export_failure,
    name_of,
    quiet_export,
    readable_path,
)

_aten = torch.ops.aten
_ANY_LAYOUT = {_aten.view.default: _aten.reshape.default, _aten._unsafe_view.default: _aten.reshape.default}
_SWITCHES = ("dropout_p", "p", "train", "training")  # if one of these arguments is 0 or False, nothing is random


@dataclass(frozen=True, eq=False)
class TorchGraph:
    """A functional graph with every exit's output and score.

    Attributes:
        nodes: all nodes, in topological order.
        inputs: the network's inputs.
        outputs, scores: one per exit.
        constants: the parameter, buffer, constant or submodule of each node that represents one.
        batch: the symbol of the batch size.
        names: the names of the inputs in the network's forward.
        lengths: other dimensions of the inputs that are free.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    scores: tuple[fx.Node, ...]
    constants: dict[fx.Node, Any]
    batch: Any
    names: tuple[str, ...]
    lengths: tuple[Length, ...]


def torch_flatten(net: nn.Module, example: Any, score: Score, free: Free | None = None) -> TorchGraph:
    """Export a network to one graph. Arguments and errors are those of `free_program`."""
    program, names, lengths = free_program(net, example, score=score, free=free)
    with torch.no_grad(), quiet_export():
        try:  # decomposes no operator, but makes the graph functional
            exported = program.exported.run_decompositions({})
        except Exception as error:
            raise GraphError(export_failure(error, program.whole, net)) from error
    signature, graph = exported.graph_signature, exported.graph
    constants = _constants(exported, program.whole)
    inputs = tuple(node for node in graph.nodes if node.name in signature.user_inputs)
    _tidy(graph)
    returned: Any = graph.output_node().args[0]
    results = returned[-len(signature.user_outputs) :]  # before them come inputs that the network overwrites
    batch = inputs[0].meta["val"].shape[0].node.expr
    outputs, scores = results[: program.num_exits], results[program.num_exits :]
    return TorchGraph(tuple(graph.nodes), inputs, outputs, scores, constants, batch, tuple(names), lengths)


def check(node: fx.Node, graph: TorchGraph) -> None:
    """Check that a node can compute each sample on its own.

    Raises:
        GraphError: the node draws random numbers, converts tensor values to Python numbers, or branches for a whole
            batch.
    """
    inner = graph.constants.get(node)
    for one in (node, *(inner.graph.nodes if isinstance(inner, fx.GraphModule) else ())):
        what = f"{name_of(one)!r}{place_of(one)}"
        values = [v for v in tree_leaves(one.meta.get("val")) if isinstance(v, (Tensor, SymInt, SymFloat, SymBool))]
        if any(free_unbacked_symbols(v) for v in values):
            raise GraphError(
                f"{what} makes a shape or a Python number of a tensor's values, which differ from sample to sample; "
                "write that with torch.where"
            )
        if _is_random(one):
            raise GraphError(f"{what} draws random numbers; make eval mode deterministic")
        if isinstance(one.target, torch._ops.HigherOrderOperator) and not name_of(one).startswith("wrap_"):
            raise GraphError(f"{what} decides for a whole batch at once; write that with torch.where")


def place_of(node: fx.Node) -> str:
    """Return the module and line of a node as far as torch records them, such as `` in 'layers.0' at net.py:12``."""
    modules = [readable_path(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
    frames = [text for text in node.meta.get("stack_trace", "").splitlines() if text.startswith('  File "')]
    lines = [text.split('"')[1] + ":" + text.split("line ")[1].split(",")[0] for text in frames]
    lines = [text for text in lines if not text.startswith(NOT_THE_NETWORKS)]
    return (f" in {modules[-1]!r}" if modules and modules[-1] else "") + (f" at {lines[-1]}" if lines else "")


def _constants(exported: torch.export.ExportedProgram, whole: nn.Module) -> dict[fx.Node, Any]:
    signature = exported.graph_signature
    paths = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    constants: dict[fx.Node, Any] = {}
    for node in exported.graph.nodes:
        if node.op == "get_attr":
            constants[node] = operator.attrgetter(str(node.target))(exported.graph_module)
        elif node.name in paths:
            path, _, attribute = paths[node.name].rpartition(".")
            held = getattr(whole.get_submodule(path), attribute)  # None before the first forward pass
            constants[node] = exported.state_dict[paths[node.name]] if held is None else held
        elif node.name in lifted:
            constants[node] = exported.constants[lifted[node.name]]
    return constants


def _tidy(graph: fx.Graph) -> None:
    """Remove copies and merge common subexpressions, so that shared values cross the cut once."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        # Rows picked from a transposed value have another memory layout, so a view may have to copy.
        node.target = _ANY_LAYOUT.get(node.target, node.target)
        twin: Any = seen.setdefault((node.target, _key(node.args), _key(node.kwargs)), node)
        if node.target is _aten.clone.default and "memory_format" not in node.kwargs:
            twin = node.args[0]  # nothing overwrites it
        if twin is not node:
            node.replace_all_uses_with(twin)
            graph.erase_node(node)


def _key(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_key(v) for v in value)
    if isinstance(value, dict):
        return tuple((name, _key(v)) for name, v in value.items())
    return type(value), value  # 1, 1.0 and True are equal, but make different dtypes


def _is_random(node: fx.Node) -> bool:
    tags: Sequence[Any] = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded not in tags:
        return False
    switches = [argument_of(node, name) for name in _SWITCHES]
    return all(value is None or value for value in switches)
