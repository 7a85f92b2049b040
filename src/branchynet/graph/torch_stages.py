"""Cut a network exported by `torch.export` into one torch.fx graph per stage, by the same rule as ONNX graphs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor, fx, nn

from ..errors import GraphError
from ..nn.network import check_policy
from ..policy.scores import resolve
from ..policy.values import Policy
from .cut import Dependence, cut, plan_stages
from .free_lengths import Free
from .lengths import Length
from .torch_flat import TorchGraph, check, place_of, torch_flatten
from .torch_program import name_of

_HEAVY = {
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"),
    *("linear", "bilinear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention"),
    *("lstm", "gru", "rnn_tanh", "rnn_relu"),
}
_LOOKUPS = {"index", "index_select", "gather", "take_along_dim", "index_put", "scatter"}


@dataclass(frozen=True)
class StageInput:
    """A value that a stage takes: its name, and which of its dimensions is the batch (None if none is)."""

    name: str
    axis: int | None


@dataclass(frozen=True, eq=False)
class Stage:
    """The computation between two enabled exits.

    Attributes:
        exit: the number of its exit, from 1.
        module: takes the number of rows (an int), then the values of `takes`; returns a tuple of the exit's output
            `(rows, C, ...)` float32, its score `(rows,)` float32, and the values of `gives`.
        takes: inputs of the network and values of earlier stages, on the rows that remain.
        gives: the values that later stages take.
    """

    exit: int
    module: fx.GraphModule
    takes: tuple[StageInput, ...]
    gives: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Stages:
    """A network cut at its exits.

    Attributes:
        stages: one per enabled exit, in order.
        inputs: the names of the network's inputs in the stages.
        arguments: the names of the same inputs in the network's forward.
        output_shape: the shape of an exit's output, without the batch; 0 for a free length.
        lengths: other dimensions of the inputs that are free.
    """

    stages: tuple[Stage, ...]
    inputs: tuple[str, ...]
    arguments: tuple[str, ...]
    output_shape: tuple[int, ...]
    lengths: tuple[Length, ...]


def cut_stages(net: nn.Module, example: Any, policy: Policy, free: Free | None = None) -> Stages:
    """Cut a network at the exits that `policy` enables; the stages also compute the scores.

    Args:
        net: a network, as for `program_of`. The stages share its parameters and buffers.
        example: one batch of inputs: a tensor, a tuple of tensors, or a dict of keyword arguments.
        policy: N-1 thresholds; an exit with the threshold None is left out together with its branch.
        free: lengths of the inputs that stay free, as for `export`.

    Raises:
        InputError: the number of thresholds is not N-1, the score is unknown, or see `free_program`.
        GraphError: the network branches on tensor values or draws random numbers; a value must cross a cut, but can
            neither be picked by rows nor cheaply recomputed; or see `program_of`. The message names the module and line
            if torch records them.
    """
    check_policy(policy, net, example)
    graph = torch_flatten(net, example, resolve(policy.score), free)
    return Stages(
        stages=cut_graph(graph, policy),
        inputs=tuple(node.name for node in graph.inputs),
        arguments=graph.names,
        output_shape=tuple(d if isinstance(d, int) else 0 for d in graph.outputs[-1].meta["val"].shape[1:]),
        lengths=graph.lengths,
    )


def cut_graph(graph: TorchGraph, policy: Policy) -> tuple[Stage, ...]:
    """Return one stage per exit that `policy` enables. Errors are those of `cut_stages`."""
    exits = [n for n, enabled in enumerate(policy.enabled, 1) if enabled]
    return _Cut(graph, exits, [(graph.outputs[n - 1], graph.scores[n - 1]) for n in exits]).stages()


def uncut(graph: TorchGraph, exit: int, scores: Sequence[int]) -> Stage:
    """Return the computation of an exit's output, and of the scores of some exits, as one stage without decisions.

    Its module returns a tuple of the output and the scores.
    """
    needs = (graph.outputs[exit - 1], *(graph.scores[n - 1] for n in scores))
    (stage,) = _Cut(graph, [exit], [needs]).stages()
    return stage


class _Cut:
    """The state of one cut. Level i, counted from 0, is the stage of the i-th of `exits`; `needs` are its outputs."""

    def __init__(self, flat: TorchGraph, exits: list[int], needs: Sequence[tuple[fx.Node, ...]]) -> None:
        self.flat = flat
        self.exits = exits
        self.needs = needs
        self.stage = cut(self.needs, lambda node: node.all_input_nodes)
        for node in (node for node in flat.nodes if node in self.stage):
            check(node, flat)
            if name_of(node) == "getitem":  # a tuple is unpacked in the stage that computes it
                self.stage[node] = self.stage[node.all_input_nodes[0]]
        for n, (output, *_) in zip(exits, self.needs, strict=True):
            if self._axis(output) != 0:
                raise GraphError(
                    f"exit {n} gives {self._shape(output)}, whose first dimension must be the batch B alone"
                )
        self.stage |= dict.fromkeys(flat.inputs, 0)
        self.plans = plan_stages(
            self.needs,
            self.stage,
            self._taken,
            self._axis,
            self._dependence(),
            lambda node: f"{node.name!r} {self._shape(node)}{place_of(node)}",
        )

    def stages(self) -> tuple[Stage, ...]:
        return tuple(self._stage(i) for i in range(len(self.exits)))

    def _stage(self, i: int) -> Stage:
        graph, plan, constants = fx.Graph(), self.plans[i], {}
        rows = graph.placeholder("rows")
        values = {node: graph.placeholder(node.name) for node in plan.takes}  # node of the flat graph -> node here

        def local(node: fx.Node) -> fx.Node:
            if self._is_batch(node.meta.get("val")):
                return rows
            if node not in values:
                constants[node.name] = self.flat.constants[node]
                values[node] = graph.create_node("get_attr", node.name, name=node.name)
            return values[node]

        for node in self.flat.nodes:
            made = node in plan.recomputes or self.stage.get(node) == i + 1
            if made and node.op == "call_function" and not self._is_batch(node.meta["val"]):
                if i and node.target is torch.ops.aten.as_strided.default:
                    raise GraphError(
                        f"the value {node.name!r}{place_of(node)} is read by strides, but the rows that stay have "
                        "another memory layout; write it with unfold, transpose or indices"
                    )
                values[node] = graph.node_copy(node, local)
                values[node].meta = {}  # it describes the whole batch, and keeps the exporter's state in memory
        graph.output(tuple(local(node) for node in (*self.needs[i], *plan.gives)))
        graph.lint()
        return Stage(
            self.exits[i],
            fx.GraphModule(constants, graph, f"stage_{self.exits[i]}").eval(),
            tuple(StageInput(node.name, axis) for node, axis in plan.takes.items()),
            tuple(node.name for node in plan.gives),
        )

    def _taken(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that a node reads, without those that every stage has."""
        if self._is_batch(node.meta.get("val")):
            return []
        read = [n for n in node.all_input_nodes if n not in self.flat.constants]
        return [n for n in read if not self._is_batch(n.meta["val"])]

    def _dependence(self) -> Dependence[fx.Node]:
        """How the values depend on the batch. Tuples and numbers are recomputed: stages exchange only tensors."""
        dependence = Dependence(self.flat.inputs, [node for node in self.flat.inputs if _is_integer(node)])
        for node in (node for node in self.flat.nodes if node in self.stage):
            _add(dependence, node)
        for node in (node for node in self.flat.nodes if node in self.stage and node not in self.flat.constants):
            repeats = node.target is torch.ops.aten.expand.default  # picking its rows would copy the repeated values
            source = node.all_input_nodes[0] if repeats else node
            if not isinstance(node.meta["val"], Tensor) or (
                repeats and (source in self.flat.constants or dependence.crosses(source, self._axis(source)))
            ):
                dependence.recomputed.add(node)
        return dependence

    def _axis(self, node: fx.Node) -> int | None:
        """Which dimension of a tensor is the batch; None if none or two are."""
        shape = node.meta["val"].shape if isinstance(node.meta["val"], Tensor) else ()
        axes = [axis for axis, dim in enumerate(shape) if self._is_batch(dim)]
        return axes[0] if len(axes) == 1 else None

    def _is_batch(self, size: Any) -> bool:
        return isinstance(size, SymInt) and size.node.expr == self.flat.batch

    def _shape(self, node: fx.Node) -> str:
        value = node.meta["val"]
        shape = value.shape if isinstance(value, Tensor) else ()
        return f"({', '.join(str(d).replace(str(self.flat.batch), 'B') for d in shape)})"


def _add(dependence: Dependence[fx.Node], node: fx.Node) -> None:
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (Tensor, tuple, list))]
    name, lookup = name_of(node), name_of(node) in _LOOKUPS
    sizes = not tensors or not isinstance(node.meta["val"], (Tensor, tuple, list))
    dependence.add(
        node,
        node.all_input_nodes,
        tensors[:1] if lookup else tensors,
        number=True if _is_integer(node) else False if lookup or _dtype(node) is torch.bool else None,
        costly=_costly(node),
        measures=sizes or name.startswith("new_") or name.endswith("_like"),
    )


def _dtype(node: fx.Node) -> torch.dtype | None:
    """The dtype of a tensor; None for other values."""
    return node.meta["val"].dtype if isinstance(node.meta["val"], Tensor) else None


def _is_integer(node: fx.Node) -> bool:
    dtype = _dtype(node)
    return dtype is not None and dtype is not torch.bool and not dtype.is_floating_point and not dtype.is_complex


def _costly(node: fx.Node) -> bool:
    """Whether a node is too expensive to recompute."""
    return name_of(node) in _HEAVY or name_of(node).startswith("wrap_")
