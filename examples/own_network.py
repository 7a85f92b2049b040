"""Add early exits to your own network, start to end, on the embedded digits. Takes under a minute on a laptop."""

import tempfile
from pathlib import Path

import torch
from torch import nn

from branchynet import attach, choose, evaluate, export, fit, load, measure, record
from branchynet.data import load_data, loader
from branchynet.nn.branches import PooledLinear


def backbone():
    """Any module works; this one is a sequence of layers."""
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    for _ in range(3):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 10))


def main(epochs=8, progress=True):
    torch.manual_seed(0)
    data = load_data("digits")
    train, val = loader(data.train, 64, shuffle=True), loader(data.val, 100)
    example = next(iter(val))[0]

    net = attach(backbone(), at=["3"], example=example, branch=lambda x, classes: PooledLinear(x.shape[1], classes))
    fit(net, train, val, epochs=epochs, progress=progress)
    cost = measure(net, example)
    choice = choose(record(net, val, progress=progress), cost, max_drop=0.01, confidence=None)
    print("threshold:", choice.policy.thresholds)
    print("test:", evaluate(record(net, loader(data.test, 100), progress=progress), choice.policy, cost))

    with tempfile.TemporaryDirectory() as folder:
        path = export(net, Path(folder) / "model.onnx", policy=choice, example=example)
        images = data.test.images.float().numpy() / 255
        answer = load(path, threads=1)(images)
    print("left at exit 1:", (answer.exit == 1).mean(), "right:", (answer.label == data.test.labels.numpy()).mean())


if __name__ == "__main__":
    main()
