"""Cut a network exported by `torch.export` into one torch.fx graph per stage, by the same rule as ONNX graphs.

A stage takes values of earlier stages on the rows that stay; values that cannot be picked by rows are recomputed.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor, fx, nn

from ..errors import GraphError, InputError
from ..nn.calls import arguments
from ..nn.network import count_exits
from ..policy.scores import resolve
from ..policy.values import Policy
from .cut import Dependence, cut
from .onnx_flat import input_names
from .torch_flat import TorchGraph, check, name_of, place_of, torch_flatten

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
    """The computation between one enabled exit and the next.

    Attributes:
        exit: the number of its exit, from 1.
        module: takes the number of rows (an int), then the values of `takes`; returns a tuple of the exit's output
            `(rows, C, ...)` float32, its score `(rows,)` float32, and the values of `gives`.
        takes: inputs of the network and values of earlier stages, each on the rows that remain.
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
        output_shape: the shape of an exit's output, without the batch.
    """

    stages: tuple[Stage, ...]
    inputs: tuple[str, ...]
    arguments: tuple[str, ...]
    output_shape: tuple[int, ...]


def cut_stages(net: nn.Module, example: Any, policy: Policy) -> Stages:
    """Cut a network at the exits that `policy` enables; the stages also compute the scores.

    Args:
        net: a `BranchyNet`, or any network; see `branchynet.nn.network.exit_outputs` for which outputs are exits. It is
            exported in eval mode; the stages share its parameters and buffers.
        example: one batch of inputs: a tensor, a tuple of tensors, or a dict of keyword arguments.
        policy: N-1 thresholds; an exit with the threshold None is left out together with its branch.

    Raises:
        InputError: the number of thresholds is not N-1; the score is unknown, or does not return one number per sample;
            or the example holds no tensors with a leading batch dimension.
        GraphError: the network cannot be exported with a free batch size, branches on tensor values, draws random
            numbers, or answers as in training; or a value that must cross a cut can neither be picked by rows nor
            cheaply recomputed. The message names the module and line if torch records them.
    """
    exits = count_exits(net, example)
    if policy.num_exits != exits:
        raise InputError(f"the policy has {len(policy.thresholds)} thresholds; {exits} exits need {exits - 1}")
    args, kwargs = arguments(example)
    graph = torch_flatten(net, example, resolve(policy.score))
    return Stages(
        stages=_Cut(graph, [n for n, enabled in enumerate(policy.enabled, 1) if enabled]).stages(),
        inputs=tuple(node.name for node in graph.inputs),
        arguments=tuple(input_names(net, len(args), tuple(kwargs))),
        output_shape=tuple(graph.outputs[-1].meta["val"].shape[1:]),
    )


class _Cut:
    """The state of one cut. Level i, counted from 0, is the stage of the i-th enabled exit."""

    def __init__(self, flat: TorchGraph, exits: list[int]) -> None:
        self.flat = flat
        self.exits = exits
        self.needs = [(flat.outputs[n - 1], flat.scores[n - 1]) for n in exits]
        self.level = {node: n - 1 for node, n in cut(self.needs, lambda node: node.all_input_nodes).items()}
        self.dependence = Dependence(flat.inputs, [node for node in flat.inputs if _is_integer(node)])
        for node in (node for node in flat.nodes if node in self.level):
            check(node, flat)
            if name_of(node) == "getitem":  # a tuple is unpacked in the stage that computes it
                self.level[node] = self.level[node.all_input_nodes[0]]
            _add(self.dependence, node)
        for n, (output, _) in zip(exits, self.needs, strict=True):
            if self._axis(output) != 0:
                raise GraphError(
                    f"exit {n} gives {self._shape(output)}, whose first dimension must be the batch B alone"
                )
        self.graphs = [fx.Graph() for _ in exits]
        self.last = [graph.placeholder("rows") for graph in self.graphs]  # of the placeholders, which come first
        self.rows = list(self.last)
        self.values: list[dict[fx.Node, fx.Node]] = [{} for _ in exits]  # node of the flat graph -> node at that level
        self.takes: list[dict[fx.Node, StageInput]] = [{} for _ in exits]
        self.constants: list[dict[str, Any]] = [{} for _ in exits]

    def stages(self) -> tuple[Stage, ...]:
        for i, needs in enumerate(self.needs):
            made_here = (n for n in self.flat.nodes if n.op == "call_function" and self.level.get(n) == i)
            for node in (*made_here, *needs):
                self._local(node, i)
        return tuple(self._stage(i) for i in range(len(self.exits)))

    def _stage(self, i: int) -> Stage:
        taken_later = {node: taken.name for takes in self.takes[i + 1 :] for node, taken in takes.items()}
        gives = {node: name for node, name in taken_later.items() if self.level[node] == i and node.op != "placeholder"}
        graph = self.graphs[i]
        graph.output(tuple(self.values[i][node] for node in (*self.needs[i], *gives)))
        graph.lint()
        module = fx.GraphModule(self.constants[i], graph, f"stage_{self.exits[i]}")
        return Stage(self.exits[i], module.eval(), tuple(self.takes[i].values()), tuple(gives.values()))

    def _local(self, node: fx.Node, i: int) -> fx.Node:
        """The node at level i for a node of the flat graph: computed there, taken from before, or recomputed."""
        values = self.values[i]
        if node in values:
            return values[node]
        if node in self.flat.constants:
            self.constants[i][node.name] = self.flat.constants[node]
            values[node] = self.graphs[i].create_node("get_attr", node.name, name=node.name)
        elif self._is_batch_size(node):
            values[node] = self.rows[i]
        elif node.op == "placeholder" or (self.level[node] < i and self._crosses(node)):
            self.takes[i][node] = StageInput(node.name, self._axis(node) if self.dependence.varies(node) else None)
            with self.graphs[i].inserting_after(self.last[i]):
                values[node] = self.last[i] = self.graphs[i].placeholder(node.name)
        else:
            self._check_made(node, i)
            values[node] = self.graphs[i].node_copy(node, lambda source: self._local(source, i))
            values[node].meta = {}  # it describes the whole batch, and keeps the exporter's state in memory
        return values[node]

    def _crosses(self, node: fx.Node) -> bool:
        """Whether a later level can take the value: it is the same for every batch, or its rows can be picked."""
        if not isinstance(node.meta["val"], Tensor):
            return False
        if node.target is torch.ops.aten.expand.default:  # picking its rows would copy the repeated values
            source = node.all_input_nodes[0]
            return source not in self.flat.constants and not self._crosses(source)
        if not self.dependence.varies(node):
            return True
        return self._axis(node) is not None and node not in self.dependence.recomputed

    def _axis(self, node: fx.Node) -> int | None:
        """Which dimension of a tensor is the batch; None if none or two are."""
        shape = node.meta["val"].shape if isinstance(node.meta["val"], Tensor) else ()
        axes = [axis for axis, dim in enumerate(shape) if self._is_batch(dim)]
        return axes[0] if len(axes) == 1 else None

    def _is_batch(self, size: Any) -> bool:
        return isinstance(size, SymInt) and size.node.expr == self.flat.batch

    def _is_batch_size(self, node: fx.Node) -> bool:
        return self._is_batch(node.meta.get("val"))

    def _check_made(self, node: fx.Node, i: int) -> None:
        if self.level[node] < i and _costly(node):
            raise GraphError(
                f"the value {node.name!r} {self._shape(node)}{place_of(node)} crosses from one stage to the next, but "
                "none of its dimensions is the batch B alone, so the samples that stay cannot be picked from it; tap "
                "a submodule whose output has the batch as a dimension"
            )
        if i and node.target is torch.ops.aten.as_strided.default:
            raise GraphError(
                f"the value {node.name!r}{place_of(node)} is read by strides, but the rows that stay have another "
                "memory layout; write it with unfold, transpose or indices"
            )

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
