"""From a PyTorch network to one flat ONNX graph that computes every exit, tidied before it is cut.

The static baseline goes through the same function, so that it gets every rewrite that our graphs get.
"""

import contextlib
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript import rewriter
from onnxscript.rewriter.rules.common import fuse_batchnorm_into_conv_rule, fuse_batchnorm_into_gemm_rule
from torch import Tensor, nn

from ..errors import GraphError, InputError
from ..net import BranchyNet, arguments, evaluating, tensor_of
from ..scores import Score
from .section import BATCH, reserved

OPSET = 18  # old enough for every runtime in use, new enough for the exporter
IR_VERSION = 8
_RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}


@dataclass(frozen=True)
class FlatGraph:
    """A flat ONNX graph with every exit's output, and its score where asked for.

    Attributes:
        model: outputs are named ``output_1..N`` and, with scores, ``score_1..N``.
        exits: N.
        dynamic: whether the leading dimension of every input is the free symbol ``batch``, or fixed at 1.
    """

    model: ir.Model
    exits: int
    dynamic: bool

    def value(self, name: str) -> ir.Value:
        """The graph output of that name."""
        return next(v for v in self.model.graph.outputs if v.name == name)


def tensors_of(example: Any) -> tuple[Tensor, ...]:
    """The tensors of an example, positional ones first. Raises `InputError` where they are not one batch of tensors."""
    args, kwargs = arguments(example)
    tensors = (*args, *kwargs.values())
    if not tensors or not all(isinstance(t, Tensor) and t.dim() > 0 and len(t) for t in tensors):
        raise InputError("example must be a tensor, or a tuple or dict of tensors, each with a leading batch dimension")
    if len({len(t) for t in tensors}) > 1:
        raise InputError(f"the tensors of the example have batch sizes {[len(t) for t in tensors]}; they must agree")
    return tuple(t.detach() for t in tensors)


def flatten(net: nn.Module, example: Any, *, score: Score | None = None, dynamic: bool = True) -> FlatGraph:
    """Export a network to a flat graph: all exits' outputs and, with `score`, their scores.

    Args:
        net: a `BranchyNet`, or any network, which then has one exit. It is exported in eval mode.
        example: one batch of inputs: a tensor, a tuple of tensors, or a dict of keyword arguments.
        score: computed in the graph for every exit.
        dynamic: leave the batch size free; else it is fixed at 1.

    Raises:
        InputError: the example holds no tensors with a leading batch dimension, or `score` does not give one number a
            sample.
        GraphError: the network cannot be exported (its own message is kept), or draws random numbers.
    """
    args, kwargs = arguments(example)
    tensors = tensors_of(example)
    rows = 2 if dynamic else 1  # a batch of 1 in the example would be taken as a constant
    tensors = tuple(_rows(t, rows) for t in tensors)
    with evaluating(net), torch.no_grad(), _quiet():
        exits = _AllExits(net, score, tuple(kwargs)).eval()
        kinds = ("output",) if score is None else ("output", "score")
        outputs = len(exits(*tensors)) // len(kinds)
        names = [f"{kind}_{n}" for kind in kinds for n in range(1, outputs + 1)]
        free = {0: torch.export.Dim(BATCH)} if dynamic else None
        try:
            program = torch.onnx.export(
                exits,
                tensors,
                input_names=input_names(net, len(args), tuple(kwargs)),
                output_names=names,
                dynamic_shapes=(tuple(free for _ in tensors),),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except (RuntimeError, ValueError, TypeError, NotImplementedError, torch.onnx.errors.OnnxExporterError) as error:
            raise GraphError(f"{type(net).__name__} cannot be exported to ONNX: {_first_cause(error)}") from error
    assert program is not None
    model = _tidy(program.model, names)
    random = sorted({node.op_type for node in model.graph if _is_random(node)})
    if random:
        raise GraphError(
            f"the network draws random numbers when it answers ({', '.join(random)}); make eval mode deterministic"
        )
    return FlatGraph(model, outputs, dynamic)


def input_names(net: nn.Module, count: int, keywords: Sequence[str] = ()) -> list[str]:
    """Names of the first `count` positional arguments of the network's own forward, then `keywords`.

    A name that the graph needs for itself gets an underscore behind it.
    """
    forward = (net.backbone if isinstance(net, BranchyNet) else net).forward
    own = [p.name for p in inspect.signature(forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    names: list[str] = []
    for name in (*(own[i] if i < len(own) else f"input_{i + 1}" for i in range(count)), *keywords):
        while reserved(name) or re.fullmatch(r"(output|score)_\d+", name) or name in names:
            name += "_"
        names.append(name)
    return names


class _AllExits(nn.Module):
    """Outputs, then scores, as one tuple; the last of its positional inputs go to the network by keyword."""

    def __init__(self, net: nn.Module, score: Score | None, keywords: tuple[str, ...]) -> None:
        super().__init__()
        self.net = net
        self.score = score
        self.keywords = keywords

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = self._outputs(inputs)
        if self.score is None:
            return outputs
        scores = [self.score(outputs[: n + 1]) for n in range(len(outputs))]
        for n, (score, output) in enumerate(zip(scores, outputs, strict=True), 1):
            if not isinstance(score, Tensor) or score.shape != output.shape[:1]:
                given = f"shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
                raise InputError(
                    f"the score gives {given} for output {tuple(output.shape)} at exit {n}; it must give one number a "
                    "sample, (B,): reduce the other dimensions in a callable"
                )
        return (*outputs, *(score.float() for score in scores))

    def _outputs(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        positional = len(inputs) - len(self.keywords)
        outputs = self.net(*inputs[:positional], **dict(zip(self.keywords, inputs[positional:], strict=True)))
        outputs = outputs if isinstance(self.net, BranchyNet) else (tensor_of(outputs, "the network's output"),)
        for n, output in enumerate(outputs, 1):
            if output.dim() < 2 or output.shape[1:] != outputs[-1].shape[1:]:
                raise GraphError(
                    f"exit {n} gives shape {tuple(output.shape)} and the last exit {tuple(outputs[-1].shape)}; "
                    "all exits must give (B, C, ...) of one shape: give every branch as many outputs as the backbone"
                )
        return tuple(output.float() for output in outputs)


def _rows(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat([tensor] * rows)[:rows] if tensor.shape[0] < rows else tensor[:rows]


def _tidy(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """Fold, fuse and merge, so that what trunk and branches share is computed and carried across the cut once."""
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
    for value, name in zip(model.graph.outputs, names, strict=True):  # some passes name an output anew
        value.name = name
    passes.NameFixPass()(model)  # an input may be called like a value that the exporter has named
    model.ir_version = IR_VERSION
    return model


def _is_random(node: ir.Node) -> bool:
    if node.op_type == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None:
        training = node.inputs[2].const_value
        return training is None or bool(training.numpy())
    return node.op_type in _RANDOM


def _relu_before_pool(graph: ir.Graph) -> None:
    """ReLU(MaxPool(x)) becomes MaxPool(ReLU(x)): equal, and the runtime can fuse the ReLU into a convolution."""
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


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    told = lines[0] if lines else type(error).__name__
    if "data-dependent" in told:
        told += "; its forward decides by a tensor's values: write that with torch.where"
    return told


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notices about packages that are not there and its own deprecations; errors still raise."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
