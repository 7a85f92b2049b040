"""Costs: the arithmetic on exact and on noisy times, and multiply-accumulates counted by hand."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from branchynet.deploy.engine import Engine
from branchynet.errors import InputError
from branchynet.graph.macs import exit_macs
from branchynet.graph.onnx_flat import flatten
from branchynet.nn.averaging import averaged
from branchynet.policy.exit_cost import ExitCost
from branchynet.policy.scores import entropy
from branchynet.profiling import cost as module
from branchynet.profiling import onnx_parts
from branchynet.profiling.cost import _apart, each_row, measure
from branchynet.profiling.onnx_parts import OnnxParts
from branchynet.profiling.parts import leaving_policies, part_outputs
from branchynet.profiling.target import Target
from branchynet.profiling.torch_parts import torch_parts
from helpers.networks import tokens
from helpers.onnx_graphs import Sketch, flat_lenet, flat_of, grey_images

microseconds = st.floats(0, 1e6)


# Trunk and branches from times


def times_of(trunk, branch, deciding=None):
    """What the graphs of a network with these true costs would take."""
    exits = range(1, len(trunk) + 1)
    deciding = deciding or [0.0] * len(trunk)
    upto = {f"upto_{n}": sum(trunk[:n]) + sum(branch[:n]) for n in exits}
    alone = {f"alone_{n}": sum(trunk[:n]) + branch[n - 1] for n in exits if n > 1}
    leave = {f"leave_{n}": upto[f"upto_{n}"] + sum(deciding[:n]) for n in exits}
    return {"plain": sum(trunk), **upto, **alone, **leave}


@given(st.lists(st.tuples(microseconds, microseconds, microseconds), min_size=1, max_size=6))
def test_exact_times_give_exact_costs(stages):
    trunk, branch, deciding = zip(*stages, strict=True)
    found = _apart(times_of(trunk, branch, deciding), len(stages))
    want = trunk, np.add(branch, deciding)
    np.testing.assert_allclose(found, want, atol=1e-6 * (1 + np.sum(stages)))


@given(st.lists(st.tuples(*[microseconds] * 4), min_size=1, max_size=6), st.integers(1, 64))
def test_every_row_of_a_batch_pays_fixed_costs(stages, rows):
    """Each stage takes a fixed part a call, and so much a sample that reaches it."""
    fixed, slope = (np.array(part) for part in (np.transpose(stages)[:2], np.transpose(stages)[2:]))
    fewer = max(1, rows // 4)
    trunk, branch = each_row(fixed + rows * slope, fixed + fewer * slope, rows, fewer)
    slack = 1e-6 * (1 + fixed.sum() + slope.sum())
    np.testing.assert_allclose(sum(trunk) + sum(branch), fixed.sum() / rows + slope.sum(), atol=slack)
    if rows > 1:
        np.testing.assert_allclose(trunk, slope[0] + np.eye(len(stages))[0] * fixed[0].sum() / rows, atol=slack)
        np.testing.assert_allclose(branch, slope[1] + np.eye(len(stages))[0] * fixed[1].sum() / rows, atol=slack)


@given(st.integers(1, 6), st.data())
def test_noisy_times_give_costs_that_are_never_too_low_and_a_trunk_equal_to_the_plain_network(exits, data):
    names = list(times_of([0.0] * exits, [0.0] * exits))
    times = data.draw(st.lists(microseconds, min_size=len(names), max_size=len(names)))
    us = dict(zip(names, times, strict=True))
    upto, leave = (np.array([us[f"{name}_{n}"] for n in range(1, exits + 1)]) for name in ("upto", "leave"))
    cost = ExitCost(*map(tuple, _apart(us, exits)))  # refuses negative and infinite costs
    slack = 1e-6 * (1 + max(times))
    assert (np.cumsum(cost.trunk_us) + np.cumsum(cost.branch_us) >= np.maximum(upto, leave) - slack).all()
    assert cost.latency_us([False] * (exits - 1) + [True])[-1] == pytest.approx(us["plain"], abs=slack)


@given(st.integers(1, 4), st.sampled_from([1, 16, 64]), st.data())
def test_the_trunk_takes_as_long_as_the_plain_network_for_any_times(exits, rows, data):
    names = list(times_of([0.0] * exits, [0.0] * exits))
    sizes = (rows, max(1, rows // 16))
    whole, part = (
        dict(zip(names, data.draw(st.lists(microseconds, min_size=len(names), max_size=len(names))), strict=True))
        for _ in sizes
    )
    trunk, branch = each_row(_apart(whole, exits), _apart(part, exits), *sizes)
    cost = ExitCost(tuple(trunk), tuple(branch))
    never = cost.latency_us([False] * (exits - 1) + [True])[-1]
    assert never == pytest.approx(whole["plain"] / rows, abs=1e-6 * (1 + max(whole.values())))


# Measuring


@pytest.fixture
def lenet(monkeypatch):
    """B-LeNet, whose export is at hand."""
    net, flat = flat_lenet()

    def cached(given_net, example, *, score, dynamic):
        assert given_net is net and callable(score)
        return flat

    monkeypatch.setattr(onnx_parts, "flatten", cached)
    return net


def test_measure_turns_batch_times_into_costs_per_sample(lenet, monkeypatch):
    """A call of b rows takes 4 us more than b times these."""
    seen = []
    monkeypatch.setattr(Engine, "outputs", lambda self, *inputs: seen.append([i.copy() for i in inputs]))
    monkeypatch.setattr(Engine, "__call__", lambda self, *inputs: seen.append([i.copy() for i in inputs]))
    names = ["plain", "upto_1", "upto_2", "alone_2", "leave_1", "leave_2"]
    us = times_of((10.0, 100.0), (5.0, 1.0), (2.0, 3.0))

    def fake(calls, seconds):
        assert len(calls) == 2 * len(names) and seconds == 7.0
        for call in calls:
            call()
        return [4 + rows * us[name] for rows in (32, 2) for name in names], 0.125

    monkeypatch.setattr(module, "until_steady", fake)
    example = grey_images(2)
    cost = measure(lenet, example, Target(32, 2), seconds=7.0)
    macs = exit_macs(flat_lenet()[1])
    assert [(cost.trunk_macs, cost.branch_macs), cost.batch_size, cost.threads] == [
        macs,
        32,
        2,
    ] and cost.plain_us == 110 + 4 / 32
    np.testing.assert_allclose([cost.trunk_us, cost.branch_us], [(10 + 4 / 32, 100), (5 + 2, 1 + 3)])
    assert cost.spread == 0.125
    rows = example.numpy()
    assert len(seen) == 12
    for n, x in enumerate(seen):
        np.testing.assert_array_equal(x, [rows[[0, 1] * (16 if n < 6 else 1)]])


def test_the_plain_network_of_averaged_exits_is_the_backbone(monkeypatch):
    net, _ = flat_lenet()
    made, real = {}, OnnxParts.opened

    @contextlib.contextmanager
    def spied(parts, graphs, target):
        assert [node.op_type for node in parts.plain.model.graph].count("Conv") == 3  # the fourth is in the branch
        with real(parts, graphs, target) as calls:
            made.update(calls)
            yield calls

    monkeypatch.setattr(OnnxParts, "opened", spied)
    cost = measure(averaged(net), grey_images(2), seconds=0.1)
    assert made.keys() == {"plain", "last", "upto_1", "upto_2", "alone_2", "leave_1", "leave_2"}
    assert 0 < cost.plain_us and cost.num_exits == 2
    x = grey_images(1)
    with torch.no_grad():
        np.testing.assert_allclose(made["plain"](x.numpy())[1], net.backbone(x).numpy(), atol=1e-5)
        np.testing.assert_allclose(made["last"](x.numpy())[1], averaged(net)(x)[-1].numpy(), atol=1e-5)


def parts_of_lenet(runtime):
    """B-LeNet, its parts for a runtime, and the target."""
    net, flat = flat_lenet()
    target = Target(runtime=runtime)
    if target.reads_files:
        return net, OnnxParts(flat), target
    return net, torch_parts(net, grey_images(2), entropy, "float32", target), target


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_deployed_graphs_leave_at_the_exit_in_their_name(runtime):
    _, parts, target = parts_of_lenet(runtime)
    x = grey_images(3).numpy()
    with parts.opened(leaving_policies(2), target) as engines:
        left = {name: list(engine(x).exit) for name, engine in engines.items()}
    assert left == {
        "leave_1": [1, 1, 1],
        "leave_2": [2, 2, 2],
    }


@pytest.mark.parametrize("batch", [1, 4])
def test_a_real_measurement_has_its_shape(lenet, batch):
    cost = measure(lenet, grey_images(2), Target(batch), seconds=0.0)
    assert cost.num_exits == 2 and (cost.batch_size, cost.threads) == (batch, 1)
    assert (cost.latency_us([True, True]) > 0).all() and sum(cost.trunk_us) > 0
    assert cost.macs([False, True])[-1] == pytest.approx(1_140_070)


def test_progress_names_the_steps_on_standard_error(capfd):
    net = nn.Linear(3, 2)
    for progress in (True, False):
        measure(net, torch.zeros(1, 3), Target(threads=1), seconds=0.0, progress=progress)
        out, told = capfd.readouterr()
        assert out == ""
        assert [line.split()[0] for line in told.splitlines()] == (["exporting", "timing"] if progress else [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"batch_size": -3}, "-3"),
        ({"threads": 0}, "threads must be at least 1; got 0"),
        ({"runtime": "onnx"}, "unknown runtime 'onnx'"),
        ({"batch_size": 2.0}, "batch_size must be a whole number; got 2.0"),
    ],
)
def test_wrong_arguments_are_named(lenet, changes, message):
    with pytest.raises(InputError, match=message):
        measure(lenet, grey_images(2), Target(**changes))


def test_wrong_scores_and_targets_are_named(lenet):
    with pytest.raises(InputError, match=r"'entropi'.*'entropy'"):
        measure(lenet, grey_images(2), score="entropi")
    with pytest.raises(InputError, match=r"target must be a Target; got 64: give Target\(batch_size=1"):
        measure(lenet, grey_images(2), 64)


def test_a_network_without_branches_has_one_exit():
    net, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(2, 6).requires_grad_()
    cost = measure(net, x, Target(2), seconds=0.0)
    assert cost.num_exits == 1 and cost.trunk_macs == (45.0,) and cost.branch_macs == (0.0,)
    assert cost.trunk_us[0] > 0


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_parts_compute_the_exits_in_their_names(runtime):
    net, parts, target = parts_of_lenet(runtime)
    x = grey_images(2)
    with torch.no_grad():
        outputs = [o.numpy() for o in net(x)]
    last = {"plain": 2, "upto_1": 1, "upto_2": 2, "alone_2": 2}
    scores = {"plain": 0, "upto_1": 1, "upto_2": 2, "alone_2": 1}
    with parts.opened(part_outputs(parts), target) as calls:
        assert calls.keys() == last.keys()
        for name, call in calls.items():
            label, output, *rest = call(x.numpy())
            np.testing.assert_allclose(output, outputs[last[name] - 1], atol=1e-5)
            np.testing.assert_array_equal(label, output.argmax(1))
            assert [r.shape for r in rest] == [(2,)] * scores[name]
    assert part_outputs(parts, enabled=[2], alone=False).keys() == {"plain", "upto_2"}


# Multiply-accumulates


def test_macs_of_every_operator_by_hand():
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False),  # 6 x 7 pixels: 42 * 8 * 2 * 9
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2),  # 42 pixels read: 42 * 8 * 3 * 4
        nn.AvgPool2d(2),
        nn.Flatten(2),
        nn.Linear(42, 5),  # for each of 6 channels: 6 * 42 * 5
        nn.Flatten(),
        nn.Linear(30, 3),  # 30 * 3
    )
    trunk, branch = exit_macs(flatten(net, torch.randn(2, 4, 6, 7)))
    assert trunk == (42 * 8 * 2 * 9 + 42 * 8 * 3 * 4 + 6 * 42 * 5 + 30 * 3,) and branch == (0.0,)


def test_macs_of_attention_by_hand():
    net, example, flat = flat_of(tokens)
    length, width, classes = example[0].shape[1] + 1, 8, 4
    layer = length * (width * 3 * width + width * width) + 2 * length * length * width  # projections; both products
    at = [int(tap.removeprefix("layers.")) + 1 for tap in net.taps]
    trunk, branch = exit_macs(flat)
    assert trunk == (at[0] * layer, (at[1] - at[0]) * layer, (4 - at[1]) * layer + width * classes)
    assert branch == (width * classes, width * classes, 0)


def matrix(*shape):
    return np.ones(shape, np.float32)


def test_macs_of_products_with_transposed_factors():
    sketch = Sketch()
    x = sketch.input("x", 3, 4)
    first = sketch.op("MatMul", x, sketch.constant(matrix(4, 5)), shape=["batch", 3, 5])  # 3 * 4 * 5
    rows = sketch.op("Reshape", first, sketch.constant(np.array([-1, 5])), shape=["3*batch", 5])
    second = sketch.op("Gemm", rows, sketch.constant(matrix(2, 5)), shape=["3*batch", 2], transB=1)  # 3 * 5 * 2
    wide = sketch.op("Reshape", second, sketch.constant(np.array([-1, 6])), shape=["batch", 6])
    tall = sketch.op("Transpose", wide, shape=[6, "batch"], perm=[1, 0])
    last = sketch.op("Gemm", tall, sketch.constant(matrix(6, 7)), shape=["batch", 7], transA=1)  # 6 * 7
    early = sketch.op("Relu", wide, shape=["batch", 6])
    trunk, branch = exit_macs(sketch.flat([early, last], [sketch.total(early), sketch.total(last)]))
    assert trunk == (60 + 30, 42) and branch == (0, 0)


def test_values_that_one_exit_alone_needs_count_as_its_branch():
    """Work shared by two branches but not needed by the last exit counts as the branch of the first of them."""
    sketch = Sketch()
    x = sketch.input("x", 4)

    def product(value, width):
        weights = sketch.constant(matrix(value.shape[1], width))
        return sketch.op("MatMul", value, weights, shape=["batch", width])

    trunk = product(x, 5)  # 20, needed by all
    shared = product(trunk, 2)  # 10, needed by exits 1 and 2
    one, two, three = product(shared, 3), product(shared, 3), product(trunk, 3)  # 6, 6, 15
    found = exit_macs(sketch.flat([one, two, three], [sketch.total(v) for v in (one, two, three)]))
    assert found == ((20, 0, 15), (10 + 6, 6, 0))


def test_bias_and_elementwise_operations_do_not_count():
    sketch = Sketch()
    value = sketch.op("Relu", sketch.input("x", 4), shape=["batch", 4])
    assert exit_macs(sketch.flat([value], [sketch.total(value)])) == ((0.0,), (0.0,))
