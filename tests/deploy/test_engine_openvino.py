"""OpenVINO runs the same files: parity with the paper's loop, the engine's contract, and refused calls and files."""

import importlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from branchynet import Policy, Prediction, Target, bench, export, load, measure
from branchynet.errors import FileError, InputError, MissingExtraError
from branchynet.graph.quantize import calibration_batches, quantized
from branchynet.profiling import onnx_parts
from helpers.loop import BATCHES, QUANTILES, agree, agree_everywhere, every_exit, figure_2, safe_thresholds
from helpers.networks import FAMILIES, chain, draw, residual, tokens, tree, two_inputs
from helpers.onnx_graphs import Sketch, flat_lenet, flat_of, grey_images

assemble = importlib.import_module(export.__module__).assemble
openvino = pytest.importorskip("openvino")

OWN = (0.9, 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("openvino")


def open_engine(folder, policy, flat=None, runtime="openvino", **options):
    path = folder / "model.onnx"
    ir.save(assemble(flat or flat_of(two_inputs)[2], policy, **options), path)
    return load(path, threads=1, runtime=runtime)


@pytest.fixture(scope="module")
def engine(folder):
    return open_engine(folder, Policy(thresholds=OWN))


def arrays(rows, family=two_inputs):
    return [t.numpy() for t in draw(flat_of(family)[1], rows, 0)]


def alike(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-4)


# Parity


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def case(request):
    """A random network's flat graph, 64 samples, what every exit says of each, and thresholds that part them."""
    net, example, flat = flat_of(request.param)
    inputs = draw(example, 64, 0)
    outputs = every_exit(net, inputs)
    return flat, [i.numpy() for i in inputs], outputs, safe_thresholds(outputs, QUANTILES[1][: net.num_exits - 1])


@pytest.mark.parametrize("how", ["default", "input"])
def test_a_file_agrees_with_the_loop(case, folder, how):
    flat, inputs, outputs, own = case
    engine = open_engine(folder, Policy(thresholds=own), flat, thresholds=how)
    for batch in BATCHES:
        agree(engine(*(i[:batch] for i in inputs)), outputs[:batch], own)
    agree_everywhere(engine, inputs, outputs)


def test_exits_left_out_and_flat_files(case, folder):
    flat, inputs, outputs, own = case
    for never in range(len(own)):
        fewer = tuple(None if n == never else t for n, t in enumerate(own))
        agree(open_engine(folder, Policy(thresholds=fewer), flat)(*inputs), outputs, fewer)
    label, *every = open_engine(folder, None, flat).outputs(*inputs)
    np.testing.assert_allclose(np.stack(every, axis=1), outputs, atol=1e-4)
    np.testing.assert_array_equal(label, every[-1].argmax(axis=1))


# The contract of an engine


def test_it_describes_itself_like_the_other_engine(engine, folder):
    other = load(folder / "model.onnx", threads=1)
    assert (engine.runtime, other.runtime) == ("openvino", "onnxruntime")
    for name in ("inputs", "policy", "num_exits", "labels", "metadata"):
        assert getattr(engine, name) == getattr(other, name)
    ids = open_engine(folder, Policy(thresholds=OWN), flat_of(tokens)[2])
    assert [str(i) for i in ids.inputs] == ["ids: int64 (B, 7)"]


@pytest.mark.parametrize("rows", [0, 1, 2, 9])
@pytest.mark.parametrize("policy", [None, Policy(thresholds=OWN)], ids=["flat", "nested"])
def test_predictions_equal_those_of_the_other_engine(folder, policy, rows):
    ours, theirs = (open_engine(folder, policy, runtime=runtime) for runtime in ("openvino", "onnxruntime"))
    x = arrays(rows)
    assert isinstance(ours(*x), Prediction)
    alike(ours(*x), theirs(*x))
    alike(ours.outputs(*x), theirs.outputs(*x))


@pytest.mark.parametrize("given_as", [OWN, [0.3, None], [None, None], np.array([1.1, 0.7]), [np.inf, 0.0], [1e39, 0.0]])
def test_thresholds_may_be_given_with_a_call(engine, folder, given_as):
    other = open_engine(folder, Policy(thresholds=OWN), runtime="onnxruntime")
    x = arrays(24)
    alike(engine(*x, thresholds=given_as), other(*x, thresholds=given_as))
    alike(engine(*x), other(*x))


def test_strided_and_read_only_arrays_are_read_correctly(engine):
    image, vector = arrays(6)
    views = np.asfortranarray(image), np.ascontiguousarray(vector[::-1])[::-1]
    views[0].setflags(write=False)
    alike(engine(*views), engine(image, vector))


@pytest.mark.parametrize("op_type", ["Relu", "Identity", "Neg"])
def test_inputs_are_neither_changed_nor_returned(folder, op_type):
    """OpenVINO reads the caller's memory, and would compute some operators in place."""
    sketch = Sketch()
    first = sketch.op(op_type, sketch.input("x", 4), shape=[sketch.batch, 4])
    last = sketch.op("Relu", first, shape=[sketch.batch, 4])
    flat = sketch.flat([first, last], [sketch.total(first), sketch.total(last)])
    x = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    for policy in (None, Policy(thresholds=(0.0,)), Policy(thresholds=(1e30,))):
        engine, given = open_engine(folder, policy, flat), x.copy()
        answers = [*engine.outputs(given), *engine(given)]
        kept = [a.copy() for a in answers]
        np.testing.assert_array_equal(given, x)
        given[:] = np.nan
        for a, b in zip(answers, kept, strict=True):
            np.testing.assert_array_equal(a, b)


def test_predictions_are_not_overwritten_by_the_next_call(engine):
    first = engine(*arrays(5))
    kept = [a.copy() for a in first]
    engine(*(a[::-1] for a in arrays(5)))
    for a, b in zip(first, kept, strict=True):
        np.testing.assert_array_equal(a, b)


def test_threads_do_not_disturb_each_other(engine):
    numbers = np.random.default_rng(0)
    calls = [(arrays(int(rows)), numbers.uniform(0, 1.4, 2).tolist()) for rows in numbers.choice([1, 2, 7, 33], 100)]
    expected = [engine(*x, thresholds=thresholds) for x, thresholds in calls]
    assert {int(n) for prediction in expected for n in prediction.exit} == {1, 2, 3}
    with ThreadPoolExecutor(8) as pool:
        for ours, theirs in zip(pool.map(lambda c: engine(*c[0], thresholds=c[1]), calls), expected, strict=True):
            assert ours.exit.tolist() == theirs.exit.tolist()
            alike(ours, theirs)


def negated(dynamic):
    """A flat graph of two exits in which nothing could lose a NaN: -x, then x; the score of exit 1 is its sum."""
    sketch = Sketch(dynamic)
    first = sketch.op("Neg", sketch.input("x", 4), shape=[sketch.batch, 4])
    last = sketch.op("Neg", first, shape=[sketch.batch, 4])
    return sketch.flat([first, last], [sketch.total(first), sketch.total(last)])


def test_a_score_of_nan_never_leaves_early(folder):
    engine = open_engine(folder, Policy(thresholds=(1e30,)), negated(dynamic=True))
    for rows in (1, 4, 33):
        x = np.ones((rows, 4), np.float32)
        x[rows // 2, 1] = np.nan
        assert engine(x).exit.tolist() == [2 if row == rows // 2 else 1 for row in range(rows)]


def test_a_file_for_one_sample_at_a_time(folder):
    engine = open_engine(folder, Policy(thresholds=(0.0,)), negated(dynamic=False))
    for value, left in ((1.0, 1), (-1.0, 2), (np.nan, 2)):
        assert engine(np.full((1, 4), value, np.float32)).exit.tolist() == [left]
    with pytest.raises(InputError, match=r"one sample per call; got 2.*free='batch'"):
        engine(np.ones((2, 4), np.float32))


# Measured and quantized


@pytest.fixture
def lenet(monkeypatch):
    """(B-LeNet, its flat graph), which need not be exported again."""
    net, flat = flat_lenet()
    monkeypatch.setattr(onnx_parts, "flatten", lambda net, example, **options: flat)
    return net, flat


def test_bench_and_measure_time_the_static_graphs_in_the_same_engine(lenet, folder, monkeypatch):
    net, flat = lenet
    opened = []

    def spied(*args, runtime, **options):
        opened.append(runtime)
        return load(*args, runtime=runtime, **options)

    monkeypatch.setattr(onnx_parts, "load", spied)
    ir.save(assemble(flat, Policy(thresholds=(0.5,))), folder / "lenet.onnx")
    images, labels = grey_images(16), torch.arange(16) % 10
    target = Target(4, runtime="openvino")
    (row,) = bench(folder / "lenet.onnx", net, (images, labels), target, repeats=1)
    assert row["runtime"] == "openvino" and min(row["plain_us"], row["branchy_us"], row["limit_us"]) > 0
    cost = measure(net, images, target=Target(runtime="openvino"), seconds=0.05)
    assert cost.num_exits == 2 and sum(cost.trunk_us) > 0
    assert len(opened) == 4 + 6 and set(opened) == {"openvino"}


@pytest.mark.parametrize("family", [chain, residual])
def test_int8_files_run_too(folder, family):
    """OpenVINO may keep a residual sum in float where ONNX Runtime rounds it, so answers are as near to the float
    network as ONNX Runtime's are, but not the same."""
    net, example, flat = flat_of(family)
    inputs = draw(example, 64, 0)
    x = [i.numpy() for i in inputs]
    int8 = quantized(flat, calibration_batches([inputs], flat))
    exact, theirs = (np.stack(open_engine(folder, None, f, "onnxruntime").outputs(*x)[1:], 1) for f in (flat, int8))
    ours = np.stack(open_engine(folder, None, int8).outputs(*x)[1:], 1)
    assert np.abs(ours - exact).mean() < 1.2 * np.abs(theirs - exact).mean()
    thresholds = safe_thresholds(ours, (0.5,) * (net.num_exits - 1))
    answer = open_engine(folder, Policy(thresholds=thresholds), int8)(*x)
    if family is chain:
        agree(answer, ours, thresholds)
    else:
        left = np.array([figure_2(sample, thresholds)[0] for sample in ours])
        assert (answer.exit == left).mean() > 0.9
        chosen = exact[np.arange(64), answer.exit - 1]
        assert np.abs(answer.output - chosen).mean() < 1.5 * np.abs(theirs - exact).mean()


ANSWER_ALL = """
import sys
import numpy as np
from branchynet import load
for path in sys.argv[1:]:
    outputs = load(path, threads=1, runtime="openvino").outputs(*np.load(path + ".npz").values())
    np.save(path + ".npy", np.stack(outputs[1:], 1))
"""


def test_int8_is_as_good_on_processors_without_vnni(tmp_path):
    """OpenVINO can be message to use AVX2 alone, where 8-bit products are added up in 16 bits."""
    cases = {}
    for family in (chain, residual, tree):
        _, example, flat = flat_of(family)
        inputs = draw(example, 64, 0)
        x = [i.numpy() for i in inputs]
        graphs = (flat, quantized(flat, calibration_batches([inputs], flat)))
        exact, theirs = (np.stack(open_engine(tmp_path, None, g, "onnxruntime").outputs(*x)[1:], 1) for g in graphs)
        path = tmp_path / "model.onnx"
        cases[str(path.rename(tmp_path / f"{family.__name__}.onnx"))] = exact, theirs
        np.savez(tmp_path / f"{family.__name__}.onnx.npz", *x)
    without = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", ANSWER_ALL, *cases], env=without, check=True)
    for path, (exact, theirs) in cases.items():
        ours = np.load(f"{path}.npy")
        assert np.abs(ours - exact).mean() < 1.2 * np.abs(theirs - exact).mean(), path


# Refused calls and files


def test_wrong_calls_are_named(engine):
    image, vector = arrays(3)
    with pytest.raises(InputError, match="1 inputs given"):
        engine(image)
    with pytest.raises(InputError, match="'image' is float64"):
        engine(image.astype(np.float64), vector)
    with pytest.raises(InputError, match="1 thresholds"):
        engine(image, vector, thresholds=[0.5])


def test_wrong_options_are_named(engine, folder):
    path = folder / "model.onnx"
    with pytest.raises(InputError, match=r"unknown runtime 'abacus'.*onnxruntime, openvino"):
        load(path, runtime="abacus")
    with pytest.raises(InputError, match="'openvino' takes none"):
        load(path, runtime="openvino", providers=["CPUExecutionProvider"])
    with pytest.raises(InputError, match="threads must be at least 1; got 0"):
        load(path, runtime="openvino", threads=0)


def test_missing_foreign_and_broken_files_are_refused(engine, folder):
    def opened(name, content):
        (folder / name).write_bytes(content)
        return load(folder / name, runtime="openvino")

    with pytest.raises(FileError, match=r"no file .*none\.onnx"):
        load(folder / "none.onnx", runtime="openvino")
    good = (folder / "model.onnx").read_bytes()
    for content in (b"", b"This is no model.\n", good[: len(good) // 2], good[:-1]):
        with pytest.raises(FileError, match=r"broken\.onnx.*export"):
            opened("broken.onnx", content)
    model = onnx.load(folder / "model.onnx")
    model.graph.node[0].op_type = "Abacus"
    with pytest.raises(FileError, match=r"OpenVINO 20[\d.]+ cannot run .*strange\.onnx.*Abacus.*runtime='onnxruntime'"):
        opened("strange.onnx", model.SerializeToString())


def test_a_missing_package_is_named_with_the_command_to_install_it(engine, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'branchynet\[openvino\]'"):
        load(folder / "model.onnx", runtime="openvino")


class Casts(torch.nn.Module):
    """Casts of the input, which later stages read."""

    def __init__(self):
        super().__init__()
        self.classify = torch.nn.Linear(6, 3)

    def forward(self, x):
        small, half, double = (x * 10).clamp(0, 200).to(torch.uint8), x.half(), x.double() * 1e-3
        return tuple(
            self.classify(mixed.float())
            for mixed in (small.float() * 0.1 + half.float() + double, small - half.float(), half.float() * 3 + double)
        )


@pytest.mark.parametrize("layout", ["nested", "stages", "flat"])
def test_a_call_does_not_read_the_arrays_of_earlier_calls(layout, tmp_path):
    torch.manual_seed(0)
    net, x = Casts().eval(), torch.randn(16, 6)
    with torch.no_grad():
        outputs = np.stack([o.numpy() for o in net(x)], axis=1)
    policy = None if layout == "flat" else Policy(thresholds=safe_thresholds(outputs, (0.4, 0.5)))
    options = {"layout": "stages"} if layout == "stages" else {}
    engine = load(export(net, tmp_path / "net", policy=policy, example=x, **options), threads=1, runtime="openvino")
    for size in (1, 2, 16):
        for start in range(0, 16, size):
            rows = slice(start, start + size)
            part = x.numpy()[rows].copy()  # freed after the call
            if policy is None:
                np.testing.assert_allclose(np.stack(engine.outputs(part)[1:], axis=1), outputs[rows], atol=0.02)
            else:
                found, expected = engine(part), [figure_2(z, policy.thresholds) for z in outputs[rows]]
                assert found.exit.tolist() == [n for n, _ in expected]
                # The casts to half precision round by up to 0.001 of values near 3.
                np.testing.assert_allclose(found.output, [z for _, z in expected], atol=0.02)
