"""Early exits for regression: every exit predicts a number and its own error, which is the score."""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from branchynet import Target, attach, choose, evaluate, export, fit, load, measure, record

SCALE = 0.25  # an error of this size counts as half wrong


def points(samples, seed):
    """Return points (S, 8) and targets (S, 1), which are linear on one side of a border and oscillate on the other."""
    x = torch.rand(samples, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    waves = torch.sin(4 * x[:, 1]) * torch.cos(3 * x[:, 2])
    y = 0.5 * x[:, 1] - 0.3 * x[:, 3] + torch.where(x[:, 0] > 0, waves, torch.zeros(()))
    return TensorDataset(x, y.unsqueeze(1))  # (S, 1), because PyTorch losses would broadcast (B, 1) against (B,)


def backbone(width=128):
    """Two outputs: the number, and the logarithm of its expected variance."""
    layers, before = [], 8
    for _ in range(5):
        layers += [nn.Linear(before, width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.Linear(width, 2))


def likelihood(output, target):
    """Training loss: Gaussian negative log-likelihood (Nix and Weigend 1994, doi:10.1109/ICNN.1994.374138)."""
    return F.gaussian_nll_loss(output[:, :1], target, output[:, 1:].clamp(-8, 8).exp())


def variance(outputs):
    """Score: the logarithm of the variance at the latest exit; smaller is surer."""
    return outputs[-1][:, 1]


def squashed(output, target):
    """Loss: the absolute error, mapped to [0, 1)."""
    error = (output[:, :1] - target).abs().squeeze(1)
    return error / (error + SCALE)


def main(epochs=12, samples=6000, progress=True):
    torch.manual_seed(0)
    train, val, test = (points(n, seed) for seed, n in enumerate((samples, 2000, 2000)))
    val_loader, test_loader = DataLoader(val, 500), DataLoader(test, 500)
    example = val.tensors[0][:8]

    net = attach(backbone(), at=["1"], example=example)
    fit(net, DataLoader(train, 64, shuffle=True), val_loader, epochs=epochs, loss=likelihood, progress=progress)
    cost = measure(net, example, Target(batch_size=64), score=variance)
    options = {"loss": squashed, "score": variance, "progress": progress}
    choice = choose(record(net, val_loader, **options), cost, max_drop=0.02, confidence=None)
    print("threshold:", choice.policy.thresholds)
    print("test:", evaluate(record(net, test_loader, **options), choice.policy, cost))

    with tempfile.TemporaryDirectory() as folder:
        path = export(net, Path(folder) / "model.onnx", policy=choice, example=example)
        x, y = test.tensors
        answer = load(path, threads=1)(x.numpy())
    error = abs(answer.output[:, 0] - y.numpy()[:, 0])  # answer.label has no meaning for regression
    print("left at exit 1:", (answer.exit == 1).mean(), "mean error:", error.mean())


if __name__ == "__main__":
    main()
