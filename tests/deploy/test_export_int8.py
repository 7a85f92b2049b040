"""int8 from PyTorch to the file: export, record, measure, and refused arguments."""

import functools
import importlib
import logging

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from branchynet import BranchyNet, ExitRecord, Policy, Target, bench, evaluate, export, load, measure, record
from branchynet.errors import GraphError, InputError
from branchynet.graph.onnx_flat import flatten
from branchynet.graph.quantize import quantized
from branchynet.policy.scores import entropy
from branchynet.profiling import onnx_parts
from helpers.loop import agree, safe_thresholds

exporting = importlib.import_module(export.__module__)
assembly = importlib.import_module(exporting.assemble.__module__)


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


INT8 = {"precision": "int8", "calibration": loader()}


@functools.cache
def flat_wide(score, dynamic):
    return flatten(wide(), images(2), score=score, dynamic=dynamic)


@pytest.fixture(scope="module")
def net():
    """`wide`, exported from PyTorch once per score."""
    net = wide()

    def flat(given, example, *, score=None, dynamic=True, free=None):
        return flat_wide(score, dynamic) if given is net else flatten(given, example, score=score, dynamic=dynamic)

    with pytest.MonkeyPatch.context() as patch:
        for module in (exporting, onnx_parts):
            patch.setattr(module, "flatten", flat)
        yield net


@pytest.fixture(scope="module")
def recorded(net, tmp_path_factory):
    """(engine of the flat int8 file, its record)."""
    path = tmp_path_factory.mktemp("flat") / "flat.onnx"
    engine = load(export(net, path, policy=None, example=images(4), **INT8), threads=1)
    return engine, record(engine, loader(seed=1), progress=False)


@pytest.mark.parametrize("options", [{}, {"free": "none"}, {"thresholds": "input"}], ids=str)
def test_thresholds_chosen_on_the_int8_record_hold_in_the_file(net, recorded, tmp_path, options):
    _, seen = recorded
    policy = Policy(thresholds=safe_thresholds(seen.outputs, (0.5,)))
    engine = load(export(net, tmp_path / "m.onnx", policy=policy, example=images(4), **options, **INT8), threads=1)
    size = 1 if "free" in options else 64
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
    assert "precision" not in load(exact).metadata
    about = load(small).metadata["precision"]
    assert about == recorded[0].metadata["precision"]
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
            net, tmp_path / "m.onnx", policy=policy, example=images(4), precision=scheme, calibration=rough(1e4)
        )
    assert min(load(path).metadata["precision"]["agreement"]) < 0.95


def test_agreement_of_one_output_is_the_variance_that_int8_explains(tmp_path):
    torch.manual_seed(0)
    backbone = Wide()
    backbone.fc = nn.Linear(64, 1)
    net = BranchyNet(backbone, {"stem": nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(288, 1))}).eval()
    how = {"policy": None, "example": images(4), "precision": "int8"}
    good = export(net, tmp_path / "good.onnx", calibration=loader(), **how)
    with torch.no_grad():
        exact = np.stack([o.numpy() for o in net(images())])
    rounded = np.stack(load(good).outputs(images().numpy())[1:])
    explained = 1 - ((exact - rounded) ** 2).mean((1, 2)) / exact.var((1, 2))
    np.testing.assert_allclose(load(good).metadata["precision"]["agreement"], explained, atol=1e-3)  # float32 sums
    with torch.no_grad():  # the same network, but one large channel sets the step of all others
        backbone.stem[1].weight[0] *= 1e4
        backbone.stem[1].bias[0] *= 1e4
        backbone.body[0].weight[:, 0] /= 1e4
        net.branches[0][2].weight[:, :9] /= 1e4
    with pytest.warns(UserWarning, match="agrees with the float network in only"):
        bad = export(net, tmp_path / "bad.onnx", calibration=loader(), **how)
    assert max(load(bad).metadata["precision"]["agreement"]) < 0.9


@pytest.mark.filterwarnings("ignore:the int8.*agrees with the float network")  # possible without VNNI
def test_the_full_range_is_another_network_than_the_reduced(net, tmp_path):
    how = {"policy": Policy(thresholds=(0.5,)), "example": images(4), "calibration": loader()}
    full = export(net, tmp_path / "full.onnx", precision="int8-full-range", **how)
    reduced = export(net, tmp_path / "reduced.onnx", precision="int8", **how)
    about, other = load(full).metadata, load(reduced).metadata
    assert (about["precision"]["scheme"], other["precision"]["scheme"]) == ("int8-full-range", "int8")
    assert about["network"] != other["network"]
    x, labels = images(seed=1), torch.arange(64) % 4
    assert bench(full, net, (x, labels), Target(8), repeats=1, calibration=loader())


def test_the_same_samples_give_the_same_file(net, tmp_path):
    files = [
        export(net, tmp_path / f"{n}.onnx", policy=None, example=images(4), precision="int8", calibration=given)
        for n, given in enumerate(
            (loader(), [images()[at : at + 16] for at in range(0, 64, 16)], iter([(images(), 0)]))
        )
    ]
    about = [load(file).metadata for file in files]
    assert files[0].read_bytes() == files[1].read_bytes() and about[2]["precision"]["samples"] == 64
    first, last = (load(file, threads=1).outputs(images(seed=2).numpy()) for file in (files[0], files[2]))
    np.testing.assert_array_equal(first[1], last[1])


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
    with pytest.raises(InputError, match=r"float\.onnx is float32: leave calibration= out"):
        bench(exact, net, (x, labels), calibration=loader(), **how)


def test_the_callers_logging_is_left_alone(net):
    root = logging.getLogger()
    before = root.handlers[:], root.level
    quantized(flat_wide(entropy, True), [(images().numpy(),)])
    assert (root.handlers, root.level) == before


# Refused arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "int4"}, "precision must be .*'int8'.*'int4'"),
        ({"precision": True}, "precision must be .*'int8'.*True"),
        ({"calibration": None}, r"needs calibration=.*hundred"),
        ({"precision": "float32"}, "calibration= needs precision='int8'"),
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
def test_wrong_arguments_are_named(net, tmp_path, changes, message, call):
    with pytest.raises(InputError, match=message):
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
            precision="int8",
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


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_calibration_batch_that_is_not_finite_is_named(tmp_path, wrong):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    good, bad = torch.randn(8, 4), torch.randn(8, 4)
    bad[3, 2] = wrong
    how = {"policy": None, "example": good, "precision": "int8", "calibration": [good, bad]}
    with pytest.raises(InputError, match=r"calibration batch 2 holds NaN or infinity in 'input'.*leave such samples"):
        export(net, tmp_path / "m.onnx", **how)
