"""int8 files predict in OpenVINO like in ONNX Runtime, for any policy and any shapes that the network computes."""

import numpy as np
import pytest
import torch
from torch import nn

from branchynet import Policy, attach, export, load

pytest.importorskip("openvino")

NEVER = Policy("entropy", (None,))
POLICIES = {
    "flat": None,
    "never": NEVER,
    "some leave": Policy("entropy", (2.0,)),
    "all leave": Policy("entropy", (9.0,)),
}


class WithZeros(nn.Module):
    """Joins a channel of zeros, which needs the size of the batch."""

    def forward(self, x):
        return torch.cat([x, torch.zeros(x.shape[0], 1, *x.shape[2:])], dim=1)


class Sum(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return torch.relu(x + self.part(x))


def conv(inputs, outputs, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def _plain():
    return [conv(1, 8, stride=2), nn.ReLU(), conv(8, 8), nn.ReLU()], nn.Linear(8 * 64, 4)


def _shapes():
    return [conv(1, 8, stride=2), nn.ReLU(), WithZeros(), nn.MaxPool2d(2), conv(9, 4)], nn.Linear(4 * 16, 4)


def _normalized():
    return [conv(1, 8, stride=2), nn.BatchNorm2d(8), nn.ReLU(), WithZeros(), nn.BatchNorm2d(9), nn.ReLU()], nn.Linear(
        9 * 64, 4
    )


def _depthwise():
    return [conv(1, 8, stride=2), nn.ReLU6(), WithZeros(), conv(9, 9, groups=9), nn.Hardswish()], nn.Linear(9 * 64, 4)


def _residual():
    return [conv(1, 8, stride=2), nn.ReLU(), Sum(conv(8, 8)), Sum(conv(8, 8))], nn.Linear(8 * 64, 4)


def _dense():
    return [nn.Flatten(), nn.Linear(256, 8), nn.ReLU(), WithZeros(), nn.Linear(9, 8), nn.ReLU()], nn.Linear(8, 4)


@pytest.fixture(scope="module", params=[_plain, _shapes, _normalized, _depthwise, _residual, _dense])
def case(request):
    """A network whose biases matter and differ, with images."""
    torch.manual_seed(0)
    parts, last = request.param()
    trunk = nn.Sequential(*parts, nn.Flatten(), last)
    for name, parameter in trunk.named_parameters():
        if name.endswith("bias"):
            nn.init.uniform_(parameter, -1, 1)
    images = torch.rand(128, 1, 16, 16)
    return attach(trunk, at=["1"], example=images[:8]).eval(), images


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_openvino_computes_what_onnx_runtime_computes(case, policy, tmp_path):
    net, images = case
    int8 = {"precision": "int8", "calibration": [images]}
    export(net, tmp_path / "m.onnx", policy=policy, example=images[:8], **int8)
    ours, theirs = (load(tmp_path / "m.onnx", threads=1, runtime=runtime) for runtime in ("openvino", "onnxruntime"))
    found, wanted = ours.outputs(images.numpy()), theirs.outputs(images.numpy())
    allowed = theirs.metadata["precision"]["mean_difference"]
    # After a float sum the runtimes may round to either step: they may differ as much as int8 and float.
    if policy is None:
        for got, want, slack in zip(found[1:], wanted[1:], allowed, strict=True):
            assert np.abs(got - want).mean() <= slack
        return
    _, exit, _, output = found
    same = exit == wanted[1]
    assert same.mean() >= 0.9  # a sample near the threshold may leave on either side
    assert np.abs(output - wanted[3])[same].mean() <= max(allowed)
    if policy is NEVER:
        assert (exit == 2).all()


def test_a_file_that_never_leaves_early_asks_for_no_shape(tmp_path):
    """Plain OpenVINO, in another language, computes wrong where an int8 graph asks for one."""
    import openvino

    torch.manual_seed(0)
    trunk = nn.Sequential(conv(1, 8, stride=2), nn.ReLU(), conv(8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))
    for layer in trunk[:3:2]:
        nn.init.uniform_(layer.bias, -1, 1)
    images = torch.rand(64, 1, 16, 16)
    net = attach(trunk, at=["1"], example=images).eval()
    path = export(net, tmp_path / "m.onnx", policy=NEVER, example=images, precision="int8", calibration=[images])
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    engine = load(path)
    slack = max(engine.metadata["precision"]["mean_difference"])
    found = compiled(images.numpy())[compiled.output("output")]
    assert np.abs(found - engine(images.numpy()).output).mean() <= slack
