"""Flat graphs to nest, by hand or from random networks, and profiles of nested files in ONNX Runtime."""

import contextlib
import functools
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch

from branchynet import zoo
from branchynet.deploy.assembly import assemble
from branchynet.graph.onnx_flat import FlatGraph, flatten
from branchynet.graph.subgraphs import nodes_of, reads
from branchynet.policy import scores
from helpers.networks import build

BATCH = "batch"
PLAIN = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
FULL = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL


def save(flat, policy, path, **options):
    """Write the file of a flat graph with exits, and return its path."""
    ir.save(assemble(flat, policy, **options), path)
    return path


@functools.cache
def flat_of(family, seed=0):
    """(net, example, flat graph with entropies) of a random network; exported once per test run."""
    net, example = build(family, seed)
    return net, example, flatten(net, example, score=scores.entropy)


@functools.cache
def flat_lenet():
    """(B-LeNet, flat graph with entropies); exported once per test run."""
    net = zoo.b_lenet(branches="published")
    return net, flatten(net, grey_images(2), score=scores.entropy)


def grey_images(rows):
    """Grey images (rows, 1, 28, 28)."""
    return torch.rand(rows, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def hasty_threads():
    """Switch threads a thousand times as often as by default, so that races on shared state show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Sketch:
    """A flat graph written by hand, node by node; shapes may name the batch as `self.batch`."""

    def __init__(self, dynamic=True):
        self.dynamic = dynamic
        self.batch = BATCH if dynamic else 1
        self.inputs, self.initializers, self.nodes = [], [], []
        self.inner = 0  # number of names in subgraphs

    def input(self, name, *tail):
        value = ir.val(name, ir.DataType.FLOAT, [self.batch, *tail])
        self.inputs.append(value)
        return value

    def constant(self, array, name=None):
        name = name or f"constant_{len(self.initializers)}"
        tensor = ir.tensor(np.asarray(array), name=name)
        value = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
        self.initializers.append(value)
        return value

    def op(self, op_type, *inputs, shape, dtype=ir.DataType.FLOAT, name=None, **attributes):
        """The output of a new node; a tuple of outputs if `shape` is a list of shapes."""
        several = bool(shape) and isinstance(shape[0], (list, tuple))
        shapes = shape if several else [shape]
        node = ir.node(op_type, inputs, attributes, num_outputs=len(shapes), name=f"node_{len(self.nodes)}")
        for i, (output, dims) in enumerate(zip(node.outputs, shapes, strict=True)):
            output.name = f"{name or f'value_{len(self.nodes)}'}{f'_{i}' if several else ''}"
            output.shape, output.type = ir.Shape(dims), ir.TensorType(dtype)
        self.nodes.append(node)
        return tuple(node.outputs) if several else node.outputs[0]

    def total(self, value, name=None):
        """The sum of each row of `value` (B, C), for a score."""
        axes = self.constant(np.array([1], np.int64))
        return self.op("ReduceSum", value, axes, shape=[self.batch], keepdims=0, name=name)

    def flat(self, exits, scores):
        """The finished flat graph; exits and scores are values of this sketch."""
        for n, (output, score) in enumerate(zip(exits, scores, strict=True), 1):
            output.name, score.name = f"output_{n}", f"score_{n}"
        outputs = [*exits, *scores]
        graph = ir.Graph(
            self.inputs, outputs, nodes=self.nodes, initializers=self.initializers, name="sketch",
            opset_imports={"": 18},
        )  # fmt: skip
        return FlatGraph(ir.Model(graph, ir_version=8), len(exits), self.dynamic)


class Inner:
    """A graph inside a node of a sketch."""

    def __init__(self, sketch):
        self.sketch = sketch
        self.inputs, self.outputs, self.nodes, self.initializers = [], [], [], []

    def _name(self):
        self.sketch.inner += 1
        return f"inner_{self.sketch.inner}"

    def input(self, shape, dtype=None):
        self.inputs.append(ir.val(self._name(), dtype or ir.DataType.FLOAT, shape))
        return self.inputs[-1]

    def op(self, op_type, *inputs, dtype=ir.DataType.FLOAT, shape=None):
        node = ir.node(op_type, inputs, name=self._name())
        node.outputs[0].name, node.outputs[0].type = f"{node.name}_value", ir.TensorType(dtype)
        node.outputs[0].shape = ir.Shape([self.sketch.batch, 4] if shape is None else shape)
        self.nodes.append(node)
        return node.outputs[0]


def stage_of(flat, enabled):
    """{node name: stage} by the definition: the first enabled exit that the node is an ancestor of."""
    produced = {v.name: node for node in flat.model.graph for v in node.outputs}

    @functools.cache
    def ancestors(name):
        node = produced.get(name)
        if node is None:
            return frozenset()
        return frozenset([node.name]).union(*(ancestors(v.name) for v in reads(node)))

    stages = {}
    for level, n in reversed(list(enumerate(enabled, 1))):
        for name in ancestors(f"output_{n}") | ancestors(f"score_{n}"):
            stages[name] = level
    return stages


def level_of(name):
    """(name in the flat graph, level) of a name in the nested file."""
    match = re.fullmatch(r"(.*)/(\d+)", name)
    return (match[1], int(match[2])) if match else (name, 1)


def graphs(graph, level=1):
    """(level, graph) of every graph in a nested one; the side of an ``If`` that leaves belongs to the outer level."""
    yield level, graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs(attribute.g, level + (attribute.name == "else_branch"))


def profile(path, feeds, folder, optimization=PLAIN):
    """(outputs by name, one dict per executed node: name, op, inputs and outputs as lists of shapes)."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.graph_optimization_level = True, optimization
    options.profile_file_prefix = str(Path(folder) / "profile")
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    results = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
    events = json.loads(Path(session.end_profiling()).read_text())
    return results, [
        {
            "name": event["name"].removesuffix("_kernel_time"),
            "op": event["args"]["op_name"],
            "inputs": [list(*s.values()) for s in event["args"]["input_type_shape"]],
            "outputs": [list(*s.values()) for s in event["args"]["output_type_shape"]],
        }
        for event in events
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time")
    ]


def shapes_at(values, rows):
    """The shapes of values of a flat graph for a batch of so many rows."""
    return [
        [d if isinstance(d, int) else d.evaluate({BATCH: rows}) for d in v.shape]
        for v in values
        if v is not None and v.shape is not None
    ]


def same(shape, wanted):
    """Whether a shape is as expected; True if the exporter does not state it."""
    return len(shape) == len(wanted) and all(b in (a, None) for a, b in zip(shape, wanted, strict=True))


def check_work(flat, events, enabled, exits):
    """Every node of the network ran once, on exactly the rows that stayed, and not at all if none did.

    Args:
        flat: the flat graph that was nested.
        events: from `profile`, not optimised.
        enabled: the numbers of the enabled exits.
        exits: (B,) the exit of each sample.
    """
    rows = [int((exits >= n).sum()) for n in enabled]  # of each level
    stages = stage_of(flat, enabled)
    nodes = {node.name: node for node in flat.model.graph}
    inner = {node.name for node in nodes_of(flat.model.graph)} - nodes.keys()
    ran = Counter()
    for event in events:
        name, level = level_of(event["name"])
        if name in inner:  # the surrounding node is checked
            assert rows[level - 1], f"{event['name']} ran for nobody"
            continue
        if name not in nodes and not name.startswith("exits/"):
            assert event["op"] in ("HardSigmoid", "Mul")  # ONNX Runtime fuses them into a HardSwish
            continue
        if name not in nodes:
            assert rows[level - 1] or re.fullmatch(r"exits/kept_\d", name), f"{event['name']} ran for nobody"
            continue
        node = nodes[name]
        assert rows[level - 1], f"{event['name']} ran for nobody"
        wanted = shapes_at(node.outputs, rows[level - 1])
        outputs = event["outputs"][:1] if node.op_type == "MaxPool" else event["outputs"]  # see `keep_zero_padding`
        assert len(outputs) == len(wanted) and all(map(same, outputs, wanted))
        allowed = iter(shapes_at(node.inputs, rows[level - 1]))  # constants may be missing, nothing else may differ
        assert all(any(same(shape, other) for other in allowed) for shape in event["inputs"])
        if level != stages[name]:
            assert is_recomputed(node, flat), f"{name} of stage {stages[name]} ran again at level {level}"
        else:
            ran[name] += 1
    assert ran == Counter(
        name for name, stage in stages.items() if rows[stage - 1] and nodes[name].op_type != "HardSwish"
    )


def is_recomputed(node, flat):
    """Whether a node may be repeated in a later stage.

    It computes a shape or a value without a batch dimension, or reads only the number of samples.
    """
    integers = all(v.dtype == ir.DataType.INT64 for v in node.outputs)
    if integers or not any(d == BATCH for v in node.outputs for d in v.shape):
        return True
    waiting, seen = [node], set()
    while waiting:
        for value in reads(waiting.pop()):
            if value in flat.model.graph.inputs:
                return False
            producer = value.producer()
            if producer is not None and producer.op_type not in ("Shape", "Size") and producer not in seen:
                seen.add(producer)
                waiting.append(producer)
    return True
