"""The PyTorch engine names what is wrong with batch sizes, precisions, memory, recordings and compilations."""

import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from branchynet import BranchyNet, Policy, TorchEngine
from branchynet.deploy import recorded_stages
from branchynet.deploy.recorder import Recorder
from branchynet.errors import GraphError, InputError
from branchynet.nn import checks

SIZES = (1, 4, 16, 64)
X = torch.randn(4, 4)
NO_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."


def network(*layers):
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 8), *layers, nn.Linear(8, 3))
    return BranchyNet(trunk, {"0": nn.Linear(8, 3)}).eval()


def engine(net=None, **options):
    return TorchEngine(net or network(nn.ReLU()), Policy(thresholds=(0.9,)), X, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": 8}, r"batch_sizes must be a list; got 8.*\(1, 8, 64\)"),
        ({"batch_sizes": "8"}, "batch_sizes must be a list"),
        ({"batch_sizes": [4, 0]}, "batch_sizes must be at least 1; got 0"),
        ({"batch_sizes": [1.5]}, "batch_sizes must be a whole number; got 1.5"),
        ({"batch_sizes": [True]}, "batch_sizes must be a whole number"),
        ({"batch_sizes": [70000]}, "batch_sizes must be at most 65535; got 70000"),
        ({"batch_sizes": [8], "free": {"input": {1: "length"}}}, r"batch_sizes=\(8,\) needs inputs of fixed lengths"),
        ({"precision": "half"}, r"precision must be one of 'float32', 'fp16', 'bf16'; got 'half'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        engine(**options)


def test_sizes_are_sorted_and_unknown_ones_are_named():
    made = engine(batch_sizes=[16, 4, 16])
    assert made.batch_sizes == (4, 16)
    made.prepare([4])
    with pytest.raises(InputError, match=r"no batch size 5; it has \(4, 16\)"):
        made.prepare([5])
    plain = engine()
    assert plain.batch_sizes == () and plain.prepare() is None
    with pytest.raises(InputError, match="no batch size 5; it has none"):
        plain.prepare([5])


# Precision


class Scaled(nn.Module):
    """Multiplies inside forward, where no module returns the product."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return (x * self.factor) / self.factor


class Masked(nn.Module):
    def forward(self, x):
        return x.masked_fill(x > 100, -1e9)


class Locked(nn.Module):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x):
        return x


def large(net):
    with torch.no_grad():
        net.backbone[0].weight[0, 0] = 1e5
    return net


@pytest.mark.parametrize("sizes", [(), SIZES])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_keeps_inputs_outputs_and_the_network(precision, sizes):
    net = network(nn.BatchNorm1d(8), nn.ReLU())
    x = torch.randn(20, 4)
    made = TorchEngine(net, Policy(thresholds=(0.9,)), x, precision=precision, batch_sizes=sizes)
    assert str(made.inputs[0]) == "input: float32 (B, 4)" and made.precision == precision
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    exits = set()
    for given in (x, x.numpy()):
        answer = made(given)
        assert answer.output.dtype == answer.score.dtype == np.float32
        with torch.no_grad():
            outputs = np.stack([o.numpy() for o in net(x)])
        # Products of 8 terms of about 1 are rounded to 11 and 8 bits.
        allowed = {"fp16": 1e-2, "bf16": 8e-2}[precision]
        np.testing.assert_allclose(answer.output, outputs[answer.exit - 1, np.arange(20)], atol=allowed)
        assert np.abs(answer.output - outputs[answer.exit - 1, np.arange(20)]).max() > 1e-6
        log_p = torch.log_softmax(torch.from_numpy(answer.output), 1)
        np.testing.assert_allclose(answer.score, -(log_p.exp() * log_p).sum(1), atol=1e-5)
        exits |= set(answer.exit.tolist())
    assert exits == {1, 2}


@pytest.mark.parametrize(
    ("net", "precision", "message"),
    [
        (lambda: network().half(), "fp16", r"already computes in float16 \('backbone.0.weight'\).*\.float\(\)"),
        (lambda: network().double(), "bf16", "already computes in float64"),
        (lambda: large(network()), "fp16", r"the weight 'backbone.0.weight' reaches 100000, and fp16 holds.*bf16"),
        (lambda: network(nn.Softplus(), Big()), "fp16", r"the output of 'backbone.2' reaches .*fp16 holds.*bf16"),
        (lambda: network(Scaled(1e6)), "fp16", "outputs of exit 2 are not finite in fp16.*bf16"),
        (lambda: network(Masked()), "fp16", "cannot be computed in fp16 .*overflow"),
        (lambda: network(Locked()), "fp16", "cannot be computed in fp16 .*lock"),
    ],
)
def test_networks_that_do_not_fit_a_precision_are_refused(net, precision, message):
    net = net()
    dtype = next(net.parameters()).dtype
    with pytest.raises(GraphError, match=message):
        TorchEngine(net, Policy(thresholds=(0.9,)), 10 * torch.randn(4, 4).to(dtype), precision=precision)


class Big(nn.Module):
    def forward(self, x):
        return x * 1e6


# Memory


def limited(made, most):
    """Let the last stage of an engine run out of memory beyond some rows."""

    def hook(_module, args):
        if args[0] > most:
            raise torch.OutOfMemoryError(NO_MEMORY)

    made._cut.stages[-1].module.register_forward_pre_hook(hook)
    return made


def test_running_out_of_memory_names_the_size_that_fits():
    made = limited(engine(batch_sizes=SIZES), 20)
    x = torch.randn(64, 4)
    made(x[:16], thresholds=[None])
    with pytest.raises(
        InputError, match=r"memory on cpu for exit 2 with a batch of 64 \(CUDA out.*\); a batch of 16 fits"
    ):
        made(x, thresholds=[None])
    with pytest.raises(InputError, match=r"give batch_sizes=\(1, 4, 16\)"):
        made.prepare()
    assert (made(x, thresholds=[9.0]).exit == 1).all()  # the other stage has room
    with pytest.raises(InputError, match=r"batch of 1 \(CUDA out.*\), nor of 1: free memory"):
        limited(engine(batch_sizes=SIZES), 0).prepare([1])


def test_buffers_that_do_not_fit_name_the_size_that_fits(monkeypatch):
    allocate = recorded_stages.allocate

    def scarce(cut, values, rows, device):
        if rows > 5:
            raise torch.OutOfMemoryError(NO_MEMORY)
        return allocate(cut, values, rows, device)

    monkeypatch.setattr(recorded_stages, "allocate", scarce)
    with pytest.raises(InputError, match=r"the buffers with a batch of 64 .*4 fits: give batch_sizes=\(1, 4\)"):
        engine(batch_sizes=SIZES)


def test_batches_that_do_not_fit_are_named_without_batch_sizes():
    made = limited(engine(), 20)
    made(torch.randn(20, 4))
    with pytest.raises(InputError, match=r"not enough memory for a call with a batch of 64 .*smaller batch"):
        made(torch.randn(64, 4), thresholds=[None])


@pytest.mark.parametrize("free", [1e3, 1e6, 1e9, 1e12])
def test_the_default_sizes_leave_most_of_the_memory_free(monkeypatch, free):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    sizes = recorded_stages._default_sizes(1e5, torch.device("cuda"))
    assert sizes == recorded_stages.BATCH_SIZES[: len(sizes)]
    assert sizes == (1,) or sizes[-1] * 1e5 <= free / 4
    assert len(sizes) == len(recorded_stages.BATCH_SIZES) or recorded_stages.BATCH_SIZES[len(sizes)] * 1e5 > free / 4


# Recording, compiling, and devices


class NoReLU(TorchDispatchMode):
    """Fails as CUDA does while it captures an operator that waits for the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.relu.default:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return func(*args, **(kwargs or {}))


def test_an_operator_that_cannot_be_recorded_is_named(monkeypatch):
    def record(self, step):
        with NoReLU():
            step()
        return step

    monkeypatch.setattr(Recorder, "record", record)
    with pytest.raises(GraphError, match=r"stage of exit 2 .*CUDA graph at 'aten.relu' \(CUDA error.*batch_sizes=\(\)"):
        engine(batch_sizes=SIZES)


def test_a_network_that_cannot_be_compiled_is_refused(monkeypatch):
    def compile(function, **options):
        def fail(*args):
            raise RuntimeError("no C++ compiler")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(GraphError, match=r"exit 1 cannot be compiled \(no C\+\+ compiler\).*compile=True"):
        engine(batch_sizes=SIZES, compile=True)
    with pytest.raises(GraphError, match=r"cannot be compiled \(no C\+\+ compiler\).*compile=True"):
        engine(compile=True)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The NVIDIA driver on your system is too old (found version 11040)."),
        torch.cuda.DeferredCudaCallError("CUDA call failed lazily: the driver is too old"),
    ],
)
def test_drivers_that_do_not_work_are_named(monkeypatch, error):
    def fail(*args, **options):
        raise error

    net = network()
    monkeypatch.setattr(checks.torch, "empty", fail)
    with pytest.raises(InputError, match=r"device='cuda' is not available .*driver .*too old.*give 'cpu'"):
        TorchEngine(net, Policy(thresholds=(0.9,)), X, device="cuda")


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own code
@pytest.mark.parametrize("sizes", [(), (2, 4)])
def test_compiled_stages_give_the_same_answers(sizes):
    net, x = network(nn.ReLU()), torch.randn(9, 4)
    want = TorchEngine(net, Policy(thresholds=(0.9,)), x)(x)
    got = TorchEngine(net, Policy(thresholds=(0.9,)), x, compile=True, batch_sizes=sizes)(x)
    assert got.exit.tolist() == want.exit.tolist() and {*want.exit} == {1, 2}
    np.testing.assert_allclose(got.output, want.output, atol=1e-5)
