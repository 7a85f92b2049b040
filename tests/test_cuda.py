"""What runs on an NVIDIA GPU gives the answers of the CPU; needs one, see benchmarks/gpu/tests.sh."""

import os

import numpy as np
import pytest
import torch
from torch import nn

from branchynet import BranchyNet, Policy, averaged, fit, record
from branchynet.deploy.torch_engine import TorchEngine
from branchynet.errors import GraphError, InputError
from branchynet.training.options import FitOptions
from helpers.loop import QUANTILES, agree, agree_everywhere, every_exit, safe_thresholds
from helpers.networks import build, draw, residual, spread_out, two_inputs

REHEARSED = bool(os.environ.get("BRANCHYNET_REHEARSE"))  # every line on the CPU
DEVICE = "cpu" if REHEARSED else "cuda"
SIZES = (1, 2, 5, 16, 40)
HALF = {"fp16": 2e-2, "bf16": 1.5e-1}  # outputs of about 3, after some layers that round to 11 and 8 bits

pytestmark = [
    pytest.mark.skipif(not (REHEARSED or torch.cuda.is_available()), reason="needs an NVIDIA GPU"),
    pytest.mark.usefixtures("full_precision"),
]
needs_cuda = pytest.mark.skipif(REHEARSED, reason="needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """accelerate may take the GPU."""
    if not REHEARSED:
        monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)


def case(family, quantiles=QUANTILES[1]):
    """(net, 64 samples, outputs of every exit, thresholds)."""
    net, example = build(family, 0)
    inputs = draw(example, 64, 0)
    outputs = every_exit(net, inputs)
    return net, inputs, outputs, safe_thresholds(outputs, quantiles[: net.num_exits - 1])


@pytest.mark.parametrize("sizes", [(), SIZES])
def test_the_engine_agrees_with_the_loop(family, sizes):
    net, inputs, outputs, thresholds = case(family)
    engine = TorchEngine(net, Policy(thresholds=thresholds), inputs, device=DEVICE, batch_sizes=sizes)
    agree(engine(*(i.numpy() for i in inputs)), outputs, thresholds)
    agree(engine(*(i.to(DEVICE) for i in inputs)), outputs, thresholds)
    rows = np.arange(300) % 64
    agree(engine(*(i[rows] for i in inputs)), outputs[rows], thresholds)
    agree(engine(*(i[:0] for i in inputs)), outputs[:0], thresholds)
    agree_everywhere(engine, inputs, outputs)
    poisoned = [i[:8].clone() for i in inputs]
    if poisoned[0].is_floating_point():
        poisoned[0][0] = np.nan  # the row that pads
        answer = engine(*poisoned, thresholds=(1e30,) * len(thresholds))
        assert answer.exit.tolist() == [net.num_exits, *[1] * 7]
        agree(engine(*(i[:8] for i in inputs)), outputs[:8], thresholds)


@pytest.mark.parametrize("sizes", [(), SIZES])
def test_each_sample_may_have_thresholds_of_its_own(family, sizes):
    net, inputs, outputs, thresholds = case(family)
    engine = TorchEngine(net, Policy(thresholds=thresholds), inputs, device=DEVICE, batch_sizes=sizes)
    levels = [safe_thresholds(outputs, [q] * len(thresholds)) for q in (0.0, 0.3, 0.6, 1.0)]
    chosen = np.random.default_rng(0).integers(len(levels), size=64)
    answer = engine(*inputs, thresholds=list(np.array([levels[k] for k in chosen]).T))
    for k, own in enumerate(levels):
        agree(type(answer)(*(a[chosen == k] for a in answer)), outputs[chosen == k], own)
    agree(engine(*inputs), outputs, thresholds)
    agree(engine(*inputs, thresholds=(None,) * len(thresholds)), outputs, (None,) * len(thresholds))


def test_the_default_sizes_take_any_batch_and_averaged_exits():
    net, inputs, _, _ = case(residual)
    mean = averaged(net)
    outputs = every_exit(mean, inputs)
    thresholds = safe_thresholds(outputs, QUANTILES[1][:2])
    engine = TorchEngine(mean, Policy(thresholds=thresholds), inputs, device=DEVICE)
    assert REHEARSED or engine.batch_sizes[-1] == 256
    engine.prepare()
    for batch in (1, 2, 7, 33, 64):
        agree(engine(*(i[:batch] for i in inputs)), outputs[:batch], thresholds)


def test_changes_of_the_network_are_seen_after_recording():
    net, inputs, _, _ = case(two_inputs)
    engine = TorchEngine(net, Policy(thresholds=(1.0,) * (net.num_exits - 1)), inputs, device=DEVICE, batch_sizes=SIZES)
    engine.prepare()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    spread_out(net, [i.to(DEVICE) for i in inputs])
    with torch.no_grad():
        exits = [output.cpu().numpy() for output in net(*(i.to(DEVICE) for i in inputs))]
    outputs = np.stack(exits, axis=1)
    thresholds = safe_thresholds(outputs, QUANTILES[1][: net.num_exits - 1])
    agree(engine(*inputs, thresholds=thresholds), outputs, thresholds)


def test_channels_last_stays(family):
    net, inputs, outputs, thresholds = case(family)
    wide = [i.to(memory_format=torch.channels_last) if i.dim() == 4 else i for i in inputs]
    net.to(memory_format=torch.channels_last)
    engine = TorchEngine(net, Policy(thresholds=thresholds), tuple(wide), device=DEVICE, batch_sizes=SIZES)
    agree(engine(*inputs), outputs, thresholds)


def test_compiled_stages():
    net, inputs, outputs, thresholds = case(two_inputs)
    how = {"device": DEVICE, "batch_sizes": (4, 16, 40)}
    engine = TorchEngine(net, Policy(thresholds=thresholds), inputs, compile=not REHEARSED, **how)
    agree_everywhere(engine, inputs, outputs)


@pytest.mark.parametrize("sizes", [(), SIZES])
@pytest.mark.parametrize("precision", HALF)
def test_precisions(family, precision, sizes):
    net, inputs, outputs, _ = case(family)
    early = net.num_exits - 1
    engine = TorchEngine(
        net, Policy(thresholds=(0.0,) * early), inputs, device=DEVICE, precision=precision, batch_sizes=sizes
    )
    for exit in range(1, net.num_exits + 1):
        answer = engine(*inputs, thresholds=[np.inf if n == exit else None for n in range(1, early + 1)])
        assert (answer.exit == exit).all() and answer.output.dtype == np.float32
        np.testing.assert_allclose(answer.output, outputs[:, exit - 1], atol=HALF[precision] * np.abs(outputs).max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_leaves_where_its_own_outputs_say(family, dtype):
    net, example = build(family, 0)
    inputs = tuple(i.to(dtype) if i.is_floating_point() else i for i in draw(example, 16, 0))
    engine = TorchEngine(net.to(dtype), Policy(thresholds=(0.0,) * (net.num_exits - 1)), inputs, device=DEVICE)
    answer = engine(*(i.to(DEVICE) for i in inputs))
    assert (answer.exit == net.num_exits).all()
    answer = engine(*(i.to(DEVICE) for i in inputs), thresholds=(float("inf"),) * (net.num_exits - 1))
    assert (answer.exit == 1).all()


class Wide(nn.Module):
    """4 MiB of features per sample."""

    def forward(self, x):
        return x.repeat(1, 2**18)


@needs_cuda
def test_running_out_of_memory_names_the_size_that_fits():
    net = BranchyNet(nn.Sequential(nn.Linear(4, 4), Wide(), nn.Linear(2**20, 3)), {"0": nn.Linear(4, 3)})
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 2**30) / total))
    try:
        engine = TorchEngine(
            net, Policy(thresholds=(1.0,)), torch.randn(4, 4), device=DEVICE, batch_sizes=(8, 16, 4096)
        )
        with pytest.raises(InputError, match=r"not enough memory on cuda.* batch of 4096 .*16 fits.*\(8, 16\)"):
            engine.prepare()
        with pytest.raises(InputError, match="batch of 4096"):
            TorchEngine(net, Policy(thresholds=(1.0,)), torch.randn(4, 4), batch_sizes=())(
                torch.randn(4096, 4), thresholds=[None]
            )
        small = TorchEngine(net, Policy(thresholds=(1.0,)), torch.randn(4, 4), batch_sizes=(8, 16))
        assert small(torch.randn(40, 4)).exit.shape == (40,)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def batches(inputs):
    """What a loader yields: inputs and class indices, 8 samples at a time."""
    target = torch.arange(len(inputs[0])) % 3
    parts = zip(*(i.split(8) for i in inputs), target.split(8), strict=True)
    return [(part[:-1], part[-1]) for part in parts]


def test_records_of_both_devices_agree(family):
    net, example = build(family, 0)
    data = batches(draw(example, 32, 0))
    here = record(net, data, progress=False, device="cpu")
    there = record(net, data, progress=False, device=DEVICE)
    # Sums of a few hundred float32 products, taken in another order.
    torch.testing.assert_close(torch.tensor(there.outputs), torch.tensor(here.outputs), atol=1e-4, rtol=1e-4)


def test_training_on_a_gpu_is_that_of_the_cpu(family, tmp_path):
    losses = {}
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        net, example = build(family, 0)
        history = fit(
            net,
            batches(draw(example, 32, 0)),
            epochs=3,
            run=tmp_path / f"{len(losses)}",
            progress=False,
            options=FitOptions(device=device),
        )
        losses[len(losses)] = [row.train_loss for row in history.rows]
    # Three epochs of four steps; each adds rounding of about 1e-6 to sums of another order.
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[1][-1] < losses[1][0]


@torch.library.custom_op("branchynet_tests::waits", mutates_args=())
def waits(x: torch.Tensor) -> torch.Tensor:
    """Copy to the host and back, which a CUDA graph cannot do."""
    return x.cpu().to(x.device)


@waits.register_fake
def _(x):
    return torch.empty_like(x)


class Waits(nn.Module):
    def forward(self, x):
        return waits(x)


@needs_cuda
def test_an_operator_that_waits_for_the_host_is_refused_with_the_remedy():
    """The last test: a failed capture may leave traces."""
    net = BranchyNet(nn.Sequential(nn.Linear(4, 8), Waits(), nn.Linear(8, 3)), {"0": nn.Linear(8, 3)})
    x = torch.randn(8, 4)
    with pytest.raises(GraphError, match=r"exit 2 cannot be recorded as a CUDA graph.*batch_sizes=\(\)"):
        TorchEngine(net, Policy(thresholds=(0.9,)), x, device=DEVICE, batch_sizes=SIZES)
    assert TorchEngine(net, Policy(thresholds=(0.9,)), x, batch_sizes=())(x).exit.shape == (8,)
    net, inputs, outputs, thresholds = case(residual)
    engine = TorchEngine(net, Policy(thresholds=thresholds), inputs, device=DEVICE, batch_sizes=SIZES)
    agree(engine(*inputs), outputs, thresholds)
