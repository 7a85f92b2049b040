"""What runs on an NVIDIA GPU gives the answers of the CPU; needs one, see benchmarks/experiments/gpu/tests.sh."""

import pytest
import torch

from branchynet import Policy, fit, record
from branchynet.deploy.torch_engine import TorchEngine
from branchynet.training.options import FitOptions
from helpers.loop import QUANTILES, agree, agree_everywhere, every_exit, safe_thresholds
from helpers.networks import build, draw

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """accelerate may take the GPU."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)


@pytest.fixture(autouse=True)
def full_precision():
    """TF32 rounds to 10 bits, which is more than the oracle allows."""
    modules = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [module.allow_tf32 for module in modules]
    for module in modules:
        module.allow_tf32 = False
    yield
    for module, allowed in zip(modules, before, strict=True):
        module.allow_tf32 = allowed


def test_the_engine_agrees_with_the_loop(family):
    net, example = build(family, 0)
    inputs = draw(example, 64, 0)
    outputs = every_exit(net, inputs)
    thresholds = safe_thresholds(outputs, QUANTILES[1][: net.num_exits - 1])
    engine = TorchEngine(net, Policy(thresholds=thresholds), inputs, device="cuda")
    agree(engine(*(i.numpy() for i in inputs)), outputs, thresholds)
    agree(engine(*(i.cuda() for i in inputs)), outputs, thresholds)
    agree_everywhere(engine, inputs, outputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_leaves_where_its_own_outputs_say(family, dtype):
    net, example = build(family, 0)
    inputs = tuple(i.to(dtype) if i.is_floating_point() else i for i in draw(example, 16, 0))
    engine = TorchEngine(net.to(dtype), Policy(thresholds=(0.0,) * (net.num_exits - 1)), inputs, device="cuda")
    answer = engine(*(i.cuda() for i in inputs))
    assert (answer.exit == net.num_exits).all()
    answer = engine(*(i.cuda() for i in inputs), thresholds=(float("inf"),) * (net.num_exits - 1))
    assert (answer.exit == 1).all()


def batches(inputs):
    """What a loader yields: inputs and class indices, 8 samples at a time."""
    target = torch.arange(len(inputs[0])) % 3
    parts = zip(*(i.split(8) for i in inputs), target.split(8), strict=True)
    return [(part[:-1], part[-1]) for part in parts]


def test_records_of_both_devices_agree(family):
    net, example = build(family, 0)
    data = batches(draw(example, 32, 0))
    here = record(net, data, progress=False, device="cpu")
    there = record(net, data, progress=False, device="cuda")
    # Sums of a few hundred float32 products, taken in another order.
    torch.testing.assert_close(torch.tensor(there.outputs), torch.tensor(here.outputs), atol=1e-4, rtol=1e-4)


def test_training_on_a_gpu_is_that_of_the_cpu(family, tmp_path):
    losses = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        net, example = build(family, 0)
        history = fit(
            net,
            batches(draw(example, 32, 0)),
            epochs=3,
            run=tmp_path / device,
            progress=False,
            options=FitOptions(device=device),
        )
        losses[device] = [row.train_loss for row in history.rows]
    # Three epochs of four steps; each adds rounding of about 1e-6 to sums of another order.
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)
    assert losses["cuda"][-1] < losses["cuda"][0]
