"""The structure of files with exits: names, types, versions, and where weights live."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from branchynet.deploy.loading import load
from branchynet.errors import GraphError
from branchynet.graph.onnx_nest import nest
from branchynet.policy.values import Policy
from helpers.onnx_graphs import Sketch, check_work, flat_lenet, flat_of, graphs, profile, save

ALWAYS, NEVER = 3e38, None


# The file


@pytest.fixture(scope="module")
def lenet_file(tmp_path_factory):
    return save(flat_lenet()[1], Policy(thresholds=(0.1,)), tmp_path_factory.mktemp("lenet") / "lenet.onnx")


def types(values):
    return {
        v.name: (v.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
        for v in values
    }


INT64, FLOAT = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT


def test_inputs_and_outputs_are_named_and_typed(lenet_file):
    graph = onnx.load(lenet_file).graph
    assert types(graph.output) == {
        "label": (INT64, ["batch"]),
        "exit": (INT64, ["batch"]),
        "score": (FLOAT, ["batch"]),
        "output": (FLOAT, ["batch", 10]),
    }
    assert types(graph.input) == {"x": (FLOAT, ["batch", 1, 28, 28]), "threshold_1": (FLOAT, [1])}
    assert list(types(graph.output)) == ["label", "exit", "score", "output"]
    defaults = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    assert defaults["threshold_1"] == np.float32(0.1)


def test_required_thresholds_have_no_default(tmp_path):
    path = save(flat_lenet()[1], Policy(thresholds=(0.1,)), tmp_path / "required.onnx", thresholds="input")
    graph = onnx.load(path).graph
    assert "threshold_1" in types(graph.input) and "threshold_1" not in {t.name for t in graph.initializer}


def test_a_removed_exit_takes_its_threshold_and_its_gate_away(tmp_path):
    path = save(flat_lenet()[1], Policy(thresholds=(None,)), tmp_path / "never.onnx")
    graph = onnx.load(path).graph
    assert list(types(graph.input)) == ["x"] and list(types(graph.output)) == ["label", "exit", "score", "output"]
    assert not any(node.op_type == "If" for node in graph.node)


def test_versions_are_pinned_and_no_other_operators_are_used(lenet_file):
    model = onnx.load(lenet_file)
    assert model.ir_version == 9
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    assert {node.domain for _, graph in graphs(model.graph) for node in graph.node} == {""}
    assert not model.functions


def test_both_sides_of_an_if_have_one_rank_and_type(family):
    flat = flat_of(family)[2]
    model = ir.to_proto(nest(flat, Policy(thresholds=(0.5,) * (flat.num_exits - 1))))
    gates = [node for _, graph in graphs(model.graph) for node in graph.node if node.op_type == "If"]
    assert len(gates) == flat.num_exits - 1
    for gate in gates:
        sides = [types(a.g.output) for a in gate.attribute]
        assert len(sides) == 2 and all(len(side) == len(gate.output) for side in sides)
        for ours, theirs in zip(*(side.values() for side in sides), strict=True):
            assert ours[0] == theirs[0] != 0 and len(ours[1]) == len(theirs[1]) > 0


def test_initializers_live_beside_the_nodes_that_use_them(family):
    flat = flat_of(family)[2]
    model = ir.to_proto(nest(flat, Policy(thresholds=(0.5,) * (flat.num_exits - 1))))
    names = [t.name for _, graph in graphs(model.graph) for t in graph.initializer]
    assert len(names) == len(set(names))
    for _, graph in graphs(model.graph):
        own = {t.name for t in graph.initializer}
        used = {name for node in graph.node for name in node.input}
        assert {name for name in own - used if not name.startswith("threshold_")} == set()
        assert {name for name in used & set(names) - own if not name.startswith("threshold_")} == set()


def weights(count=200):
    return np.random.default_rng(0).integers(-1, 2, (count, count)).astype(np.float32)


def twins(shared, own):
    """Two exits; both stages use the matrix `shared`, and only the second uses `own`."""
    sketch = Sketch()
    width = len(shared)
    x, matrix = sketch.input("x", width), sketch.constant(shared)
    first = sketch.op("MatMul", x, matrix, shape=["batch", width])
    more = sketch.op("MatMul", sketch.op("Relu", first, shape=["batch", width]), matrix, shape=["batch", width])
    last = sketch.op("MatMul", more, sketch.constant(own), shape=["batch", width])
    return sketch.flat([first, last], [sketch.total(first), sketch.total(last)])


@pytest.mark.parametrize(("width", "copies"), [(200, 1), (16, 2)])  # 160 kB and 1 kB
def test_a_large_shared_initializer_is_stored_once(width, copies, tmp_path):
    shared = weights(width)
    path = save(twins(shared, -shared), Policy(thresholds=(0.0,)), tmp_path / "model.onnx")
    assert path.read_bytes().count(shared.tobytes()) == copies
    levels = [
        level
        for level, graph in graphs(onnx.load(path).graph)
        for t in graph.initializer
        if list(t.dims) == [width, width]
    ]
    assert levels == [1, 2] if copies == 1 else [1, 2, 2]  # a matrix of the second stage is never in the outer graph
    x = np.random.default_rng(1).integers(-2, 3, (5, width)).astype(np.float32)
    answer = load(path, threads=1)(x)
    first = x @ shared
    last = np.maximum(first, 0) @ shared @ -shared
    early = first.sum(1) < 0
    assert 0 < early.sum() < 5
    np.testing.assert_array_equal(answer.output, np.where(early[:, None], first, last))


def test_the_file_is_little_larger_than_the_static_one_with_its_heads(tmp_path):
    flat = twins(weights(), -weights())
    flat_size = save(flat, None, tmp_path / "flat.onnx").stat().st_size
    nested_size = save(flat, Policy(thresholds=(0.5,)), tmp_path / "nested.onnx").stat().st_size
    assert nested_size <= 1.02 * flat_size


def test_values_may_have_the_names_that_the_file_gives_out(tmp_path):
    sketch = Sketch()
    taken = ["label", "exit", "score", "output", "threshold_1", "threshold_2", "stay_1", "exits", "batch"]
    value = sketch.input("x", 4)
    for name in taken:
        bias = sketch.constant(np.ones((1, 4), np.float32), name=f"bias_{name}")
        value = sketch.op("Add", value, bias, shape=["batch", 4], name=name)
    first = sketch.op("Identity", value, shape=["batch", 4])
    matrix = sketch.constant(2 * np.eye(4, dtype=np.float32), name="threshold_3")
    last = sketch.op("MatMul", value, matrix, shape=["batch", 4])
    flat = sketch.flat([first, last], [sketch.total(first), sketch.total(last)])
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    for policy in (Policy(thresholds=(60.0,)), Policy(thresholds=(None,))):
        path = save(flat, policy, tmp_path / "model.onnx")
        onnx.checker.check_model(path, full_check=True)
        answer = load(path, threads=1)(x)
        early = (x + 9).sum(1) < 60 if policy.thresholds[0] else np.zeros(3, bool)
        np.testing.assert_array_equal(answer.output, np.where(early[:, None], x + 9, 2 * (x + 9)))
        assert answer.exit.tolist() == [1 if e else 2 for e in early]
    flat_path = save(flat, None, tmp_path / "flat.onnx")
    onnx.checker.check_model(flat_path, full_check=True)
    assert [o.name for o in onnx.load(flat_path).graph.output] == ["label", "output_1", "output_2"]


@pytest.mark.parametrize("first", [True, False], ids=["batch first", "batch second"])
def test_a_shape_used_on_both_sides_of_a_cut_is_that_of_the_smaller_batch_behind_it(first, tmp_path):
    sketch = Sketch()
    dims = ["batch", 4] if first else [4, "batch"]
    x = sketch.input("x", 4)

    def turned(value, shape):
        return value if first else sketch.op("Transpose", value, shape=shape, perm=[1, 0])

    measured = sketch.op("Relu", turned(x, dims), shape=dims)
    shape = sketch.op("Shape", measured, shape=[2], dtype=ir.DataType.INT64)

    def more(number):
        filled = sketch.op("Expand", sketch.constant(np.full((1, 1), number, np.float32)), shape, shape=dims)
        return sketch.op("Add", turned(filled, ["batch", 4]), x, shape=["batch", 4])

    early, late = more(1), more(2)
    flat = sketch.flat([early, late], [sketch.total(early), sketch.total(late)])
    path = save(flat, Policy(thresholds=(0.0,)), tmp_path / "model.onnx")
    rows = np.array([[-3, 0, 0, 0], [1, 0, 0, 0], [-9, 1, 1, 0], [2, 2, 2, 2], [0, 1, 0, 0]], np.float32)
    results, events = profile(path, {"x": rows}, tmp_path)
    left = (rows + 1).sum(1) < 0
    assert results["exit"].tolist() == [1 if e else 2 for e in left] and 0 < left.sum() < 4
    np.testing.assert_array_equal(results["output"], np.where(left[:, None], rows + 1, rows + 2))
    check_work(flat, events, [1, 2], results["exit"])


def test_a_costly_value_without_a_batch_dimension_cannot_cross_a_cut():
    sketch = Sketch()
    shape, back = (sketch.constant(np.array(s, np.int64)) for s in ([-1, 2], [-1, 4]))
    pairs = sketch.op("Reshape", sketch.input("x", 4), shape, shape=["2*batch", 2])
    matrix = sketch.constant(np.eye(2, dtype=np.float32))
    product = sketch.op("MatMul", pairs, matrix, shape=["2*batch", 2], name="product")
    first = sketch.op("Reshape", product, back, shape=["batch", 4])
    last = sketch.op("Reshape", sketch.op("Relu", product, shape=["2*batch", 2]), back, shape=["batch", 4])
    flat = sketch.flat([first, last], [sketch.total(first), sketch.total(last)])
    with pytest.raises(GraphError, match=r"'product' \[2\*batch,2\] crosses .* tap"):
        nest(flat, Policy(thresholds=(0.5,)))
    nest(flat, Policy(thresholds=(None,)))  # nothing crosses the cut of a disabled exit


def test_a_flat_file_holds_only_what_its_outputs_need(family, tmp_path):
    flat = flat_of(family)[2]
    for n in range(1, flat.num_exits + 1):
        path = save(flat, None, tmp_path / "one.onnx", outputs=[f"output_{n}"])
        onnx.checker.check_model(path, full_check=True)
        graph = onnx.load(path).graph
        alone = {v.name: v for v in flat.model.graph.outputs}[f"output_{n}"]
        needed, waiting = set(), [alone]
        while waiting:
            node = waiting.pop().producer()
            if node is not None and node.name not in needed:
                needed.add(node.name)
                waiting.extend(v for v in node.inputs if v is not None)
        assert {node.name for node in graph.node} == needed | {"exits/label/1"}
        used = {name for node in graph.node for name in node.input}
        assert {t.name for t in graph.initializer} <= used
        assert [o.name for o in graph.output] == ["label", "output"]
