"""Networks, readers and inputs that no cascade can have end in one clear error."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from branchynet import (
    Policy,
    TorchEngine,
    cascade,
    export,
    record,
)
from branchynet.errors import GraphError, InputError
from helpers.cascades import CLASSES, WIDTH, Two, mlp, spread


@pytest.mark.parametrize(
    ("networks", "message"),
    [
        (lambda: (), "needs two networks or more; got 0"),
        (lambda: (mlp(2),), "needs two networks or more; got 1"),
        (lambda: ([mlp(2), mlp(3)],), r"network 1 of the cascade must be a Module; got a list.*one by one"),
        (lambda: (mlp(2), nn.Linear), "network 2 of the cascade must be a Module; got the class Linear"),
        (lambda: (mlp(2), "resnet"), "network 2 of the cascade must be a Module; got 'resnet'"),
        (lambda: (mlp(2), mlp(3).train()), r"network 2 of the cascade \(Sequential\) is in training mode.*\.eval\(\)"),
        (lambda: (nn.Sequential(nn.Dropout()).eval().append(nn.Dropout()), mlp(3)), "network 1 .* is in training mode"),
        (lambda: [mlp(2)] * 2, "network 2 of the cascade is the same Sequential as an earlier one"),
    ],
)
def test_unsuitable_networks_are_refused(networks, message):
    with pytest.raises(InputError, match=message):
        cascade(*networks())


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ([None], "output= has 1 functions for 2 networks"),
        (nn.Linear(4, 4), r"output= is a Linear, a module: give nn.Sequential"),
        ("logits", "output must be a function"),
    ],
)
def test_unsuitable_readers_are_refused(output, message):
    with pytest.raises(InputError, match=message):
        cascade(mlp(2), mlp(3), output=output)


class Scales(nn.Module):
    def forward(self, x):
        return x.mul_(2)[:, :CLASSES]


class Pair(nn.Module):
    def forward(self, x):
        return x[:, :CLASSES], x[:, -CLASSES:]


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: cascade(mlp(2), mlp(3, classes=7)), InputError, r"network 2 .* gives outputs \(B, 7\) and .*\(B, 4\)"),
        (lambda: cascade(mlp(2), nn.Sequential(mlp(3), nn.Flatten(0)).eval()), InputError, "must give .B, C, ...."),
        (lambda: cascade(mlp(2), spread(Two(3))), InputError, r"network 2 .*\(Two\) cannot process float32 \(., 6\)"),
        (lambda: cascade(Scales().eval(), mlp(3)), GraphError, "network 1 .* changes the input '1' in place"),
        (lambda: cascade(Pair().eval(), mlp(3)), GraphError, "network 1 .* exits of its own"),
        (lambda: cascade(mlp(2), mlp(3), output=lambda found: None), GraphError, "must return a tensor"),
    ],
)
def test_what_shows_in_forward_is_one_clear_error(build, error, message, tmp_path):
    net, x = build(), torch.randn(8, WIDTH)
    calls = (
        lambda: net(x),
        lambda: record(net, [(x, torch.zeros(8, dtype=torch.int64))], progress=False),
        lambda: export(net, tmp_path / "net.onnx", policy=Policy(thresholds=(0.5,)), example=x),
        lambda: TorchEngine(net, Policy(thresholds=(0.5,)), x),
    )
    for call in calls:
        with pytest.raises(error, match=message):
            call()
    with torch.inference_mode(), pytest.raises(error, match=message):
        net(x)


def test_labels_among_the_inputs_are_refused(tmp_path):
    class WithLoss(Two):
        def forward(self, x, extra, labels=None):
            return SimpleNamespace(logits=super().forward(x, extra))

    net = cascade(spread(WithLoss(2)), spread(WithLoss(3)))
    batch = {"x": torch.randn(4, WIDTH), "extra": torch.randn(4, 3), "labels": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(InputError, match="the example holds 'labels'"):
        export(net, tmp_path / "net.onnx", policy=Policy(thresholds=(0.5,)), example=batch)
