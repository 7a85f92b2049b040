"""Costs in PyTorch, and files in ONNX Runtime, on an NVIDIA GPU; needs one, as test_cuda.py does."""

import numpy as np
import onnxruntime
import pytest
import torch

from branchynet import Policy, Target, bench, export, load, measure
from branchynet.policy.scores import entropy
from branchynet.profiling.network_parts import device_name
from branchynet.profiling.parts import leaving_policies, part_outputs
from branchynet.profiling.torch_parts import torch_parts
from helpers.loop import QUANTILES, agree, agree_everywhere, every_exit, safe_thresholds
from helpers.networks import build, draw

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.usefixtures("full_precision"),
]
RUNTIME, DEVICE, PROVIDER = "torch-cuda", "cuda", "CUDAExecutionProvider"
needs_onnxruntime_gpu = pytest.mark.skipif(
    PROVIDER not in onnxruntime.get_available_providers(), reason="needs onnxruntime-gpu"
)


@pytest.fixture
def case(family):
    """(network, 64 samples, every exit's outputs, thresholds)."""
    net, example = build(family, 0)
    inputs = draw(example, 64, 0)
    outputs = every_exit(net, inputs)
    return net, inputs, outputs, safe_thresholds(outputs, QUANTILES[1][: net.num_exits - 1])


def test_parts_compute_the_exits_in_their_names(case):
    net, inputs, outputs, _ = case
    target = Target(64, runtime=RUNTIME)
    parts = torch_parts(net, inputs, entropy, "float32", target)
    assert next(net.parameters()).device.type == "cpu"
    with parts.opened(part_outputs(parts) | leaving_policies(net.num_exits), target) as calls:
        for rows in (1, 64, 7):
            arrays = [i.numpy()[:rows] for i in inputs]
            for name, call in calls.items():
                n = int(name.partition("_")[2] or net.num_exits)
                label, second, *rest = call(*arrays)
                output = rest[-1] if name.startswith("leave") else second
                np.testing.assert_allclose(output, outputs[:rows, n - 1], atol=1e-4)  # sums in another order
                np.testing.assert_array_equal(label, output.argmax(axis=1))


@pytest.mark.parametrize("batch", [1, 64])
def test_costs_and_benchmarks_name_the_gpu(case, batch, tmp_path):
    net, inputs, outputs, thresholds = case
    target = Target(batch, runtime=RUNTIME)
    cost = measure(net, inputs, target, seconds=0.2)
    assert cost.plain_us > 0 and (cost.latency_us([True] * net.num_exits) > 0).all()
    assert (cost.runtime, cost.device) == (RUNTIME, device_name(target))
    path = export(net, tmp_path / "m.onnx", policy=Policy(thresholds=thresholds), example=inputs)
    labels = torch.from_numpy(outputs[:, -1].argmax(axis=1))
    (row,) = bench(path, net, (inputs, labels), target, repeats=2)
    assert (row["runtime"], row["device"]) == (RUNTIME, cost.device) and row["branchy_us"] > 0
    exits = load(path)(*inputs).exit
    assert row["exit_share"] == pytest.approx([(exits == n).mean() for n in range(1, net.num_exits + 1)])


@needs_onnxruntime_gpu
@pytest.mark.parametrize("layout", ["nested", "stages", "recorded"])
def test_files_agree_with_the_loop(case, layout, tmp_path):
    net, inputs, outputs, thresholds = case
    options = {"use_tf32": "0"} | ({"enable_cuda_graph": "1"} if layout == "recorded" else {})
    how = {"layout": "stages"} if layout != "nested" else {}
    path = export(net, tmp_path / layout, policy=Policy(thresholds=thresholds), example=inputs, **how)
    engine = load(path, providers=[(PROVIDER, options)])
    agree(engine(*(i.numpy() for i in inputs)), outputs, thresholds)
    agree(engine(*(i.to(DEVICE) for i in inputs)), outputs, thresholds)
    agree_everywhere(engine, [i.numpy() for i in inputs], outputs)
    if how:
        streamed = {row: a.exit[k] for rows, a in engine.stream(*inputs) for k, row in enumerate(rows)}
        assert [streamed[row] for row in range(64)] == engine(*inputs).exit.tolist()


@needs_onnxruntime_gpu
def test_costs_in_onnxruntime(case):
    net, inputs, *_ = case
    cost = measure(net, inputs, Target(64, runtime="onnxruntime-cuda"), seconds=0.2)
    assert cost.plain_us > 0 and cost.device == device_name(Target(runtime=RUNTIME))
