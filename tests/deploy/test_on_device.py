"""Files on a device answer as the paper's Figure 2; the CPU is the device, so that the same code runs here."""

import functools
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch

from branchynet import Policy, load
from branchynet.deploy import cpu_fallback, on_device
from branchynet.deploy.cpu_fallback import check_fallback
from branchynet.deploy.on_device import OnDevice, picker_of
from branchynet.deploy.staged_writing import save_stages
from branchynet.errors import FileError, InputError, MissingExtraError, RunError
from helpers.loop import QUANTILES, agree, agree_everywhere, every_exit, safe_thresholds, same
from helpers.networks import FAMILIES, chain, draw, two_inputs
from helpers.onnx_graphs import flat_of, hasty_threads, save

RECORDED = [("CPUExecutionProvider", {"enable_cuda_graph": "1"})]
LAYOUTS = {"nested": None, "staged": None, "recorded": RECORDED}


@pytest.fixture(scope="module", autouse=True)
def device():
    """Treat the CPU as a device of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(on_device.DEVICES, "CPUExecutionProvider", "cpu")
        yield


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Return a function of a family and a layout: (engine, 64 samples as tensors, every exit's outputs, thresholds)."""
    folder = tmp_path_factory.mktemp("device")

    @functools.cache
    def written(family):
        net, example, flat = flat_of(family)
        inputs = draw(example, 64, 1)
        outputs = every_exit(net, inputs)
        thresholds = safe_thresholds(outputs, QUANTILES[1][: net.num_exits - 1])
        here = folder / family.__name__
        (here / "stages").mkdir(parents=True)
        save_stages(here / "stages", flat, Policy(thresholds=thresholds))
        return here, save(flat, Policy(thresholds=thresholds), here / "nested.onnx"), inputs, outputs, thresholds

    def opened(family, layout):
        here, nested, *rest = written(family)
        return load(nested if layout == "nested" else here / "stages", threads=1, providers=LAYOUTS[layout]), *rest

    opened.folder = folder
    return opened


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_a_file_on_a_device_agrees_with_the_loop_at_any_thresholds_and_batch(case, family, layout):
    engine, inputs, outputs, thresholds = case(family, layout)
    arrays = [i.numpy() for i in inputs]
    agree(engine(*arrays), outputs, thresholds)
    agree_everywhere(engine, arrays, outputs)
    agree_everywhere(engine, inputs, outputs)  # tensors on the device


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ways_of_calling_agree(case, layout):
    engine, inputs, outputs, thresholds = case(two_inputs, layout)
    expected = engine(*inputs)
    same(engine.answer_all(*inputs, rows=64), expected)
    same(engine(**dict(zip([i.name for i in engine.inputs], inputs, strict=True))), expected)
    agree(engine.answer_all(*inputs, rows=7), outputs, thresholds)
    strided = [np.asfortranarray(i.numpy()) for i in inputs]
    same(engine(*strided), expected)
    for given in (inputs[0].double(), inputs[0][:, :1]):
        with pytest.raises(InputError, match="'image' is float"):
            engine(given, inputs[1])
    with ThreadPoolExecutor(4) as pool, hasty_threads():
        halves = [[i[:32] for i in inputs], [i[32:] for i in inputs]] * 8
        for part, answer in zip(halves, pool.map(lambda part: engine(*part), halves), strict=True):
            rows = slice(0, 32) if torch.equal(part[0], inputs[0][:32]) else slice(32, 64)
            agree(answer, outputs[rows], thresholds)


@pytest.mark.parametrize("layout", ["staged", "recorded"])
def test_streams_stages_and_thresholds_per_sample_agree_on_a_device(case, layout):
    engine, inputs, outputs, thresholds = case(two_inputs, layout)
    expected = engine(*inputs)
    whole = {row: answers.output[k] for rows, answers in engine.stream(*inputs) for k, row in enumerate(rows)}
    np.testing.assert_allclose([whole[row] for row in range(64)], expected.output, atol=1e-5)
    own = np.where(np.arange(64) % 2, thresholds[0], -1.0).astype(np.float32)
    odd = engine(*inputs, thresholds=[own, *thresholds[1:]])
    even = engine(*inputs, thresholds=[-1.0, *thresholds[1:]])
    assert odd.exit.tolist() == np.where(np.arange(64) % 2, expected.exit, even.exit).tolist()
    values = {i.name: v.numpy() for i, v in zip(engine.inputs, inputs, strict=True)}
    for stage in engine.stages:  # what a scheduler calls returns arrays
        answers, _, values = stage.run(values)
        np.testing.assert_allclose(answers.output, outputs[:, stage.exit - 1], atol=1e-4)
        assert all(isinstance(value, np.ndarray) for value in values.values())


@pytest.mark.parametrize("layout", ["staged", "recorded"])
def test_only_answers_travel_to_the_host(case, layout, monkeypatch):
    engine, inputs, outputs, _ = case(chain, layout)
    fetched, real = [], onnxruntime.OrtValue.numpy
    monkeypatch.setattr(onnxruntime.OrtValue, "numpy", lambda self: fetched.append(self.shape()[1:]) or real(self))
    assert len({*engine(*inputs).exit}) > 1
    reached = len(fetched) // 3
    assert fetched == [[], [], [outputs.shape[2]]] * reached and reached > 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_failure_on_the_device_is_named(case, layout, monkeypatch):
    engine, inputs, *_ = case(two_inputs, layout)

    def failing(self, binding, options=None):
        raise RuntimeError(message)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", failing)
    message = "CUDA failure 700: an illegal memory access was encountered"
    with pytest.raises(RunError, match="CUDA failure 700"):
        engine(*inputs)
    message = "CUDA failure 2: out of memory"
    with pytest.raises(InputError, match=r"not enough memory for a batch of 64 .*, nor for one sample"):
        engine(*inputs)


def test_an_input_may_change_once_an_exit_has_answered(case):
    engine, inputs, *_ = case(two_inputs, "staged")
    expected = engine(*inputs)
    arrays = [i.numpy().copy() for i in inputs]
    for rows, answers in engine.stream(*arrays):
        np.testing.assert_allclose(answers.output, expected.output[rows], atol=1e-5)
        for array in arrays:
            array[:] = 0


def test_rows_are_picked_once_and_in_order():
    picker = picker_of([("CPUExecutionProvider", {})])
    for dtype in (np.float32, np.float16, np.int64, np.bool_):
        array = (np.arange(24).reshape(8, 3) % 5).astype(dtype)
        value = OnDevice(picker.device.holding(array), None, 8)
        assert picker(value) is value.value
        twice = value.take(np.array([6, 1, 3])).take(np.array([2, 0]))
        np.testing.assert_array_equal(picker(twice).numpy(), array[[3, 6]])
        buffer = picker.device.empty((4, 3), dtype)
        picker(twice, buffer)
        np.testing.assert_array_equal(buffer.numpy(), array[[3, 6, 3, 3]])
        picker(OnDevice(value.value, None, 3), buffer)  # of a larger buffer, the first rows
        np.testing.assert_array_equal(buffer.numpy(), array[[0, 1, 2, 0]])


@pytest.mark.parametrize(
    ("providers", "device"),
    [
        ([("CUDAExecutionProvider", {})], ("cuda", 0, False)),
        ([("CUDAExecutionProvider", {"device_id": "1", "enable_cuda_graph": True})], ("cuda", 1, True)),
        ([("TensorrtExecutionProvider", {}), ("CUDAExecutionProvider", {"device_id": 1})], ("cuda", 0, False)),
        ([("OpenVINOExecutionProvider", {})], None),
    ],
)
def test_values_are_where_the_first_provider_keeps_them(providers, device):
    picker = picker_of(providers)
    assert device == (picker and (picker.device.kind, picker.device.index, picker.device.recorded))
    assert picker is None or picker.device.provider == ("CUDAExecutionProvider", {"device_id": str(device[1])})


def test_picking_rows_needs_onnx(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    picker = picker_of([("CPUExecutionProvider", {})])
    value = OnDevice(picker.device.holding(np.zeros((2, 1), np.float32)), np.array([1]), 1)
    with pytest.raises(MissingExtraError, match=r"picking rows on a device needs onnx.*branchynet\[verify\]"):
        picker(value)


# What ONNX Runtime says where a GPU is missing


def faked(**session):
    """A session of another machine."""

    class Fake:
        def get_providers(self):
            return session.get("providers", ["CUDAExecutionProvider", "CPUExecutionProvider"])

        def get_provider_graph_assignment_info(self):
            nodes = [SimpleNamespace(op_type=name) for name in session.get("on_cpu", ())]
            part = SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: nodes)
            gpu = SimpleNamespace(ep_name="CUDAExecutionProvider", get_nodes=lambda: [SimpleNamespace(op_type="Conv")])
            return [part, gpu]

    return Fake()


def test_a_provider_that_falls_back_is_named():
    with pytest.raises(InputError, match=r"cannot use 'CUDAExecutionProvider'.*only \['CPU.*driver that is too old"):
        check_fallback(faked(providers=["CPUExecutionProvider"]), "CUDAExecutionProvider", "m.onnx")
    with pytest.warns(UserWarning, match=r"m\.onnx runs 2 of its 4 nodes on the CPU .*\(Conv, FusedMatMul\)"):
        fake = faked(on_cpu=["Shape", "FusedMatMul", "Conv"])
        check_fallback(fake, "CUDAExecutionProvider", "m.onnx")
    check_fallback(faked(on_cpu=["Shape", "Gather"]), "CUDAExecutionProvider", "m.onnx")  # no warning


def test_the_runtime_tells_where_nodes_run(case, monkeypatch):
    """Without a fake: a real session reports its operators."""
    monkeypatch.setattr(cpu_fallback, "_CPU", "AnotherExecutionProvider")
    engine, *_ = case(chain, "nested")
    assert engine.num_exits > 1
    seen = []
    real = cpu_fallback.check_fallback
    monkeypatch.setattr("branchynet.deploy.loading.check_fallback", lambda s, *rest: seen.append(s) or real(s, *rest))
    case(chain, "staged")
    operators = {n.op_type for s in seen for part in s.get_provider_graph_assignment_info() for n in part.get_nodes()}
    assert len(seen) > 1 and any("Conv" in name or "Gemm" in name for name in operators)


def test_libraries_of_cuda_are_loaded_before_a_session_needs_them(case, monkeypatch):
    loaded, real = [], onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: loaded.append("libraries"))
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )

    def opened(path, options, providers):
        loaded.append(providers[0][0])
        return real(path, options, providers=["CPUExecutionProvider"])  # as where the driver is too old

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    net, _, flat = flat_of(chain)
    path = save(flat, Policy(thresholds=(1.0,) * (net.num_exits - 1)), case.folder / "cuda.onnx")
    with pytest.raises(InputError, match="cannot use 'CUDAExecutionProvider' on this machine"):
        load(path, runtime="onnxruntime-cuda")
    assert loaded == ["libraries", "CUDAExecutionProvider"]


def test_a_missing_provider_is_named_with_the_package():
    with pytest.raises(InputError, match="install onnxruntime-gpu instead of onnxruntime"):
        load("m.onnx", runtime="onnxruntime-cuda")


def test_exits_cannot_be_recorded_in_one_file(monkeypatch, tmp_path):
    path = save(flat_of(chain)[2], Policy(thresholds=(1.0,) * (flat_of(chain)[0].num_exits - 1)), tmp_path / "m.onnx")

    def refused(*args, **options):
        raise RuntimeError("This session cannot use the graph capture feature: the model has control flow nodes")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refused)
    with pytest.raises(InputError, match=r"enable_cuda_graph cannot record .*m\.onnx, .*layout='stages'"):
        load(path, providers=RECORDED)
    with pytest.raises(FileError, match="cannot run"):
        load(path)
