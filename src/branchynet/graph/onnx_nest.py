"""Nest early exits in one ONNX graph: stage n+1 is in the ``else`` branch of an ``If`` after exit n.

In a batch, NonZero and Gather pick the samples that stay, in every value that crosses the cut, and ScatterND puts their
answers back. So one file with a free batch size skips work per sample.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..policy.exit_rule import as_deployed
from ..policy.values import Policy
from .cut import cut
from .onnx_builder import BOOL, FLOAT, INT64, GraphBuilder
from .onnx_cut import batch_axis, cut_graph, parents
from .onnx_flat import IR_VERSION, OPSET, FlatGraph
from .subgraphs import reads

_SHARED_BYTES = 1 << 16  # larger initializers that several stages use are stored once, in the outermost stage


def nest(flat: FlatGraph, policy: Policy, *, thresholds: str = "default") -> ir.Model:
    """Nest the exits that `policy` enables.

    The inputs of the model are the inputs of the network and, per enabled exit except the last, a ``threshold_n``
    float32 (1,); a required one may also have one number per sample. Its outputs are ``label`` int64, ``exit`` int64
    (from 1), ``score`` float32 and ``output`` float32, each with a leading batch dimension.

    Args:
        flat: a flat graph with scores.
        policy: N-1 thresholds; an exit with the threshold None is left out together with its branch.
        thresholds: ``"default"`` gives the threshold inputs default values; ``"input"`` makes them required.

    Raises:
        GraphError: a value that must cross a cut has no batch dimension and is too costly to recompute.
    """
    return _NestedGraph(flat, policy).model(required_thresholds=thresholds == "input")


def flat_model(flat: FlatGraph, outputs: Sequence[str], label: str) -> ir.Model:
    """Return the part of a flat graph that computes the named outputs, and the ``label`` of one of them.

    A single output is named ``output``.
    """
    needed = [flat.value(name) for name in outputs]
    stage = cut([[v] for v in needed], parents)
    section = GraphBuilder(1)
    inputs = _copy_inputs(flat, section)
    for node in flat.model.graph:
        if any(v in stage for v in node.outputs):
            for v in reads(node):
                if v.is_initializer() and v not in section.values:
                    section.values[v] = section.copy_initializer(v)
            section.copy_node(node, section.values.__getitem__)
    results = [section.values[v] for v in needed]
    labels = _label(section, section.values[flat.value(label)])
    labels.name = "label"
    if len(results) == 1:
        results[0].name = "output"
    return _finish(section.graph(inputs, [labels, *results], "flat", opset_imports={"": OPSET}))


class _NestedGraph:
    """The state of one nesting. `sections[i]` holds the stage of the i-th enabled exit, counted from 0."""

    def __init__(self, flat: FlatGraph, policy: Policy) -> None:
        self.flat = flat
        self.policy = policy
        found = cut_graph(flat, policy)
        self.exits, self.needs, self.stage, self.plans = found.exits, found.needs, found.stage, found.plans
        self.sections = [GraphBuilder(i + 1) for i in range(len(self.exits))]
        self.thresholds: list[ir.Value] = []
        self.per_sample = False  # whether the thresholds may have one number per sample
        self.zeros: ir.Value | None = None  # one per sample, made where thresholds per sample need it
        self.index: dict[tuple[int, int], ir.Value] = {}  # (i, j): the rows of level i's batch that reach level j

    def model(self, required_thresholds: bool) -> ir.Model:
        outermost, self.per_sample = self.sections[0], required_thresholds and self.flat.dynamic
        inputs = _copy_inputs(self.flat, outermost)
        for n in self.exits[:-1]:
            threshold = self.policy.thresholds[n - 1]
            name = f"threshold_{n}"
            value = ir.val(name, ir.DataType.FLOAT, [f"rows_of_{name}" if self.per_sample else 1])
            if not required_thresholds:
                value.const_value = ir.tensor(as_deployed([threshold]), name=name)
                outermost.initializers[name] = value
            self.thresholds.append(value)
        output, score, exit = self._level(0)
        results = [_label(outermost, output), exit, score, output]
        for value, name in zip(results, ("label", "exit", "score", "output"), strict=True):
            value.name = name
        graph = outermost.graph([*inputs, *self.thresholds], results, "branchynet", opset_imports={"": OPSET})
        return _finish(graph)

    def _level(self, i: int) -> list[ir.Value]:
        """Emit level i with all later levels nested in it, and return its [output, score, exit] for its whole batch.

        The last of several levels omits the exit, because the level around it has already numbered these samples.
        """
        section = self.sections[i]
        for node in self.flat.model.graph:
            if any(self.stage.get(v) == i + 1 for v in node.outputs):
                section.copy_node(node, lambda v: self._localize(v, i))
        output, score = (self._localize(v, i) for v in self.needs[i])
        batch: list[int | str] = [section.batch if self.flat.dynamic else 1]
        if i + 1 == len(self.exits):
            if i:
                return [output, score]
            number = self._zeros(i, score, INT64)
            last = section.constant("last", np.array([self.exits[i]], np.int64))
            exit = section.op("Add", [last, number], name="exit", type=INT64, shape=batch)
            return [output, score, exit]
        leaves = section.op("Less", [score, self._threshold(i)], name="leaves", type=BOOL, shape=batch)
        exit = self._number(i, leaves)
        merged = self._if(i, leaves, [output, score] + ([exit] if i + 2 < len(self.exits) else []))
        return merged if len(merged) == 3 else [*merged, exit]

    def _threshold(self, i: int) -> ir.Value:
        """The thresholds of level i: (1,), or one for each of its samples if they may be given per sample."""
        threshold, section = self.thresholds[i], self.sections[i]
        if i == 0 or not self.per_sample:
            return threshold
        if self.zeros is None:
            self.zeros = self._zeros(0, self._localize(self.needs[0][1], 0), FLOAT)
        rows = self.sections[0].op(
            "Add", [threshold, self.zeros], name=f"{threshold.name}/rows", type=FLOAT, shape=self.zeros.shape
        )
        return section.op(
            "Gather", [rows, self._rows(0, i)], {"axis": 0}, name=f"{threshold.name}/stay", type=FLOAT,
            shape=[section.batch],
        )  # fmt: skip

    def _zeros(self, i: int, score: ir.Value, dtype: ir.TensorType) -> ir.Value:
        """A zero for every sample of level i.

        Not made with Shape: plain OpenVINO miscomputes a quantized convolution if a ShapeOf reads its output.
        """
        section = self.sections[i]
        least = section.constant("least", np.array([-np.inf], np.float32))
        never = section.op("Less", [score, least], name="never", type=BOOL, shape=score.shape)
        return section.op("Cast", [never], {"to": dtype.dtype}, name="none", type=dtype, shape=score.shape)

    def _number(self, i: int, leaves: ir.Value) -> ir.Value:
        """The exit of every sample, as if the next exit were the last: ``next - leaves * (next - this)``.

        This form was the fastest of those measured at batch 1; a Where took a microsecond longer.
        """
        section, (this, later) = self.sections[i], self.exits[i : i + 2]
        number = section.op("Cast", [leaves], {"to": ir.DataType.INT64}, name="left", type=INT64, shape=leaves.shape)
        if later - this > 1:
            gap = section.constant("gap", np.array([later - this], np.int64))
            number = section.op("Mul", [number, gap], name="nearer", type=INT64, shape=leaves.shape)
        next_exit = section.constant("next", np.array([later], np.int64))
        return section.op("Sub", [next_exit, number], name="exit", type=INT64, shape=leaves.shape)

    def _if(self, i: int, leaves: ir.Value, results: list[ir.Value]) -> list[ir.Value]:
        """The rest of the network for the samples that stay; a NaN score is not below a threshold, so it stays."""
        section, deeper = self.sections[i], self.sections[i + 1]
        if self.flat.dynamic:
            condition = section.op("ReduceMin", [leaves], {"keepdims": 0}, name="all_leave", type=BOOL, shape=[])
            stays = deeper.op("Not", [leaves], name="stays", type=BOOL, shape=leaves.shape)
            found = deeper.op("NonZero", [stays], name="found", type=INT64, shape=[1, deeper.batch])
            flat_shape = deeper.constant("flat", np.array([-1], np.int64))
            rows = deeper.op("Reshape", [found, flat_shape], name="stay", type=INT64, shape=[deeper.batch])
            self.index[i, i + 1] = rows
            answers = self._level(i + 1)[: len(results)]
            column = deeper.constant("column", np.array([-1, 1], np.int64))
            places = deeper.op("Reshape", [rows, column], name="places", type=INT64, shape=[deeper.batch, 1])
            then = [
                deeper.op("ScatterND", [v, places, a], name=f"merged_{k}", type=v.type, shape=v.shape)
                for k, (v, a) in enumerate(zip(results, answers, strict=True))
            ]
        else:
            condition = leaves
            then = self._level(i + 1)[: len(results)]
            made = {v for node in deeper.nodes for v in node.outputs}
            then = [  # outputs of a subgraph must come from its own nodes
                v if v in made else deeper.op("Identity", [v], name=f"same_{k}", type=v.type, shape=v.shape)
                for k, v in enumerate(then)
            ]
        leave = GraphBuilder(i + 2)
        stay_as = [
            leave.op("Identity", [v], name=f"kept_{k}", type=v.type, shape=v.shape) for k, v in enumerate(results)
        ]
        branches = {
            "then_branch": leave.graph([], stay_as, f"leave_{self.exits[i]}"),
            "else_branch": deeper.graph([], then, f"stage_{self.exits[i + 1]}"),
        }
        node = ir.node("If", [condition], branches, num_outputs=len(results), name=section.own("gate"))
        for k, (new, old) in enumerate(zip(node.outputs, results, strict=True)):
            new.name, new.type, new.shape = section.own(f"answer_{k}"), old.type, old.shape
        section.nodes.append(node)
        return list(node.outputs)

    def _localize(self, value: ir.Value, i: int) -> ir.Value:
        """The value at level i for a value of the flat graph: local, captured, gathered, or recomputed."""
        section, takes = self.sections[i], self.plans[i].takes
        if value in section.values:
            return section.values[value]
        if value.is_initializer():
            local = self._initializer(value, i)
        elif value not in takes:  # recomputed, such as a shape or a mask
            node = value.producer()
            assert node is not None
            local = self._shape(node, i)
            if local is None:
                section.copy_node(node, lambda v: self._localize(v, i))
                local = section.values[value]
        else:
            home = self._home(value, i)
            local = self.sections[home].values[value]
            if (axis := takes[value]) is not None:
                shape = [section.dim(d) for d in value.shape or ()]
                local = section.op(
                    "Gather", [local, self._rows(home, i)], {"axis": axis}, name=f"{value.name}/stay", type=value.type,
                    shape=shape,
                )  # fmt: skip
        section.values[value] = local
        return local

    def _home(self, value: ir.Value, i: int) -> int:
        """The last level before i that holds the value."""
        return next(j for j in range(i - 1, -1, -1) if value in self.sections[j].values)

    def _rows(self, home: int, i: int) -> ir.Value:
        """Which rows of level `home`'s batch make up level i's batch."""
        if (home, i) not in self.index:
            before, section = self._rows(home, i - 1), self.sections[i]
            self.index[home, i] = section.op(
                "Gather", [before, self.index[i - 1, i]], {"axis": 0}, name=f"stay_of_{home + 1}", type=INT64,
                shape=[section.batch],
            )  # fmt: skip
        return self.index[home, i]

    def _initializer(self, value: ir.Value, i: int) -> ir.Value:
        """A copy in this level's graph, which the runtime can fold and pack; a large shared one is captured."""
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= _SHARED_BYTES:
            for section in self.sections[:i]:
                if value in section.values:
                    return section.values[value]
        return self.sections[i].copy_initializer(value)

    def _shape(self, node: ir.Node, i: int) -> ir.Value | None:
        """The shape of a value on the smaller batch, without gathering the value's rows; None for other nodes."""
        if node.op_type != "Shape":
            return None
        section, source, name = self.sections[i], reads(node)[0], node.outputs[0].name
        start, end = (node.attributes[k].as_int() if k in node.attributes else None for k in ("start", "end"))
        if batch_axis(source) != 0 or source in section.values or start not in (None, 0):
            return None
        rows = section.op("Shape", [self.index[i - 1, i]], name=f"{name}/rows", type=INT64, shape=[1])
        if end == 1:
            return rows
        attributes = {"start": 1} if end is None else {"start": 1, "end": end}
        whole = self.sections[self._home(source, i)].values[source]
        rest = section.op("Shape", [whole], attributes, name=f"{name}/rest", type=INT64)
        return section.op("Concat", [rows, rest], {"axis": 0}, name=name or "shape", type=INT64)


def _copy_inputs(flat: FlatGraph, section: GraphBuilder) -> list[ir.Value]:
    inputs = []
    for value in flat.model.graph.inputs:
        copy = ir.Value(name=value.name, shape=value.shape, type=value.type)
        section.values[value] = copy
        inputs.append(copy)
    return inputs


def _label(section: GraphBuilder, output: ir.Value) -> ir.Value:
    shape = None if output.shape is None else ir.Shape([output.shape[0], *list(output.shape)[2:]])
    return section.op("ArgMax", [output], {"axis": 1, "keepdims": 0}, name="label", type=INT64, shape=shape)


def _finish(graph: ir.Graph) -> ir.Model:
    for value in graph.outputs:
        value.type = value.type or FLOAT
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="branchynet")
