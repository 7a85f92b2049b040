"""int8: the nested file equals the flat int8 graph with the paper's loop, and computes in int8."""

import functools
import importlib
import logging

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from branchynet import BranchyNet, ExitRecord, Policy, Target, bench, evaluate, export, load, measure, record
from branchynet.errors import GraphError, InputError
from branchynet.graph.onnx_flat import flatten
from branchynet.graph.quantize import calibration_batches, quantized
from branchynet.policy.scores import entropy
from helpers.loop import QUANTILES, agree, agree_everywhere, safe_thresholds
from helpers.networks import FAMILIES, chain, draw, residual, tree, two_inputs
from helpers.onnx_graphs import FULL, flat_of, graphs, profile

exporting, costing, benching = (importlib.import_module(f.__module__) for f in (export, measure, bench))
assemble = exporting.assemble
assembly = importlib.import_module(assemble.__module__)

PRODUCTS = ("Conv", "Gemm", "MatMul")


@functools.cache
def int8_of(family):
    """(flat graph, flat int8 graph, 64 samples) of a random network."""
    _, example, flat = flat_of(family)
    inputs = draw(example, 64, 0)
    batches = calibration_batches([tuple(i[at : at + 16] for i in inputs) for at in range(0, 64, 16)], flat)
    return flat, quantized(flat, batches), [i.numpy() for i in inputs]


def opened(folder, flat, policy=None, **options):
    path = folder / "model.onnx"
    ir.save(assemble(flat, policy, **options), path)
    return load(path, threads=1)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def case(request, tmp_path_factory):
    """(flat int8 graph, path of the nested file, 64 samples, every exit's outputs for them by the flat graph)."""
    _, int8, inputs = int8_of(request.param)
    folder = tmp_path_factory.mktemp("int8")
    flat = opened(folder, int8)
    outputs = np.stack(flat.outputs(*inputs)[1:], axis=1)
    thresholds = safe_thresholds(outputs, QUANTILES[1][: int8.num_exits - 1])
    opened(folder, int8, Policy(thresholds=thresholds))
    return int8, folder / "model.onnx", inputs, outputs


# The nested graph


def test_the_nested_file_is_the_loop_over_the_flat_int8_exits(case):
    _, path, inputs, outputs = case
    engine = load(path, threads=1)
    agree_everywhere(engine, inputs, outputs)


def test_each_exit_can_be_left_out(case, tmp_path):
    int8, _, inputs, outputs = case
    thresholds = safe_thresholds(outputs, QUANTILES[1][: int8.num_exits - 1])
    for never in range(len(thresholds)):
        fewer = tuple(None if n == never else t for n, t in enumerate(thresholds))
        agree(opened(tmp_path, int8, Policy(thresholds=fewer), thresholds="input")(*inputs), outputs, fewer)


def test_it_runs_in_int8_at_every_level(case, tmp_path):
    """ONNX Runtime at full optimisation fuses every convolution and product of weights, also in subgraphs."""
    int8, path, inputs, _ = case
    names = [v.name for v in int8.model.graph.inputs]
    never = {f"threshold_{n}": np.array([-1], np.float32) for n in range(1, int8.num_exits)}
    _, events = profile(path, dict(zip(names, inputs, strict=True)) | never, tmp_path, FULL)
    ran = [event["op"] for event in events]
    ops = [node.op_type for node in int8.model.graph]
    assert ran.count("QLinearConv") == ops.count("Conv") and ran.count("QGemm") == ops.count("Gemm")
    assert ran.count("MatMulIntegerToFloat") + ran.count("QLinearMatMul") == ops.count("MatMul")
    assert not set(ran) & {*PRODUCTS, "FusedConv", "FusedGemm", "FusedMatMul"}


def test_what_crosses_the_cut_for_an_int8_reader_is_int8(case, request):
    _, path, _, _ = case
    crossing = 0
    for level, graph in graphs(onnx.load(path).graph):
        made = {output: node for node in graph.node for output in node.output}
        for node in graph.node:
            if node.op_type in PRODUCTS:
                for name in node.input[:2]:
                    assert made[name].op_type == "DequantizeLinear", f"{node.name} reads {name} at level {level}"
            picked = made.get(node.input[0]) if node.input else None
            if level > 1 and picked is not None and picked.op_type == "Gather" and "/stay" in picked.output[0]:
                crossing += 1
                if request.node.callspec.params["case"] in (chain, residual, tree):
                    assert node.op_type == "DequantizeLinear", f"{node.name} reads a float that crosses"
    assert crossing


def test_weights_are_int8_and_exits_and_scores_float(case):
    int8, path, _, _ = case
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    assert model.ir_version == 9 and [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    dtypes = {name: i.dtype for name, i in int8.model.graph.initializers.items()}
    made = {v.name: node for node in int8.model.graph for v in node.outputs}
    weights = [made[n.inputs[1].name] for n in int8.model.graph if n.op_type in PRODUCTS and n.inputs[1].name in made]
    stored = [dtypes[node.inputs[0].name] for node in weights if node.inputs[0].name in dtypes]
    assert stored and set(stored) == {ir.DataType.INT8}
    for n in range(1, int8.num_exits + 1):
        assert made[f"output_{n}"].op_type != "DequantizeLinear"
        waiting = [made[f"score_{n}"]]
        while waiting:
            node = waiting.pop()
            assert node.op_type not in ("QuantizeLinear", "DequantizeLinear")
            waiting += [v.producer() for v in node.inputs if v.producer() and not v.name.startswith("output_")]


def in_float(model, inputs):
    """Every exit's outputs of an int8 graph with float32 arithmetic: without optimisation, nothing is fused."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return np.stack(session.run(None, {i.name: x for i, x in zip(session.get_inputs(), inputs, strict=True)})[1:])


def test_the_processor_computes_what_the_int8_graph_says(case, tmp_path, request):
    """Saturated sums would cause a larger error than int8 itself."""
    flat, int8, inputs = int8_of(request.node.callspec.params["case"])
    exact, rounded = (np.stack(opened(tmp_path, f).outputs(*inputs)[1:]) for f in (flat, int8))
    said = in_float(tmp_path / "model.onnx", inputs)
    off = np.abs(exact - said).mean()
    # A value midway between two steps may be rounded to either, so the test cannot require equality.
    assert np.abs(rounded - said).mean() < 0.25 * off
    # Outputs of random networks differ little between samples; unrelated outputs would be 1.1 away.
    assert 0 < off < 0.4 * exact.std() and 0 < np.abs(exact - rounded).mean() < 0.4 * exact.std()


def weights_of(int8):
    """All int8 weight tensors of a graph."""
    stored = (i.const_value for i in int8.model.graph.initializers.values())
    return [t.numpy() for t in stored if t.dtype == ir.DataType.INT8 and t.numpy().ndim > 1]


def test_no_two_products_saturate_16_bits_unless_the_full_range_is_asked_for(case, request):
    flat, int8, inputs = int8_of(request.node.callspec.params["case"])
    full = quantized(flat, [tuple(inputs)], "int8-full-range")
    assert len(weights_of(int8)) == len(weights_of(full)) > 1
    largest = [2 * 255 * int(np.abs(w.astype(int)).max()) for w in weights_of(int8)]
    assert max(largest) <= np.iinfo(np.int16).max
    assert all(np.abs(w.astype(int)).max() == 127 for w in weights_of(full))


# From PyTorch to the file


class Wide(nn.Module):
    """Convolutions so wide that weights dominate the file size."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))
        self.body = nn.Sequential(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU())
        self.fc = nn.Linear(64, 4)

    def forward(self, x):
        return self.fc(self.body(self.stem(x)).mean((2, 3)))


def wide():
    torch.manual_seed(0)
    net = BranchyNet(Wide(), {"stem": nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(288, 4))}).eval()
    with torch.no_grad():  # spread the outputs, so that samples differ in confidence
        for head, n in ((net.branches[0][2], 0), (net.backbone.fc, 1)):
            outputs = net(images())[n]
            head.weight /= outputs.std(0)[:, None] / 2
            head.bias.copy_((head.bias - outputs.mean(0)) / outputs.std(0) * 2)
    return net


def images(rows=64, seed=0):
    return torch.randn(rows, 1, 12, 12, generator=torch.Generator().manual_seed(seed)).cumsum(2)


def loader(rows=64, seed=0):
    x = images(rows, seed)
    return [(x[at : at + 16], torch.arange(len(x))[at : at + 16] % 4) for at in range(0, rows, 16)]


INT8 = {"quantize": "int8", "calibration": loader()}


@functools.cache
def flat_wide(score, dynamic):
    return flatten(wide(), images(2), score=score, dynamic=dynamic)


@pytest.fixture(scope="module")
def net():
    """`wide`, exported from PyTorch once per score."""
    net = wide()

    def flat(given, example, *, score=None, dynamic=True):
        return flat_wide(score, dynamic) if given is net else flatten(given, example, score=score, dynamic=dynamic)

    with pytest.MonkeyPatch.context() as patch:
        for module in (exporting, costing, benching):
            patch.setattr(module, "flatten", flat)
        yield net


@pytest.fixture(scope="module")
def recorded(net, tmp_path_factory):
    """(engine of the flat int8 file, its record)."""
    path = tmp_path_factory.mktemp("flat") / "flat.onnx"
    engine = load(export(net, path, policy=None, example=images(4), **INT8), threads=1)
    return engine, record(engine, loader(seed=1), progress=False)


@pytest.mark.parametrize("options", [{}, {"batch": 1}, {"thresholds": "input"}], ids=str)
def test_thresholds_chosen_on_the_int8_record_hold_in_the_file(net, recorded, tmp_path, options):
    _, seen = recorded
    policy = Policy(thresholds=safe_thresholds(seen.outputs, (0.5,)))
    engine = load(export(net, tmp_path / "m.onnx", policy=policy, example=images(4), **options, **INT8), threads=1)
    size = options.get("batch", 64)
    x, left = images(seed=1).numpy(), []
    for at in range(0, 64, size):
        answer = engine(x[at : at + size])
        agree(answer, seen.outputs[at : at + size], policy.thresholds)
        left += answer.exit.tolist()
    assert np.mean(np.array(left) == 1) == evaluate(seen, policy).exit_share[0] and set(left) == {1, 2}


def test_the_record_is_of_what_the_engine_says(recorded):
    engine, seen = recorded
    _, *every = engine.outputs(images(seed=1).numpy())
    np.testing.assert_array_equal(seen.outputs, np.stack(every, axis=1))
    assert seen.labels.tolist() == [n % 4 for n in range(64)] and isinstance(seen, ExitRecord)


def test_a_score_of_ones_own_stays_float(net, recorded, tmp_path):
    def weighed(outputs):
        """A score with a matrix product."""
        return 1 - torch.softmax(outputs[-1] @ (2 * torch.eye(4)), dim=1).amax(dim=1)

    _, seen = recorded
    scores = weighed((torch.from_numpy(seen.outputs[:, 0]),)).numpy()
    order = np.sort(scores)
    policy = Policy(weighed, (float(order[30:32].mean()),))
    path = export(net, tmp_path / "m.onnx", policy=policy, example=images(4), **INT8)
    answer = load(path, threads=1)(images(seed=1).numpy())
    clear = np.abs(scores - policy.thresholds[0]) > 1e-5
    assert (answer.exit == np.where(scores < policy.thresholds[0], 1, 2))[clear].all()
    early = answer.exit == 1
    np.testing.assert_allclose(answer.score[early], scores[early], atol=1e-5)


def test_the_file_is_smaller_and_says_what_it_is(net, recorded, tmp_path):
    policy = Policy(thresholds=(0.5,))
    exact = export(net, tmp_path / "float.onnx", policy=policy, example=images(4))
    small = export(net, tmp_path / "int8.onnx", policy=policy, example=images(4), **INT8)
    assert small.stat().st_size < 0.45 * exact.stat().st_size
    assert "quantize" not in load(exact).metadata
    about = load(small).metadata["quantize"]
    assert about == recorded[0].metadata["quantize"]
    assert about.keys() == {"scheme", "samples", "agreement", "mean_difference"}
    assert (about["scheme"], about["samples"]) == ("int8", 64)
    with torch.no_grad():
        exact = np.stack([o.numpy() for o in net(images())])
    rounded = np.stack(recorded[0].outputs(images().numpy())[1:])
    np.testing.assert_allclose(about["agreement"], (exact.argmax(2) == rounded.argmax(2)).mean(1))
    np.testing.assert_allclose(about["mean_difference"], np.abs(exact - rounded).mean((1, 2)), rtol=1e-3)


def rough(value):
    """Calibration samples with one value so large that the step of int8 is too coarse for all others."""
    x = images()
    x[0, 0, 0, 0] = value
    return [x]


@pytest.mark.parametrize(("scheme", "remedy"), [("int8", "calibration samples"), ("int8-full-range", "'int8'")])
@pytest.mark.parametrize("policy", [None, Policy(thresholds=(0.5,))], ids=["flat", "nested"])
def test_low_agreement_with_the_float_network_is_warned_of(net, tmp_path, scheme, remedy, policy):
    with pytest.warns(UserWarning, match=rf"{scheme} network agrees .* only \d.* at exit [12] .*{remedy}"):
        path = export(
            net, tmp_path / "m.onnx", policy=policy, example=images(4), quantize=scheme, calibration=rough(1e4)
        )
    assert min(load(path).metadata["quantize"]["agreement"]) < 0.95


def test_agreement_of_one_output_is_the_variance_that_int8_explains(tmp_path):
    torch.manual_seed(0)
    backbone = Wide()
    backbone.fc = nn.Linear(64, 1)
    net = BranchyNet(backbone, {"stem": nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(288, 1))}).eval()
    how = {"policy": None, "example": images(4), "quantize": "int8"}
    good = export(net, tmp_path / "good.onnx", calibration=loader(), **how)
    with torch.no_grad():
        exact = np.stack([o.numpy() for o in net(images())])
    rounded = np.stack(load(good).outputs(images().numpy())[1:])
    explained = 1 - ((exact - rounded) ** 2).mean((1, 2)) / exact.var((1, 2))
    np.testing.assert_allclose(load(good).metadata["quantize"]["agreement"], explained, atol=1e-3)  # float32 sums
    with torch.no_grad():  # the same network, but one large channel sets the step of all others
        backbone.stem[1].weight[0] *= 1e4
        backbone.stem[1].bias[0] *= 1e4
        backbone.body[0].weight[:, 0] /= 1e4
        net.branches[0][2].weight[:, :9] /= 1e4
    with pytest.warns(UserWarning, match="agrees with the float network in only"):
        bad = export(net, tmp_path / "bad.onnx", calibration=loader(), **how)
    assert max(load(bad).metadata["quantize"]["agreement"]) < 0.9


@pytest.mark.filterwarnings("ignore:the int8.*agrees with the float network")  # possible without VNNI
def test_the_full_range_is_another_network_than_the_reduced(net, tmp_path):
    how = {"policy": Policy(thresholds=(0.5,)), "example": images(4), "calibration": loader()}
    full = export(net, tmp_path / "full.onnx", quantize="int8-full-range", **how)
    reduced = export(net, tmp_path / "reduced.onnx", quantize="int8", **how)
    about, other = load(full).metadata, load(reduced).metadata
    assert (about["quantize"]["scheme"], other["quantize"]["scheme"]) == ("int8-full-range", "int8")
    assert about["network"] != other["network"]
    x, labels = images(seed=1), torch.arange(64) % 4
    assert bench(full, net, (x, labels), Target(8), repeats=1, calibration=loader())


def test_the_same_samples_give_the_same_file(net, tmp_path):
    files = [
        export(net, tmp_path / f"{n}.onnx", policy=None, example=images(4), quantize="int8", calibration=given)
        for n, given in enumerate(
            (loader(), [images()[at : at + 16] for at in range(0, 64, 16)], iter([(images(), 0)]))
        )
    ]
    about = [load(file).metadata for file in files]
    assert files[0].read_bytes() == files[1].read_bytes() and about[2]["quantize"]["samples"] == 64
    first, last = (load(file, threads=1).outputs(images(seed=2).numpy()) for file in (files[0], files[2]))
    np.testing.assert_array_equal(first[1], last[1])


def test_inputs_may_come_in_any_form(tmp_path):
    flat = int8_of(two_inputs)[0]
    image, vector = (torch.from_numpy(i) for i in int8_of(two_inputs)[2])
    target = torch.zeros(64)
    forms = [
        (image, vector),
        ((image, vector), target),
        [[image, vector], target],
        {"vector": vector, "image": image},
        ({"vector": vector, "image": image}, target),
        ((image, vector), {"boxes": []}),
    ]
    for form in forms:
        ((a, b),) = calibration_batches([form], flat)
        assert a is not None and np.array_equal(a, image) and np.array_equal(b, vector)
    alone = flat_of(residual)[2]
    x = torch.from_numpy(int8_of(residual)[2][0])
    for form in (x, (x,), [x], (x, target), [x, 3], ((x,), target), ({"x": x}, target), x.numpy()):
        ((a,),) = calibration_batches([form], alone)
        assert np.array_equal(a, x)


def test_measure_times_the_int8_network(net):
    exact = measure(net, images(4), seconds=0.05)
    small = measure(net, images(4), seconds=0.05, **INT8)
    assert small.trunk_macs == exact.trunk_macs and small.branch_macs == exact.branch_macs
    assert small.num_exits == 2 and sum(small.trunk_us) > 0


def test_bench_compares_int8_with_int8(net, recorded, tmp_path):
    x, labels = images(seed=1), torch.arange(64) % 4
    policy = Policy(thresholds=safe_thresholds(recorded[1].outputs, (0.5,)))
    path = export(net, tmp_path / "m.onnx", policy=policy, example=images(4), **INT8)
    how = {"targets": Target(8), "repeats": 1}
    (row,) = bench(path, net, (x, labels), calibration=loader(), **how)
    outcome = evaluate(recorded[1], policy)
    assert row["exit_share"] == pytest.approx(outcome.exit_share)
    assert row["accuracy_branchy"] == pytest.approx(outcome.accuracy) and row["runtime"] == "onnxruntime"
    with pytest.raises(InputError, match=r"m\.onnx is int8: give calibration="):
        bench(path, net, (x, labels), **how)
    exact = export(net, tmp_path / "float.onnx", policy=policy, example=images(4))
    with pytest.raises(InputError, match=r"float\.onnx is float: leave calibration= out"):
        bench(exact, net, (x, labels), calibration=loader(), **how)


def test_the_callers_logging_is_left_alone(net):
    root = logging.getLogger()
    before = root.handlers[:], root.level
    quantized(flat_wide(entropy, True), [(images().numpy(),)])
    assert (root.handlers, root.level) == before


# Refused arguments


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"quantize": "int4"}, "quantize must be 'int8'.*'int4'"),
        ({"quantize": True}, "quantize must be 'int8'.*True"),
        ({"calibration": None}, r"needs calibration=.*hundred"),
        ({"quantize": None}, "calibration= needs quantize='int8'"),
        ({"calibration": images()}, r"loader or a list of batches; got a Tensor.*\[batch\]"),
        ({"calibration": {"x": images()}}, "got a dict"),
        ({"calibration": 3}, "got a int"),
        ({"calibration": []}, "no samples"),
        ({"calibration": [images(0)]}, "no samples"),
        ({"calibration": [images()[:, :, :5]]}, r"float32 \(64, 1, 5, 12\).*reads x: float"),
        ({"calibration": [images().double()]}, r"float64 \(64, 1, 12, 12\)"),
        ({"calibration": [(images(), images(), images())]}, r"float32 .*, float32 .*, float32 .*reads x"),
        ({"calibration": [{"y": images()}]}, r"no input 'x', only \['y'\]"),
        ({"calibration": [{"x": images(), "y": images()}]}, r"\['y'\] that the network does not read"),
    ],
)
@pytest.mark.parametrize("call", ["export", "measure"])
def test_wrong_arguments_are_named(net, tmp_path, changes, told, call):
    with pytest.raises(InputError, match=told):
        if call == "export":
            export(net, tmp_path / "m.onnx", policy=None, example=images(4), **{**INT8, **changes})
        else:
            measure(net, images(4), **{**INT8, **changes})
    assert not list(tmp_path.iterdir())


def test_a_network_without_products_is_refused(tmp_path):
    net = BranchyNet(nn.Sequential(nn.ReLU(), nn.Tanh()), {"0": nn.Identity()})
    with pytest.raises(GraphError, match=r"no float32 convolution.*export it in float"):
        export(
            net,
            tmp_path / "m.onnx",
            policy=None,
            example=torch.rand(2, 4),
            quantize="int8",
            calibration=[torch.rand(2, 4)],
        )
    assert not list(tmp_path.iterdir())


def test_a_network_that_mixes_the_samples_of_a_batch_is_caught(tmp_path):
    class Mixes(Wide):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    with pytest.raises(GraphError, match=r"differs from the network.*other samples of the batch"):
        export(Mixes(), tmp_path / "m.onnx", policy=None, example=images(4), **INT8)
    assert not list(tmp_path.iterdir())


def test_a_nested_file_that_disagrees_with_the_flat_int8_graph_is_refused(net, tmp_path, monkeypatch):
    right = assembly.nest

    def wrong(flat, policy, **options):
        bias = next(v for name, v in flat.model.graph.initializers.items() if "fc.bias" in name and "quantized" in name)
        array = bias.const_value.numpy().copy()
        if array.ndim and array.dtype == np.int32:
            bias.const_value = ir.tensor(-array - 10000, name=bias.name)
        return right(flat, policy, **options)

    monkeypatch.setattr(assembly, "nest", wrong)
    with pytest.raises(GraphError, match=r"differs from its flat int8 graph: outputs differ by .* at exit 2"):
        export(net, tmp_path / "m.onnx", policy=Policy(thresholds=(0.5,)), example=images(4), **INT8)
    assert not list(tmp_path.iterdir())


def test_only_a_flat_file_can_be_recorded(net, recorded, tmp_path):
    nested = load(export(net, tmp_path / "m.onnx", policy=Policy(thresholds=(0.5,)), example=images(4)), threads=1)
    with pytest.raises(InputError, match=r"early exits.*policy=None"):
        record(nested, loader(), progress=False)
    with pytest.raises(InputError, match=r"an engine runs where it was loaded.*'cpu'"):
        record(recorded[0], loader(), progress=False, device="cpu")
