"""fp16 and bf16 from PyTorch to the file, in every layout: answers, size, metadata, and refusals."""

import importlib

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from branchynet import BranchyNet, Policy, Target, bench, choose, export, load, measure, record, verify
from branchynet.errors import FileError, GraphError, InputError, MissingExtraError
from helpers.loop import agree, safe_thresholds
from helpers.verified_files import INT8, TWO, changed, images, network

exporting = importlib.import_module(export.__module__)
RUNTIMES = {"fp16": ("onnxruntime", "openvino"), "bf16": ("openvino",)}
PAIRS = [(precision, runtime) for precision, runtimes in RUNTIMES.items() for runtime in runtimes]
LAYOUTS = {
    "nested": {},
    "one": {"free": "none"},
    "required": {"thresholds": "input"},
    "stages": {"layout": "stages"},
    "flat": {"policy": None},
}


@pytest.fixture(scope="module")
def net():
    """One network, exported from PyTorch once per score and kind of batch."""
    net, known = network(), {}
    flatten = exporting.flatten

    def flat(given, example, *, score=None, dynamic=True, free=None):
        if given is not net:
            return flatten(given, example, score=score, dynamic=dynamic)
        if (score, dynamic) not in known:
            known[score, dynamic] = flatten(net, example, score=score, dynamic=dynamic)
        return known[score, dynamic]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "flatten", flat)
        yield net


@pytest.fixture(scope="module")
def files(net, tmp_path_factory):
    """The path of a file in each precision and layout."""
    pytest.importorskip("openvino")
    folder = tmp_path_factory.mktemp("half")
    how = {"policy": TWO, "example": images()}
    return {
        (precision, layout): export(
            net, folder / f"{precision}-{layout}.onnx", **{**how, **options}, precision=precision
        )
        for precision in RUNTIMES
        for layout, options in LAYOUTS.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("precision", "runtime"), PAIRS)
def test_files_pass_their_check(files, precision, runtime, layout):
    found = verify(files[precision, layout], runtime=runtime)
    assert found.passed and found.same_labels == found.same_exits == 8, found


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "flat"])
@pytest.mark.parametrize(("precision", "runtime"), PAIRS)
def test_answers_are_those_of_the_loop_over_the_flat_file(files, precision, runtime, layout):
    engine = load(files[precision, layout], threads=1, runtime=runtime)
    flat = load(files[precision, "flat"], threads=1, runtime=runtime)
    x = images(64, 3).numpy()
    outputs = np.stack(flat.outputs(x)[1:], axis=1)
    gap = {"fp16": 4e-3, "bf16": 4e-2}[precision]
    thresholds = safe_thresholds(outputs, (0.3, 0.5), gap=gap)
    size, left = 1 if layout == "one" else 16, set()
    for at in range(0, 64, size):
        answer = engine(x[at : at + size], thresholds=thresholds)
        agree(answer, outputs[at : at + size], thresholds, atol=5 * gap)
        left.update(answer.exit.tolist())
        assert answer.output.dtype == answer.score.dtype == np.float32
    assert left == {1, 2, 3}


@pytest.mark.parametrize("precision", RUNTIMES)
def test_metadata_states_the_distance_from_float32(net, files, precision):
    runtime = RUNTIMES[precision][0]
    about = load(files[precision, "nested"], runtime=runtime).metadata["precision"]
    assert about.keys() == {"scheme", "samples", "agreement", "mean_difference", "largest_difference"}
    assert about["scheme"] == precision and about["samples"] == 8
    got = load(files[precision, "flat"], runtime=runtime).outputs(images().numpy())[1:]
    for n, exact in enumerate(net(images())):
        off = np.abs(got[n] - exact.detach().numpy())
        assert 0 < about["mean_difference"][n] < about["largest_difference"][n]
        assert off.mean() < 3 * about["mean_difference"][n] and about["agreement"][n] >= 7 / 8


@pytest.mark.parametrize("precision", RUNTIMES)
def test_thresholds_are_inputs_in_float32(files, precision):
    model = onnx.load(files[precision, "required"])
    assert {i.name: i.type.tensor_type.elem_type for i in model.graph.input} == dict.fromkeys(
        ("x", "threshold_1", "threshold_2"), onnx.TensorProto.FLOAT
    )


@pytest.mark.parametrize("layout", ["nested", "stages"])
@pytest.mark.parametrize("precision", RUNTIMES)
def test_the_file_has_half_the_size(tmp_path, precision, layout):
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 4))
    net, how = BranchyNet(trunk, {"1": nn.Linear(512, 4)}), {"policy": Policy(thresholds=(0.5,)), "layout": layout}
    sizes = []
    for kind in ("float32", precision):
        path = export(net, tmp_path / kind, example=torch.randn(2, 64), precision=kind, **how)
        sizes.append(sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir())))
    assert sizes[1] < 0.52 * sizes[0]


def test_a_float32_file_says_nothing_of_precision(net, tmp_path):
    path = export(net, tmp_path / "m.onnx", policy=TWO, example=images())
    assert "precision" not in load(path).metadata
    again = export(net, tmp_path / "n.onnx", policy=TWO, example=images(), precision="float32")
    assert path.read_bytes() == again.read_bytes()


def test_thresholds_are_chosen_on_the_half_network(net, files, tmp_path):
    data = [(images(64, 3), torch.arange(64) % 5)]
    recorded = record(load(files["fp16", "flat"], threads=1), data, progress=False)
    cost = measure(net, images(), seconds=0.01, precision="fp16")
    choice = choose(recorded, cost, max_drop=0.5, confidence=None)
    path = export(net, tmp_path / "m.onnx", policy=choice, example=images(), precision="fp16")
    assert load(path).policy == choice.policy
    with pytest.raises(InputError, match="network"):
        export(net, tmp_path / "f.onnx", policy=choice, example=images())
    assert bench(path, net, data[0], Target(8), repeats=1)
    with pytest.raises(InputError, match=r"m\.onnx is fp16: leave calibration= out"):
        bench(path, net, data[0], Target(8), repeats=1, calibration=data)


def test_metadata_of_earlier_int8_files_are_read(net, tmp_path):
    path = export(net, tmp_path / "m.onnx", policy=TWO, example=images(), **INT8)

    def rename(model):
        entry = next(p for p in model.metadata_props if p.key == "branchynet")
        assert '"precision"' in entry.value
        entry.value = entry.value.replace('"precision"', '"quantize"')

    old = changed(path, tmp_path, rename)
    assert load(old).metadata == load(path).metadata and verify(old).passed


# Refusals


def test_onnx_runtime_refuses_bf16_by_name(files):
    for layout in ("nested", "stages"):
        with pytest.raises(
            FileError, match=r"computes in bf16, which ONNX Runtime .* cannot.*runtime='openvino'.*fp16"
        ):
            load(files["bf16", layout])


def test_bf16_needs_openvino(net, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"precision='bf16' needs openvino"):
        export(net, tmp_path / "m.onnx", policy=TWO, example=images(), precision="bf16")


@pytest.mark.parametrize("given", ["example", "calibration"])
def test_a_value_that_overflows_is_named_with_its_size(tmp_path, given):
    net, large = network(), images()
    large[3] *= 1e3
    with torch.no_grad():
        net.backbone.b[0].weight *= 1e3
    how = {"example": large} if given == "example" else {"example": images(), "calibration": [large]}
    with pytest.raises(GraphError, match=r"the value '(?!x')\w+' reaches \d.*fp16 holds at most 65504.*'bf16'"):
        export(net, tmp_path / "m.onnx", policy=TWO, precision="fp16", **how)
    large[3] *= 100
    with pytest.raises(GraphError, match=r"the value 'x' reaches \d.*fp16 holds at most 65504"):
        export(net, tmp_path / "m.onnx", policy=TWO, precision="fp16", **how)
    assert not list(tmp_path.iterdir())


def test_calibration_samples_are_compared_too(net, tmp_path):
    path = export(net, tmp_path / "m.onnx", policy=TWO, example=images(), precision="fp16", calibration=[images(40, 5)])
    assert load(path).metadata["precision"]["samples"] == 40
