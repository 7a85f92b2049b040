"""Nested files: their structure and, by ONNX Runtime's profile, that they do no needless work."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from branchynet.deploy.loading import load
from branchynet.graph.onnx_flat import FlatGraph
from branchynet.graph.onnx_nest import nest
from branchynet.policy.values import Policy
from helpers.loop import entropy, every_exit
from helpers.networks import draw
from helpers.onnx_graphs import (
    FULL,
    Inner,
    Sketch,
    check_work,
    flat_of,
    graphs,
    is_recomputed,
    level_of,
    profile,
    save,
    stage_of,
)

ALWAYS, NEVER = 3e38, None
HEAVY = ("Conv", "Gemm", "MatMul")


def enabled_of(policy):
    return [n for n, on in enumerate(policy.enabled, 1) if on]


# Random graphs of small whole numbers, for which floating point is exact


KINDS = [
    "relu",
    "add",
    "matmul",
    "split",
    "transpose",
    "tall",
    "like",
    "reshape",
    "expand",
    "tail",
    "merge",
    "apart",
    "if",
    "loop",
]


def any_flat(random):
    """A random flat graph of sums, products, splits, transposes, computed shapes and merged batches; 1 to 4 exits."""
    sketch = Sketch(dynamic=random.random() < 0.8)
    b = sketch.batch
    double = "2*batch" if sketch.dynamic else 2
    wide = [sketch.input("x", 4), sketch.input("y", 4)]
    tall, tall_shapes, merged, rows = [], [], [], []

    def numbers(*shape):
        return np.array(random.choices((-1, 0, 1), k=int(np.prod(shape))), np.float32).reshape(shape)

    shared = sketch.constant(numbers(4, 4))

    def shape_like(tail):
        """Reshape to (?, *tail), with the batch size computed in the graph from some value."""
        if not rows or random.random() < 0.5:
            shape = sketch.op("Shape", random.choice(wide), shape=[1], dtype=ir.DataType.INT64, start=0, end=1)
            rows.append(shape)
        behind = sketch.constant(np.array(tail, np.int64))
        return sketch.op("Concat", random.choice(rows), behind, shape=[1 + len(tail)], dtype=ir.DataType.INT64, axis=0)

    def holding(op_type, inputs, bodies, **attributes):
        """A node with subgraphs that read values of the surrounding graph."""
        graphs = {
            name: ir.Graph(made.inputs, made.outputs, nodes=made.nodes, initializers=made.initializers, name=name)
            for name, made in bodies.items()
        }
        wide.append(sketch.op(op_type, *inputs, shape=[b, 4], **graphs, **attributes))

    def add(kind):
        a = random.choice(wide[-4:])
        if kind == "relu":
            wide.append(sketch.op("Relu", a, shape=[b, 4]))
        elif kind == "add":
            wide.append(sketch.op("Add", a, random.choice(wide), shape=[b, 4]))
        elif kind == "matmul":
            own = sketch.constant(numbers(4, 4))
            wide.append(sketch.op("MatMul", a, random.choice([own, shared]), shape=[b, 4]))
        elif kind == "split":
            halves = sketch.op("Split", a, shape=[[b, 2], [b, 2]], axis=1, num_outputs=2)
            wide.extend(sketch.op("Concat", half, half, shape=[b, 4], axis=1) for half in halves)
        elif kind == "transpose":
            tall.append(sketch.op("Transpose", a, shape=[4, b], perm=[1, 0]))
        elif kind == "tall" and tall:
            tall.append(sketch.op("MatMul", shared, random.choice(tall), shape=[4, b]))
            wide.append(sketch.op("Transpose", random.choice(tall), shape=[b, 4], perm=[1, 0]))
        elif kind == "like" and tall:
            if not tall_shapes or random.random() < 0.3:
                tall_shapes.append(sketch.op("Shape", random.choice(tall), shape=[2], dtype=ir.DataType.INT64))
            tall.append(sketch.op("Reshape", random.choice(tall), random.choice(tall_shapes), shape=[4, b]))
            wide.append(sketch.op("Transpose", tall[-1], shape=[b, 4], perm=[1, 0]))
        elif kind == "reshape":
            square = sketch.op("Reshape", a, shape_like([2, 2]), shape=[b, 2, 2])
            back = sketch.constant(np.array([-1, 4], np.int64))
            wide.append(sketch.op("Reshape", square, back, shape=[b, 4]))
        elif kind == "expand":
            if random.random() < 0.5:
                shape = sketch.op("Shape", a, shape=[2], dtype=ir.DataType.INT64)
            else:
                shape = shape_like([4])
            wide.append(sketch.op("Expand", sketch.constant(numbers(1, 4)), shape, shape=[b, 4]))
        elif kind == "tail":
            length = sketch.op("Shape", a, shape=[1], dtype=ir.DataType.INT64, start=1)
            first = sketch.constant(np.array([-1], np.int64))
            shape = sketch.op("Concat", first, length, shape=[2], dtype=ir.DataType.INT64, axis=0)
            wide.append(sketch.op("Reshape", a, shape, shape=[b, 4]))
        elif kind == "merge":
            pairs = sketch.op("Reshape", a, sketch.constant(np.array([-1, 2], np.int64)), shape=[double, 2])
            merged.append(sketch.op("Neg", pairs, shape=[double, 2]))
        elif kind == "if":
            there = sketch.op("Size", a, shape=[], dtype=ir.DataType.INT64)
            some = sketch.op("Greater", there, sketch.constant(np.int64(0)), shape=[], dtype=ir.DataType.BOOL)
            yes, no, other = Inner(sketch), Inner(sketch), random.choice(wide)
            yes.outputs = [yes.op("Add", yes.op("Relu", a), other)]
            no.outputs = [no.op("Neg", other)]
            holding("If", [some], {"then_branch": yes, "else_branch": no})
        elif kind == "loop":
            body, other = Inner(sketch), random.choice(wide)
            go, held = (body.input(shape, dtype) for shape, dtype in (([], ir.DataType.BOOL), ([b, 4], None)))
            body.inputs.insert(0, ir.val(f"{held.name}_turn", ir.DataType.INT64, []))
            product = body.op("MatMul", other, shared) if random.random() < 0.5 else other
            body.outputs = [body.op("Identity", go, dtype=ir.DataType.BOOL, shape=[]), body.op("Add", held, product)]
            holding("Loop", [sketch.constant(np.int64(2)), None, a], {"body": body})
        elif kind == "apart" and merged:
            back = sketch.constant(np.array([-1, 4], np.int64))
            wide.append(sketch.op("Reshape", random.choice(merged), back, shape=[b, 4]))

    for kind in ["matmul", *random.choices(KINDS, k=random.randint(3, 9))]:
        add(kind)
    exits = random.sample(wide[2:], min(len(wide) - 2, random.choice([1, 2, 2, 3, 3, 4])))
    if random.random() < 0.7:  # otherwise earlier exits may depend on later ones
        exits.sort(key=wide.index)
    scores = []
    for n in range(len(exits)):
        earlier = exits[random.randint(0, n)]
        both = sketch.op("Add", sketch.total(exits[n]), sketch.total(earlier), shape=[b])
        scores.append(sketch.op("Abs", both, shape=[b]))
    return sketch.flat(exits, scores)


@settings(max_examples=120, deadline=None)
@given(st.randoms(use_true_random=True), st.integers(1, 7))
def test_any_graph_answers_as_the_rule_says_and_does_no_other_work(tmp_path_factory, random, samples):
    folder = tmp_path_factory.mktemp("any")
    flat = any_flat(random)
    samples = samples if flat.dynamic else 1
    x, y = np.array(random.choices(range(-3, 4), k=8 * samples), np.float32).reshape(2, samples, 4)
    ir.save(flat.model, folder / "flat.onnx")
    every, _ = profile(folder / "flat.onnx", {"x": x, "y": y}, folder)

    def threshold(scores):
        return random.choice([NEVER, ALWAYS, *(float(s) + more for s in scores for more in (0, 0.5))])

    policy = Policy(thresholds=tuple(threshold(every[f"score_{n}"]) for n in range(1, flat.num_exits)))
    enabled = enabled_of(policy)
    expected = np.array(
        [
            next(n for n in enabled if n == flat.num_exits or every[f"score_{n}"][row] < policy.thresholds[n - 1])
            for row in range(samples)
        ]
    )

    path = save(flat, policy, folder / "nested.onnx")
    onnx.checker.check_model(path, full_check=True)
    results, events = profile(path, {"x": x, "y": y}, folder)
    assert results["exit"].tolist() == expected.tolist()  # scores that equal their threshold stay
    for kind in ("output", "score"):
        want = np.stack([every[f"{kind}_{n}"][row] for row, n in enumerate(expected)])
        np.testing.assert_array_equal(results[kind], want)
    np.testing.assert_array_equal(results["label"], results["output"].argmax(axis=1))
    check_work(flat, events, enabled, expected)
    optimized = load(path, threads=1)(x, y)
    assert optimized.exit.tolist() == expected.tolist()
    np.testing.assert_array_equal(optimized.output, results["output"])


# Networks from PyTorch


def outputs_of(net, example, samples):
    inputs = draw(example, samples, seed=3)
    return inputs, every_exit(net, inputs)


def leaving(outputs, leave):
    """(thresholds, exit of each sample), where exactly `leave[n]` samples leave at each exit except the last."""
    exits = np.full(len(outputs), len(leave) + 1)
    thresholds = []
    for n, count in enumerate(leave):
        left = np.flatnonzero(exits > n)
        scores = np.array([entropy(outputs[s][n]) for s in left])
        order = scores.argsort()
        thresholds.append(float(scores[order[count - 1 : count + 1]].mean()))
        exits[left[order[:count]]] = n + 1
    return tuple(thresholds), exits


def feeds_of(flat, inputs):
    return {v.name: t.numpy() for v, t in zip(flat.model.graph.inputs, inputs, strict=True)}


def test_nothing_runs_behind_an_exit_where_all_leave(family, tmp_path):
    _, example, flat = flat_of(family)
    inputs = draw(example, 9, seed=3)
    for enabled in range(1, flat.num_exits):  # each exit is the first enabled one in turn
        policy = Policy(thresholds=(NEVER,) * (enabled - 1) + (ALWAYS,) * (flat.num_exits - enabled))
        path = save(flat, policy, tmp_path / "all.onnx")
        results, events = profile(path, feeds_of(flat, inputs), tmp_path)
        assert (results["exit"] == enabled).all()
        check_work(flat, events, enabled_of(policy), results["exit"])
        last = max(level for level, _ in graphs(onnx.load(path).graph))
        later = {n.name for level, g in graphs(onnx.load(path).graph) if level > 1 for n in g.node}
        assert last == flat.num_exits - enabled + 1
        assert later and not later & {e["name"] for e in events}


def test_later_nodes_see_just_the_rows_that_stayed(family, tmp_path):
    net, example, flat = flat_of(family)
    # 89, 71, 53 and 31 rows differ from all other dimensions of these networks, so they cannot be confused
    inputs, outputs = outputs_of(net, example, 89)
    thresholds, exits = leaving(outputs, (18, 18, 22)[: flat.num_exits - 1])
    path = save(flat, Policy(thresholds=thresholds), tmp_path / "mixed.onnx")
    results, events = profile(path, feeds_of(flat, inputs), tmp_path)
    assert results["exit"].tolist() == exits.tolist()
    check_work(flat, events, range(1, flat.num_exits + 1), exits)
    for event in events:
        name, level = level_of(event["name"])
        if not name.startswith("exits/"):
            seen = {d for shape in event["outputs"] + event["inputs"] for d in shape}
            assert not seen & ({89, 71, 53, 31} - {(89, 71, 53, 31)[level - 1]})


def test_optimized_sessions_skip_the_heavy_work_too(family, tmp_path):
    net, example, flat = flat_of(family)
    inputs, outputs = outputs_of(net, example, 89)
    thresholds, exits = leaving(outputs, (18, 18, 22)[: flat.num_exits - 1])
    stages = stage_of(flat, range(1, flat.num_exits + 1))
    heavy = Counter(stages[node.name] for node in flat.model.graph if node.op_type in HEAVY)
    path = save(flat, Policy(thresholds=thresholds), tmp_path / "mixed.onnx")
    feeds = feeds_of(flat, inputs)
    always = {f"threshold_{n}": np.array([ALWAYS], np.float32) for n in range(1, flat.num_exits)}
    for more, levels in ((always, 1), ({}, flat.num_exits)):
        results, events = profile(path, feeds | more, tmp_path, FULL)
        assert results["exit"].tolist() == (exits.tolist() if levels > 1 else [1] * 89)
        ran = [e for e in events if any(kind in e["op"] for kind in HEAVY)]
        assert len(ran) == sum(heavy[level] for level in range(1, levels + 1))
        for rows in (71, 53, 31)[: flat.num_exits - 1]:
            assert any(rows in shape for e in ran for shape in e["outputs"]) == (levels > 1)


@pytest.mark.parametrize("dynamic", [True, False])
def test_every_node_in_use_is_in_the_file_once_and_no_other(family, dynamic, tmp_path):
    flat = flat_of(family)[2]
    if not dynamic:
        flat = fixed(flat)
    for never in range(2 ** (flat.num_exits - 1)):
        policy = Policy(thresholds=tuple(NEVER if never >> n & 1 else 0.5 for n in range(flat.num_exits - 1)))
        stages = stage_of(flat, enabled_of(policy))
        nodes = {node.name: node for node in flat.model.graph}
        path = save(flat, policy, tmp_path / "model.onnx")
        onnx.checker.check_model(path, full_check=True)
        found = Counter()
        for level, graph in graphs(onnx.load(path).graph):
            for node in graph.node:
                name, own = level_of(node.name)
                if name in nodes:
                    assert own == level and nodes[name].op_type == node.op_type
                    if stages.get(name) == level:
                        found[name] += 1
                    else:
                        assert name in stages and is_recomputed(nodes[name], flat) and flat.dynamic
                else:
                    assert name.startswith("exits/")
        assert found == Counter(list(stages))


def fixed(flat):
    """The same flat graph with the structure for one sample per call."""
    return FlatGraph(flat.model, flat.num_exits, dynamic=False)


def test_symbols_name_one_length_only(family):
    """The graph of each level replaces the batch symbol of the flat graph by its own."""
    flat = flat_of(family)[2]
    values = {v.name: v for node in flat.model.graph for v in node.outputs}
    model = onnx.load_from_string(
        ir.to_proto(nest(flat, Policy(thresholds=(0.5,) * (flat.num_exits - 1)))).SerializeToString()
    )
    checked = 0
    for level, graph in graphs(model.graph):
        symbol = "batch" if level == 1 else f"stay_{level - 1}"
        for info in graph.value_info:
            name, own = level_of(info.name)
            if name in values and own == level:
                dims = [d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim]
                want = [d if isinstance(d, int) else d.value.replace("batch", symbol) for d in values[name].shape]
                assert dims == want, info.name
                checked += 1
    assert checked > len(values) / 2
