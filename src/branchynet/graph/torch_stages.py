"""Early exits over `torch.export`: one torch.fx graph a stage, cut by the same rule as the ONNX graphs.

A stage takes values of earlier stages on the rows that stay; what cannot be picked by rows is computed again.
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
    """A value that a stage takes: its name, and which of its dimensions is the batch (None: it has no batch)."""

    name: str
    axis: int | None


@dataclass(frozen=True, eq=False)
class Stage:
    """What is left to compute between one enabled exit and the next.

    Attributes:
        exit: its number, from 1.
        module: called with the number of rows (an int), then the values of `takes`; gives a tuple of the exit's output
            `(rows, C, ...)` float32, its score `(rows,)` float32, and the values of `gives`.
        takes: inputs of the network and values of earlier stages, each on the rows that are left.
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
        stages: one an enabled exit, in order.
        inputs: the names under which stages take the network's inputs.
        arguments: the names of the same inputs in the network's own forward.
        output_shape: of an exit's output, without the batch.
    """

    stages: tuple[Stage, ...]
    inputs: tuple[str, ...]
    arguments: tuple[str, ...]
    output_shape: tuple[int, ...]


def cut_stages(net: nn.Module, example: Any, policy: Policy) -> Stages:
    """Cut a network at the exits that `policy` enables, scores included.

    Args:
        net: a `BranchyNet`, or any network; see `branchynet.nn.network.exits_in` for which of its outputs are exits.
            It is exported in eval mode; the stages share its parameters and buffers.
        example: one batch of inputs: a tensor, a tuple of tensors, or a dict of keyword arguments.
        policy: N-1 thresholds; an exit whose threshold is None is left out with its branch.

    Raises:
        InputError: a number of thresholds other than N-1, an unknown score, or one that does not give one number a
            sample; or the example holds no tensors with a leading batch dimension.
        GraphError: the network cannot be exported with a free batch size, decides by the values of tensors, draws
            random numbers, answers as in training, or a value that must cross a cut can neither be picked by rows nor
            cheaply computed again. Each names the module and the line where torch tells them.
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
    """One cut under way; level i, counted from 0, is the stage of the i-th enabled exit."""

    def __init__(self, flat: TorchGraph, exits: list[int]) -> None:
        self.flat = flat
        self.exits = exits
        self.needs = [(flat.outputs[n - 1], flat.scores[n - 1]) for n in exits]
        self.level = {node: n - 1 for node, n in cut(self.needs, lambda node: node.all_input_nodes).items()}
        self.dependence = Dependence(flat.inputs, [node for node in flat.inputs if _is_integer(node)])
        for node in (node for node in flat.nodes if node in self.level):
            check(node, flat)
            if name_of(node) == "getitem":  # the parts of what a node gives out are taken apart where it is made
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
        """A node of the flat graph as level i has it: made there, taken from an earlier level, or computed again."""
        here = self.values[i]
        if node in here:
            return here[node]
        if node in self.flat.constants:
            self.constants[i][node.name] = self.flat.constants[node]
            here[node] = self.graphs[i].create_node("get_attr", node.name, name=node.name)
        elif self._is_batch_size(node):
            here[node] = self.rows[i]
        elif node.op == "placeholder" or (self.level[node] < i and self._crosses(node)):
            self.takes[i][node] = StageInput(node.name, self._axis(node) if self.dependence.varies(node) else None)
            with self.graphs[i].inserting_after(self.last[i]):
                here[node] = self.last[i] = self.graphs[i].placeholder(node.name)
        else:
            self._check_made(node, i)
            here[node] = self.graphs[i].node_copy(node, lambda source: self._local(source, i))
            here[node].meta = {}  # it tells of the whole batch, and holds the exporter's state in memory
        return here[node]

    def _crosses(self, node: fx.Node) -> bool:
        """Whether a later level takes the value: it is the same for every batch, or its rows can be picked."""
        if not isinstance(node.meta["val"], Tensor):
            return False
        if node.target is torch.ops.aten.expand.default:  # picking its rows would write out what it repeats
            source = node.all_input_nodes[0]
            return source not in self.flat.constants and not self._crosses(source)
        if not self.dependence.varies(node):
            return True
        return self._axis(node) is not None and node not in self.dependence.again

    def _axis(self, node: fx.Node) -> int | None:
        """Which dimension of a tensor is the batch; None where none is, or where two are."""
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
                "none of its dimensions is the batch B, so that the samples that stay cannot be picked from it; tap "
                "where the batch stands alone"
            )
        if i and node.target is torch.ops.aten.as_strided.default:
            raise GraphError(
                f"the value {node.name!r}{place_of(node)} is read by strides, but the rows that stay lie in memory in "
                "another way; write it with unfold, transpose or indices"
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
    """Of a tensor; None for all else."""
    return node.meta["val"].dtype if isinstance(node.meta["val"], Tensor) else None


def _is_integer(node: fx.Node) -> bool:
    dtype = _dtype(node)
    return dtype is not None and dtype is not torch.bool and not dtype.is_floating_point and not dtype.is_complex


def _costly(node: fx.Node) -> bool:
    """Whether a node is too much work to be done again."""
    return name_of(node) in _HEAVY or name_of(node).startswith("wrap_")
