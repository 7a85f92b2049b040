"""Export a PyTorch network to one flat ONNX graph that computes every exit, and simplify it before the cut.

The plain network is exported by the same function, so the baseline gets the same rewrites.
"""

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript import rewriter
from onnxscript.rewriter.rules.common import fuse_batchnorm_into_conv_rule, fuse_batchnorm_into_gemm_rule
from torch import nn

from ..errors import GraphError, first_line
from ..policy.scores import Score
from .free_lengths import Free
from .free_program import free_program
from .lengths import Length
from .onnx_builder import BATCH
from .subgraphs import graphs_of, nodes_of
from .torch_program import quiet_export
from .unsupported import check_writable

OPSET = 20  # the first whose ReduceMin takes booleans; ONNX Runtime 1.17 and later read it
IR_VERSION = 9
_RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}


@dataclass(frozen=True)
class FlatGraph:
    """A flat ONNX graph with every exit's output, and optionally every exit's score.

    Attributes:
        model: its outputs are named ``output_1..N`` and, with scores, ``score_1..N``.
        num_exits: N.
        dynamic: whether the leading dimension of every input is the free symbol ``batch``; otherwise it is fixed at 1.
        lengths: other dimensions of the inputs that are free symbols.
    """

    model: ir.Model
    num_exits: int
    dynamic: bool
    lengths: tuple[Length, ...] = ()

    def names(self, kind: str = "output") -> list[str]:
        """Return the names of every exit's output, or of every exit's score."""
        return [f"{kind}_{n}" for n in range(1, self.num_exits + 1)]

    def value(self, name: str) -> ir.Value:
        """Return the graph output of that name."""
        return next(v for v in self.model.graph.outputs if v.name == name)


def flatten(
    net: nn.Module, example: Any, *, score: Score | None = None, dynamic: bool = True, free: Free | None = None
) -> FlatGraph:
    """Export a network to a flat graph. Arguments and errors are those of `program_of` and `free_program`.

    Raises:
        GraphError: the network draws random numbers, or see `check_writable`.
    """
    program, inputs, lengths = free_program(net, example, score=score, dynamic=dynamic, free=free)
    check_writable(program.exported, inputs)
    names = [f"{kind}_{n}" for kind in program.kinds for n in range(1, program.num_exits + 1)]
    try:
        with torch.no_grad(), quiet_export():
            _promote(program.exported)
            converted = torch.onnx.export(
                program.exported,
                (),
                input_names=inputs,
                output_names=names,
                dynamic_shapes=program.dynamic_shapes,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            assert converted is not None
            model = _tidy(converted.model, names, {BATCH, *(length.name for length in lengths)})
    except Exception as error:  # torch and onnxscript pass on any error of their steps
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise GraphError(f"{type(net).__name__} cannot be written as ONNX: {first_line(cause)}") from error
    if random := sorted({node.op_type for node in nodes_of(model.graph) if _is_random(node)}):
        raise GraphError(
            f"the network draws random numbers in a forward pass ({', '.join(random)}); make eval mode deterministic"
        )
    return FlatGraph(model, program.num_exits, dynamic, lengths)


def _promote(exported: torch.export.ExportedProgram) -> None:
    """Cast integers that are subtracted from a float: torch's converter fails on ``1.0 - mask``."""
    for node in list(exported.graph.nodes):
        if node.target is torch.ops.aten.rsub.Scalar and node.args[0].meta["val"].dtype != node.meta["val"].dtype:
            whole, wanted = node.args[0], node.meta["val"].dtype
            with exported.graph.inserting_before(node):
                cast = exported.graph.call_function(torch.ops.aten.to.dtype, (whole, wanted))
            cast.meta["val"] = whole.meta["val"].to(wanted)
            node.replace_input_with(whole, cast)


def _tidy(model: ir.Model, names: Sequence[str], free: Set[str]) -> ir.Model:
    """Fold constants, fuse and merge nodes, so that shared values are computed once and cross the cut once."""
    passes.InlinePass()(model)
    rewriter.rewrite(model, pattern_rewrite_rules=[fuse_batchnorm_into_conv_rule, fuse_batchnorm_into_gemm_rule])
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.IdentityEliminationPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    _relu_before_pool(model.graph)
    for tidy in (
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.ClearMetadataAndDocStringPass(),
        passes.OutputFixPass(),
        passes.TopologicalSortPass(),
    ):
        tidy(model)
    _own_outputs(model.graph)
    if not any(any(graphs_of(node)) for node in model.graph):  # the pass mistakes their sequences for tensors
        passes.ShapeInferencePass()(model)  # torch gives no shapes for values inside its operators
    _forget_unknown_lengths(model.graph, free)
    for value, name in zip(model.graph.outputs, names, strict=True):  # some passes rename outputs
        value.name = name
    passes.NameFixPass()(model)  # an input may have the name of a value that the exporter added
    model.ir_version = IR_VERSION
    return model


def _forget_unknown_lengths(graph: ir.Graph, free: Set[str]) -> None:
    """Remove symbolic dimensions that are not free: a symbol could have another size in each level of a nested graph.

    A free length has the same size in every level.
    """
    for value in (v for node in nodes_of(graph) for v in node.outputs):
        if value.shape is not None:
            unknown = [set(re.findall(r"[A-Za-z_]\w*", str(d))) - free for d in value.shape]
            value.shape = ir.Shape([None if names else d for d, names in zip(value.shape, unknown, strict=True)])


def _own_outputs(graph: ir.Graph) -> None:
    """Make outputs of subgraphs come from their own nodes; the passes may leave values of the surrounding graph."""
    for inner in (inner for node in nodes_of(graph) for inner in graphs_of(node)):
        for place, value in enumerate(inner.outputs):
            maker = value.producer()
            if maker is None or maker.graph is not inner:
                same = ir.node("Identity", [value])
                output = same.outputs[0]
                output.name, output.type, output.shape = f"{value.name}_out", value.type, value.shape
                inner.append(same)
                inner.outputs[place] = output


def _is_random(node: ir.Node) -> bool:
    if node.op_type == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None:
        training = node.inputs[2].const_value
        return training is None or bool(training.numpy())
    return node.op_type in _RANDOM


def _relu_before_pool(graph: ir.Graph) -> None:
    """Replace ReLU(MaxPool(x)) by the equal MaxPool(ReLU(x)): the runtime can fuse its ReLU into a convolution."""
    for relu in list(graph):
        pool = relu.inputs[0].producer() if relu.op_type == "Relu" and relu.inputs[0] is not None else None
        if pool is None or pool.op_type != "MaxPool" or len(pool.outputs) != 1:
            continue
        pooled, source = pool.outputs[0], pool.inputs[0]
        if len(pooled.uses()) != 1 or pooled.is_graph_output():
            continue
        assert source is not None
        before = ir.node("Relu", [source])
        before.outputs[0].shape, before.outputs[0].type = source.shape, source.type
        before.outputs[0].name = f"{relu.outputs[0].name}_before_pool"
        graph.insert_before(pool, before)
        pool.replace_input_with(0, before.outputs[0])
        ir.convenience.replace_all_uses_with(relu.outputs[0], pooled, replace_graph_outputs=True)
        graph.remove(relu, safe=True)
