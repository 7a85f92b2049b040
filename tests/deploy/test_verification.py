"""What `verify` accepts and reports."""

import base64
import dataclasses
import io
import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from typer.testing import CliRunner

from branchynet import BranchyNet, Policy, export, load, verify
from branchynet.cli.verbs import app
from branchynet.deploy import checksum
from branchynet.deploy import stored_samples as stored_samples
from branchynet.deploy.stored_samples import SAMPLES_KEY, read_samples
from branchynet.deploy.verification import _alike, check
from branchynet.errors import FileError, InputError, VerificationError


class Three(nn.Module):
    """Convolutions with a residual sum, so that int8 has something to round."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8 * 36, 5)

    def forward(self, x):
        x = self.a(x)
        return self.fc((x + self.b(x)).flatten(1))


def images(rows=8, seed=0):
    return torch.randn(rows, 2, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2


def network():
    torch.manual_seed(0)
    net = BranchyNet(Three(), {tap: nn.Sequential(nn.Flatten(), nn.Linear(8 * 36, 5)) for tap in ("a", "b")}).eval()
    with torch.no_grad():
        for head in (*(branch[1] for branch in net.branches), net.backbone.fc):
            head.weight *= 4
    return net


TWO = Policy(thresholds=(0.8, 1.48))
INT8 = {"quantize": "int8", "calibration": [images(64, 1)]}
KINDS = {
    "nested": {},
    "flat": {"policy": None},
    "one": {"batch": 1},
    "required": {"thresholds": "input"},
    "never": {"policy": Policy(thresholds=(None, 1.48))},
    "margin": {"policy": Policy("margin", (0.3, 0.85))},
    "int8": INT8,
    "int8-flat": {"policy": None, **INT8},
    "int8-one": {"batch": 1, **INT8},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    net, folder = network(), tmp_path_factory.mktemp("files")
    return {
        kind: export(net, folder / f"{kind}.onnx", **{"policy": TWO, "example": images(), **options})
        for kind, options in KINDS.items()
    }


def changed(path, folder, change):
    """A copy of a file with a changed model, without the checksum."""
    model = onnx.load(path)
    change(model)
    kept = [p for p in model.metadata_props if p.key != checksum.KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, folder / "changed.onnx")
    return folder / "changed.onnx"


def graphs(graph):
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs(attribute.g)


def initializers(model, name, kind):
    """Initializers with `name` in their name, at any level."""
    found = [t for g in graphs(model.graph) for t in g.initializer if name in t.name and t.data_type == kind]
    assert found, [t.name for g in graphs(model.graph) for t in g.initializer]
    return found


def edit(name, function, kind=onnx.TensorProto.FLOAT):
    def change(model):
        for tensor in initializers(model, name, kind):
            array = function(numpy_helper.to_array(tensor))
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    return change


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
        network(), tmp_path / "full.onnx", policy=TWO, example=images(), **{**INT8, "quantize": "int8-full-range"}
    )
    samples = read_samples(path)
    saturate = edit("backbone.b.0.weight_quantized", lambda a: np.clip(a, -50, 50), onnx.TensorProto.INT8)
    path = changed(path, tmp_path, saturate)
    assert len(samples) == 8 and not verify(path).passed
    with pytest.raises(VerificationError, match="quantize='int8'"):
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
        t.name for g in list(graphs(model.graph))[1:] for t in g.initializer if t.data_type == onnx.TensorProto.INT8
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


# Stored samples


@pytest.mark.parametrize(("given", "rows"), [(0, 0), (1, 1), (3, 3), (8, 8)])
def test_the_requested_number_of_samples_is_stored(tmp_path, given, rows):
    path = export(network(), tmp_path / "m.onnx", policy=TWO, example=images(12), samples=given)
    if rows:
        assert len(read_samples(path)) == rows and verify(path).samples == rows
        return
    assert SAMPLES_KEY not in {p.key for p in onnx.load(path).metadata_props}
    for call in (verify, lambda path: load(path, verify=True)):
        with pytest.raises(FileError, match=r"m\.onnx holds no samples.*samples=8"):
            call(path)


@pytest.mark.parametrize(
    ("given", "message"),
    [(-1, "not be negative; got -1"), (9, "at most 8; got 9"), (2.5, "got 2.5"), (None, "got None"), ("8", "got '8'")],
)
def test_another_number_is_refused(tmp_path, given, message):
    with pytest.raises(InputError, match=f"samples must .*{message}"):
        export(network(), tmp_path / "m.onnx", policy=TWO, example=images(), samples=given)
    assert not list(tmp_path.iterdir())


def test_fewer_large_samples_are_stored_and_none_of_the_largest(tmp_path, monkeypatch):
    each = images(1).numpy().nbytes + 3 * (5 + 1) * 4
    for budget, most, rows in ((4 * each, 100 * each, 4), (each // 2, each, 1)):
        monkeypatch.setattr(stored_samples, "_BYTES", budget)
        monkeypatch.setattr(stored_samples, "_MOST_BYTES", most)
        assert len(read_samples(export(network(), tmp_path / "m.onnx", policy=TWO, example=images()))) == rows
    monkeypatch.setattr(stored_samples, "_MOST_BYTES", each - 1)
    with pytest.raises(FileError, match="no samples"):
        verify(export(network(), tmp_path / "m.onnx", policy=TWO, example=images()))


@pytest.mark.parametrize("damage", [lambda t: "?" + t, lambda t: t[: len(t) // 8 * 4], lambda t: "AAAA", lambda t: "é"])
def test_damaged_samples_are_reported(files, tmp_path, damage):
    def change(model):
        entry = next(p for p in model.metadata_props if p.key == SAMPLES_KEY)
        entry.value = damage(entry.value)

    path = changed(files["nested"], tmp_path, change)
    assert load(path).num_exits == 3
    with pytest.raises(FileError, match=r"samples in .*changed\.onnx cannot be read.*export it again"):
        verify(path)


def with_arrays(path, folder, change):
    """A copy of a file with changed arrays of stored samples."""

    def edit_arrays(model):
        entry = next(p for p in model.metadata_props if p.key == SAMPLES_KEY)
        with np.load(io.BytesIO(base64.b64decode(entry.value))) as stored:
            arrays = dict(stored)
        change(arrays)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        entry.value = base64.b64encode(buffer.getvalue()).decode()

    return changed(path, folder, edit_arrays)


def each(name, function):
    """Change the arrays with this prefix."""
    return lambda arrays: arrays.update({k: function(a) for k, a in arrays.items() if k.startswith(name)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (each("slack", lambda a: np.float64(0)), r"slack is float64 \(\)"),
        (each("score_slack", lambda a: a[:1]), "slack for 3 exits and 1 scores"),
        (lambda a: (each("slack", lambda s: s[:2])(a), each("score_slack", lambda s: s[:2])(a)), "slack for 2 exits"),
        (each("slack", lambda a: a + np.nan), "slack is"),
        (each("slack", lambda a: a - 1), "slack is"),
        (each("slack", lambda a: a + 1e9), "slack is .*metadata"),
        (each("slack", lambda a: a + 0.1), "slack is .*metadata"),
        (each("score_slack", lambda a: a + 1e9), "slack of score 1 is 1e\\+09"),
        (each("output_2", lambda a: a[:3]), r"output 2 is float32 \(3, 5\)"),
        (each("output_2", lambda a: a[:, :3]), r"output 2 is float32 \(8, 3\)"),
        (each("output_3", lambda a: np.array(["x"] * len(a))), "output 3 is <U1"),
        (each("output_1", lambda a: a[0, 0]), r"output 1 is float32 \(\)"),
        (each("score_1", lambda a: a[:2]), r"score 1 is float32 \(2,\)"),
        (each("score_2", lambda a: a.astype("U4")), "score 2 is <U4"),
        (lambda a: a.pop("score_2"), "score 2 is"),
        (lambda a: a.pop("output_1"), "output 1 is"),
        (lambda a: a.pop("input_0"), "they have 0 inputs"),
        (lambda a: a.update(input_1=a["input_0"]), "they have 2 inputs"),
        (each("input_0", lambda a: a.astype("f8")), "input 'x' is float64"),
        (each("input_0", lambda a: a[:, :1]), "input 'x' is float32"),
        (
            lambda a: [each(name, lambda v: v[:0])(a) for name in ("input", "output", "score_1", "score_2", "score_3")],
            "0",
        ),
        (lambda a: a.clear(), "slack"),
    ],
)
@pytest.mark.parametrize("kind", ["nested", "int8"])
def test_samples_of_another_kind_are_damage(files, tmp_path, kind, change, message):
    path = with_arrays(files[kind], tmp_path, change)
    with pytest.raises(FileError, match=rf"samples in .*changed\.onnx cannot be read \(.*{message}.*export it again"):
        verify(path)
    with pytest.raises(FileError, match="cannot be read"):
        load(path, verify=True)


@pytest.mark.parametrize(
    ("kind", "other", "message"), [("nested", "flat", "a flat file"), ("flat", "nested", "early exits")]
)
def test_samples_of_another_file_are_damage(files, tmp_path, kind, other, message):
    text = next(p.value for p in onnx.load(files[other]).metadata_props if p.key == SAMPLES_KEY)

    def swap(model):
        next(p for p in model.metadata_props if p.key == SAMPLES_KEY).value = text

    with pytest.raises(FileError, match=message):
        verify(changed(files[kind], tmp_path, swap))


# On the command line


def test_the_command_prints_the_result_and_sets_its_status(files, tmp_path):
    run = CliRunner()
    right = run.invoke(app, ["verify", str(files["nested"]), "--threads", "1"])
    assert right.exit_code == 0 and right.stdout.startswith("right: 8 samples in onnxruntime ")
    wrong = changed(files["nested"], tmp_path, edit("backbone.fc.bias", lambda a: a + 1))
    message = run.invoke(app, ["verify", str(wrong)])
    assert message.exit_code == 1 and message.stdout.startswith("WRONG: ") and "at exit 3" in message.stdout
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
    int8 = {"quantize": "int8", "calibration": [x]}
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
