"""int8: the nested file equals the flat int8 graph with the paper's loop, and computes in int8."""

import functools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from branchynet import Policy, load
from branchynet.deploy.assembly import assemble
from branchynet.graph.quantize import calibration_batches, quantized
from helpers.loop import QUANTILES, agree, agree_everywhere, safe_thresholds
from helpers.networks import FAMILIES, chain, draw, residual, tree, two_inputs
from helpers.onnx_graphs import FULL, flat_of, graphs, profile

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
    """ONNX Runtime at full optimization fuses every convolution and product of weights, also in subgraphs."""
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
    """Every exit's outputs of an int8 graph with float32 arithmetic: without optimization, nothing is fused."""
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
