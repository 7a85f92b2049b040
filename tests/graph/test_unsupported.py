"""Networks that cannot be written to a file: the error names the part and the remedy."""

import importlib.util
import logging

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from branchynet import BranchyNet, Policy, attach, export, load, measure, record
from branchynet.deploy.torch_engine import TorchEngine
from branchynet.errors import GraphError
from branchynet.graph.onnx_flat import flatten
from branchynet.nn.fingerprint import fingerprint

EARLY = Policy(thresholds=(1.3,))
RUNTIMES = ["onnxruntime", *(["openvino"] if importlib.util.find_spec("openvino") else [])]


@pytest.fixture(autouse=True)
def _brief_failures(caplog):
    caplog.set_level(logging.WARNING)


def chain(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype)


class Scaled(nn.Module):
    """A network that converts inputs of any dtype to float32."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, counts):
        return self.last(torch.relu(self.first(counts.float() / 50 - 1)))


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint8", "uint16", "uint32", "int32", "bool", "float16"])
def test_inputs_of_any_number_type(dtype, tmp_path):
    torch.manual_seed(0)
    x = torch.rand(9, 6) > 0.5 if dtype == "bool" else (torch.rand(9, 6) * 100).to(getattr(torch, dtype))
    net = attach(Scaled(), ["first"], example=x)
    with torch.no_grad():
        middle = float(torch.distributions.Categorical(logits=net(x)[0]).entropy().median())
    export(net, tmp_path / "m.onnx", policy=Policy(thresholds=(middle + 1e-4,)), example=x)
    for runtime in RUNTIMES:
        engine = load(tmp_path / "m.onnx", threads=1, runtime=runtime)
        assert engine.inputs[0].dtype_name == dtype and sorted(engine(x.numpy()).exit) == [1] * 5 + [2] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_branches_have_the_type_of_their_features(dtype):
    x = torch.randn(3, 6, dtype=dtype)
    assert {p.dtype for p in attach(chain(dtype), ["1", "3"], example=x).parameters()} == {dtype}
    headless = attach(chain(dtype), ["1"], example=x, num_classes=7)
    assert headless(x)[-1].dtype == dtype and headless(x)[-1].shape == (3, 7)


class Inside(nn.Module):
    """A network whose second half computes in another dtype."""

    def __init__(self, dtype):
        super().__init__()
        self.first, self.last, self.dtype = nn.Linear(6, 8), nn.Linear(8, 4), dtype

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)).to(self.dtype).float())


@pytest.mark.parametrize(
    ("make", "dtype", "message"),
    [
        (
            lambda: chain(torch.bfloat16),
            torch.bfloat16,
            r"the weight '0\.weight' is bfloat16.*\.float\(\).*TorchEngine",
        ),
        (Scaled, torch.bfloat16, r"the input 'counts' is bfloat16"),
        (lambda: Inside(torch.bfloat16), torch.float32, r"is bfloat16.*TorchEngine"),
        (lambda: Inside(torch.float8_e4m3fn), torch.float32, r"is float8_e4m3fn"),
        (
            lambda: nn.Sequential(Real(), *chain()),
            torch.complex64,
            r"the input 'input' is complex64.*real and imaginary",
        ),
    ],
    ids=["weights", "input", "inside", "float8", "complex"],
)
def test_number_types_that_no_file_computes(make, dtype, message, tmp_path):
    backbone = make()
    net = attach(
        backbone, ["1" if isinstance(backbone, nn.Sequential) else "first"], example=torch.ones(3, 6, dtype=dtype)
    )
    x = torch.randn(3, 6).to(dtype)
    for attempt in (lambda: export(net, tmp_path / "m.onnx", policy=EARLY, example=x), lambda: measure(net, x)):
        with pytest.raises(GraphError, match=message):
            attempt()
    if dtype is torch.bfloat16:
        assert TorchEngine(net, EARLY, x)(x).label.shape == (3,)


class Real(nn.Module):
    def forward(self, input):
        return input.real


class Recurrent(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.first, self.recurrent = nn.Linear(6, 8), nn.LSTM(8, 10, batch_first=True, **options)
        self.last = nn.LazyLinear(4)

    def forward(self, x):
        return self.last(self.recurrent(torch.tanh(self.first(x)))[0][:, -1])


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"bias": False}])
def test_an_lstm_that_projects_its_state(options, tmp_path):
    x = torch.randn(3, 5, 6)
    net = attach(Recurrent(proj_size=5, **options), ["first"], example=x)
    with pytest.raises(GraphError, match=r"LSTM in 'recurrent' at .*from 10 to 5 \(proj_size=5\).*TorchEngine"):
        export(net, tmp_path / "m.onnx", policy=EARLY, example=x)
    assert TorchEngine(net, EARLY, x)(x).label.shape == (3,)
    flatten(attach(Recurrent(**options), ["first"], example=x), x)


class Scales(Tensor):
    """8-bit weights with a scale, as in quantization libraries: a tensor of tensors."""

    @staticmethod
    def __new__(cls, whole, scale):
        return Tensor._make_wrapper_subclass(cls, whole.shape, dtype=scale.dtype)

    def __init__(self, whole, scale):
        self.whole, self.scale = whole, scale

    def __tensor_flatten__(self):
        return ["whole", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts, _context, _size, _stride):
        return Scales(**parts)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        plain = tree_map(lambda t: t.whole * t.scale if isinstance(t, Scales) else t, args)
        return func(*plain, **(kwargs or {}))


def quantized():
    net = chain()
    net[0].weight = nn.Parameter(Scales(torch.randint(-9, 9, (8, 6)), torch.tensor(0.1)), requires_grad=False)
    return net


def unfilled():
    return chain().to("meta")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (quantized, r"the weight '(backbone\.)?0\.weight' is a (tests|test_unsupported) Scales.*precision='int8'"),
        (unfilled, r"the weight '(backbone\.)?0\.weight' is on the meta device.*load_state_dict"),
    ],
)
def test_weights_that_are_no_plain_tensors(make, message, tmp_path):
    x, net = torch.randn(3, 6), BranchyNet(make(), {"1": nn.Linear(8, 4)})
    for attempt in (
        lambda: attach(make(), ["1"], example=x),
        lambda: flatten(net, x),
        lambda: TorchEngine(net, EARLY, x),
        lambda: fingerprint(net),
    ):
        with pytest.raises(GraphError, match=message):
            attempt()


class Part(nn.Module):
    """A network with a part that `how` creates."""

    def __init__(self, how):
        super().__init__()
        self.first, self.part, self.last = (
            nn.Linear(6, 8),
            how(nn.Sequential(nn.Linear(8, 8), nn.Tanh())),
            nn.Linear(8, 4),
        )

    def forward(self, x):
        return self.last(self.part(self.first(x)))


def traced(module, x=None):
    return torch.jit.trace(module, torch.randn(2, 8) if x is None else x)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "tap", "path"),
    [
        (lambda: torch.jit.script(chain()), "1", r".*"),
        (lambda: traced(chain(), torch.randn(2, 6)), "1", r".*"),
        (lambda: Part(torch.jit.script), "part.0", "'part'"),
        (lambda: Part(traced), "part.1", "'part'"),
        (lambda: Part(torch.jit.script), "part", "'part'"),
    ],
    ids=["scripted", "traced", "in scripted", "in traced", "at scripted"],
)
def test_taps_in_torchscript(make, tap, path):
    with pytest.raises(GraphError, match=rf"the submodule {path} is TorchScript.*'{tap}' cannot be tapped"):
        attach(make(), [tap], example=torch.randn(3, 6))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_beside_the_taps(tmp_path):
    x = torch.randn(3, 6)
    net = attach(Part(torch.jit.script), ["first"], example=x)
    assert record(net, [(x, torch.zeros(3, dtype=torch.long))], progress=False).num_exits == 2
    with pytest.raises(GraphError, match=r"in 'part' .*TorchScript cannot be exported: give the nn\.Module"):
        export(net, tmp_path / "m.onnx", policy=EARLY, example=x)
    followed = attach(Part(traced), ["first"], example=x)
    engine = load(export(followed, tmp_path / "m.onnx", policy=EARLY, example=x), threads=1)
    np.testing.assert_allclose(engine(x.numpy(), thresholds=[None]).output, followed(x)[-1].detach(), atol=1e-5)
