"""What `verify` accepts and reports."""

import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from branchynet import BranchyNet, Policy, export, load, verify
from branchynet.cli.verbs import app
from branchynet.deploy import stored_samples as stored_samples
from branchynet.deploy.stored_samples import read_samples
from branchynet.deploy.verification import _alike, check
from branchynet.errors import VerificationError
from helpers.onnx_graphs import graphs
from helpers.verified_files import INT8, KINDS, TWO, changed, edit, every_kind, images, network, with_arrays


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return every_kind(tmp_path_factory.mktemp("files"))


# What is right


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_right_where_it_was_written(files, kind, runtime):
    if runtime == "openvino":
        pytest.importorskip("openvino")
    found = verify(files[kind], threads=1, runtime=runtime)
    assert found.passed and found.samples == 8 and runtime in found.where, str(found)
    assert set(found.difference) == ({2, 3} if kind == "never" else {1, 2, 3})
    assert all(found.difference[n] <= found.allowed[n] < 0.5 for n in found.difference)
    if "int8" not in kind:  # int8 may round differently
        assert found.same_labels == found.same_exits == 8
    assert load(files[kind], threads=1, runtime=runtime, verify=True).num_exits == 3


def test_samples_leave_at_several_exits(files):
    samples = read_samples(files["nested"])
    assert set(load(files["nested"])(*samples.inputs).exit.tolist()) == {1, 2, 3}
    np.testing.assert_array_equal(samples.inputs[0], images().numpy())


@pytest.mark.parametrize(("gap", "passed"), [(4e-6, True), (-4e-6, True), (4e-4, False), (-4e-4, False)])
def test_samples_near_a_threshold_may_leave_on_either_side(files, tmp_path, gap, passed):
    """The stored score of a sample is as far above the threshold as the engine's score is below it."""
    samples = read_samples(files["nested"])
    assert samples.score_slack == (0, 0, 0)
    own = samples.scores[0][3]
    policy = Policy(thresholds=(float(own) + gap, 1.48))
    engine = load(export(network(), tmp_path / "m.onnx", policy=policy, example=images()), threads=1)
    assert check(engine, samples).passed and check(engine, samples).same_exits == 8
    first = np.where(np.arange(8) == 3, own + np.float32(2 * gap), samples.scores[0])
    found = check(engine, dataclasses.replace(samples, scores=(first, *samples.scores[1:])))
    assert found.passed is passed and found.same_exits == 7
    assert passed or "1 of 8 samples leave at another exit" in str(found)


def test_int8_may_round_to_the_next_step(files, tmp_path):
    def next_step(array):
        flat = array.reshape(-1).copy()
        flat[::50] += np.where(flat[::50] < 64, 1, -1).astype(flat.dtype)
        return flat.reshape(array.shape)

    path = changed(files["int8"], tmp_path, edit("weight_quantized", next_step, onnx.TensorProto.INT8))
    assert verify(path).passed and max(verify(path).difference.values()) > 0


# What is wrong


@pytest.mark.parametrize(
    ("kind", "name", "function", "message"),
    [
        ("nested", "backbone.fc.bias", lambda a: a + 0.1, "outputs differ by 0.1 at exit 3"),
        ("nested", "branches.0", lambda a: a * 1.01, "at exit 1"),
        ("flat", "branches.1", lambda a: a + 0.1, "at exit 2"),
        ("one", "backbone.fc", lambda a: -a, "at exit 3"),
        ("nested", "threshold_1", lambda a: a * 0, "leave at another exit"),
        ("nested", "backbone.fc.bias", lambda a: a * np.nan, "at exit 3"),
        ("int8", "backbone.fc", lambda a: a * 1.5, "at exit 3"),
        ("int8-flat", "branches.0", lambda a: a * 0.5, "at exit 1"),
    ],
)
def test_a_processor_with_other_results_is_found(files, tmp_path, kind, name, function, message):
    """Other weights simulate it."""
    path = changed(files[kind], tmp_path, edit(name, function))
    found = verify(path)
    assert not found.passed and message in str(found), str(found)
    with pytest.raises(VerificationError, match=r"outputs of .*changed\.onnx differ from.*runtime or provider"):
        load(path, verify=True)


@pytest.mark.filterwarnings("ignore:the int8.*agrees with the float network")  # possible without VNNI
def test_sums_that_saturate_are_found(tmp_path):
    """On AVX2 with the full range of weights, a 16-bit sum of two products saturates."""
    path = export(
        network(), tmp_path / "full.onnx", policy=TWO, example=images(), **{**INT8, "precision": "int8-full-range"}
    )
    samples = read_samples(path)
    saturate = edit("backbone.b.0.weight_quantized", lambda a: np.clip(a, -50, 50), onnx.TensorProto.INT8)
    path = changed(path, tmp_path, saturate)
    assert len(samples) == 8 and not verify(path).passed
    with pytest.raises(VerificationError, match="precision='int8'"):
        load(path, verify=True)


def test_a_file_with_constant_thresholds_is_compared_at_these(files, tmp_path):
    def fix(model):
        inputs = [i for i in model.graph.input if not i.name.startswith("threshold_")]
        del model.graph.input[:]
        model.graph.input.extend(inputs)

    fixed = changed(files["nested"], tmp_path, fix)
    assert load(fixed).fixed and not load(files["nested"]).fixed
    assert verify(fixed).passed and verify(fixed).same_exits == 8
    wrong = changed(fixed, tmp_path, edit("branches.0", lambda a: -a))
    assert not verify(wrong).passed


def as_constants(model):
    """A copy in which thresholds are outputs of nodes instead of inputs."""
    inputs = [i for i in model.graph.input if not i.name.startswith("threshold_")]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    for tensor in [t for t in model.graph.initializer if t.name.startswith("threshold_")]:
        model.graph.initializer.remove(tensor)
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], [tensor.name], value=tensor))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("then", ["defaults", "constants"])
@pytest.mark.parametrize("exit", [1, 2])
@pytest.mark.parametrize("kind", ["nested", "one", "int8"])
def test_changed_thresholds_are_found(files, tmp_path, kind, exit, then, runtime):
    """The change is too small to move a sample to another exit."""
    if runtime == "openvino":
        pytest.importorskip("openvino")

    def move(model):
        edit(f"threshold_{exit}", lambda a: a + np.float32(1e-5))(model)
        if then == "constants":
            as_constants(model)

    path = changed(files[kind], tmp_path, move)
    message = f"the file's threshold at exit {exit} is .*, its metadata say {TWO.thresholds[exit - 1]}"
    with pytest.raises(VerificationError, match=message):
        load(path, verify=True, runtime=runtime)
    found = verify(path, runtime=runtime)
    assert len(found.problems) == 1 and not found.passed


def test_unchanged_constants_and_defaults_pass(files, tmp_path):
    assert verify(changed(files["nested"], tmp_path, as_constants)).passed
    assert verify(changed(files["never"], tmp_path, lambda model: None)).passed


def test_stored_weights_inside_a_branch_are_compared(files, tmp_path):
    """The int8 weights of every nested graph, one graph at a time."""
    model = onnx.load(files["int8"])
    inner = [
        t.name for _, g in list(graphs(model.graph))[1:] for t in g.initializer if t.data_type == onnx.TensorProto.INT8
    ]
    large = [name for name in inner if "weight_quantized" in name]
    assert large, inner
    for name in large:
        path = changed(files["int8"], tmp_path, edit(name, lambda a: -a, onnx.TensorProto.INT8))
        assert not verify(path).passed, name


def test_a_row_in_another_place_is_found(files):
    engine, samples = load(files["nested"], threads=1), read_samples(files["nested"])
    turned = dataclasses.replace(samples, inputs=tuple(np.roll(i, 1, axis=0) for i in samples.inputs))
    assert not check(engine, turned).passed


# Inputs in another order


class Joined(nn.Module):
    """Three inputs of one shape and type that must not be exchanged."""

    def __init__(self):
        super().__init__()
        self.a, self.fc = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x, y, z):
        return self.fc(torch.relu(self.a(x) + 2 * y) - 3 * z)


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    torch.manual_seed(0)
    net = BranchyNet(Joined(), {"a": nn.Linear(6, 4)}).eval()
    example, folder = tuple(torch.randn(3, 8, 6)), tmp_path_factory.mktemp("joined")
    policies = {"nested": Policy(thresholds=(1.2,)), "flat": None}
    return {kind: export(net, folder / f"{kind}.onnx", policy=p, example=example) for kind, p in policies.items()}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("order", [(0, 2, 1), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("kind", ["nested", "flat"])
def test_a_file_with_reordered_inputs_predicts_as_before(joined, tmp_path, kind, order, runtime):
    if runtime == "openvino":
        pytest.importorskip("openvino")

    def reorder(model):
        inputs = list(model.graph.input)
        del model.graph.input[:]
        model.graph.input.extend([*inputs[3:], *(inputs[i] for i in order)])

    path = changed(joined[kind], tmp_path, reorder)
    engine, own = load(path, runtime=runtime), load(joined[kind], runtime=runtime)
    assert [i.name for i in engine.inputs] == ["x", "y", "z"] and verify(path, runtime=runtime).passed
    inputs = read_samples(path).inputs
    for a, b in zip(engine(*inputs), own(*inputs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # sums may be in another order


@pytest.mark.parametrize("names", [None, ["x"], ["x", "y", "w"], ["x", "x", "y", "z"]])
def test_inputs_of_the_graph_count_if_the_metadata_differ(joined, tmp_path, names):
    def rename(model):
        entry = next(p for p in model.metadata_props if p.key == "branchynet")
        stored = json.loads(entry.value)
        del stored["inputs"]
        entry.value = json.dumps(stored if names is None else {**stored, "inputs": names})

    path = changed(joined["nested"], tmp_path, rename)
    assert [i.name for i in load(path).inputs] == ["x", "y", "z"] and verify(path).passed


# On the command line


def test_the_command_prints_the_result_and_sets_its_status(files, tmp_path):
    run = CliRunner()
    right = run.invoke(app, ["verify", str(files["nested"]), "--threads", "1"])
    assert right.exit_code == 0 and right.stdout.startswith("right: 8 samples in onnxruntime ")
    wrong = changed(files["nested"], tmp_path, edit("backbone.fc.bias", lambda a: a + 1))
    result = run.invoke(app, ["verify", str(wrong)])
    assert result.exit_code == 1 and result.stdout.startswith("WRONG: ") and "at exit 3" in result.stdout
    wrong.rename(tmp_path / "model.onnx")
    assert run.invoke(app, ["verify", str(tmp_path)]).exit_code == 1


class Columns(nn.Module):
    """Regression of columns of different size, as vectors or as maps."""

    def __init__(self, sizes, dense):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(8, len(sizes), 1)
        self.dense = dense
        self.register_buffer("sizes", torch.tensor(sizes).view(-1, 1, 1))

    def forward(self, x):
        x = self.head(self.b(self.a(x))) * self.sizes
        return x if self.dense else x.mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("sizes", "dense", "column"),
    [((1000.0, 1.0, 1.0), False, 2), ((1.0, 5e4), False, 0), ((300.0, 0.5, 3e5), False, 1), ((1.0, 2000.0), True, 0)],
)
def test_a_large_int8_column_hides_no_small_one(sizes, dense, column, tmp_path):
    torch.manual_seed(0)
    x = torch.rand(64, 3, 8, 8)
    int8 = {"precision": "int8", "calibration": [x]}
    path = export(Columns(sizes, dense).eval(), tmp_path / "net.onnx", policy=None, example=x, **int8)
    slack = read_samples(path).slack
    assert slack.shape == (1, len(sizes)) and slack.max() > 100 * slack[0, column] > 0
    assert verify(path).passed

    def wrong(arrays):
        small = slice(None), column
        arrays["output_1"][small] += 10 * slack[0, column] + 0.01

    found = verify(with_arrays(path, tmp_path, wrong))
    assert not found.passed and "outputs differ by" in str(found) and found.allowed[1] < 0.1 * slack.max()

    def earlier(arrays):  # one number per exit
        arrays["slack"] = slack.mean(axis=1)

    assert verify(with_arrays(path, tmp_path, earlier)).passed
    assert verify(with_arrays(path, tmp_path, lambda a: (earlier(a), wrong(a)))).passed, "hidden there"


@pytest.mark.parametrize(
    ("slack", "groups"),
    [
        ([1.0, 1.0, 1.0], [[0, 1, 2]]),
        ([5.0, 1.0, 9.0], [[1, 0, 2]]),
        ([1000.0, 1.0, 50.0], [[1], [2], [0]]),
        ([0.0, 3.0, 0.0], [[0, 2], [1]]),
        ([2.0], [[0]]),
    ],
)
def test_columns_of_one_scale_are_compared_together(slack, groups):
    assert [group.tolist() for group in _alike(np.array(slack))] == groups
