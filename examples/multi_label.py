"""Early exits for several labels per sample: which of six tones are in a sound."""

import math
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from branchynet import attach, choose, evaluate, export, fit, load, measure, record

TONES = 6


def sounds(samples, seed):
    """Return sounds (S, 1, 128), some clear, some noisy, and labels (S, 6): 1.0 if a tone is in the sound, else 0.0."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (samples, TONES), generator=random).float()
    phase = 2 * math.pi * torch.rand(samples, TONES, 1, generator=random)
    turns = torch.arange(6, 30, 4).view(1, TONES, 1) * torch.linspace(0, 2 * math.pi, 128)
    clear = (labels.unsqueeze(2) * torch.sin(turns + phase)).sum(dim=1)
    noise = 3 * torch.rand(samples, 1, generator=random) ** 2 * torch.randn(samples, 128, generator=random)
    return TensorDataset((clear + noise).unsqueeze(1), labels)


def backbone(width=32):
    layers, before = [], 1
    for stride in (2, 1, 1, 1, 1, 1):
        layers += [nn.Conv1d(before, width, 9, stride, 4), nn.BatchNorm1d(width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveMaxPool1d(4), nn.Flatten(), nn.Linear(4 * width, TONES))


def unsure(outputs):
    """Score: the entropy, in nats, of the label that the latest exit is least sure of."""
    logits = outputs[-1]
    return F.binary_cross_entropy_with_logits(logits, logits.sigmoid(), reduction="none").amax(dim=1)


def hamming(output, target):
    """Loss: the share of wrong labels per sample. For an exact match, use ``.any(dim=1)`` instead of the mean."""
    return ((output > 0) != (target > 0.5)).float().mean(dim=1)


def main(epochs=6, samples=2000, progress=True):
    torch.manual_seed(0)
    train, val, test = (sounds(n, seed) for seed, n in enumerate((samples, 1000, 1000)))
    val_loader, test_loader = DataLoader(val, 250), DataLoader(test, 250)
    example = val.tensors[0][:8]

    net = attach(backbone(), at=["5"], example=example)
    loss = F.binary_cross_entropy_with_logits
    fit(net, DataLoader(train, 64, shuffle=True), val_loader, epochs=epochs, loss=loss, progress=progress)
    cost = measure(net, example, score=unsure)
    options = {"loss": hamming, "score": unsure, "progress": progress}
    choice = choose(record(net, val_loader, **options), cost, max_drop=0.002, confidence=None)
    print("threshold:", choice.policy.thresholds)
    print("test:", evaluate(record(net, test_loader, **options), choice.policy, cost))

    with tempfile.TemporaryDirectory() as folder:
        path = export(net, Path(folder) / "model.onnx", policy=choice, example=example)
        inputs, labels = test.tensors
        answer = load(path, threads=1)(inputs.numpy())
    right = (answer.output > 0) == (labels.numpy() > 0.5)  # answer.label has no meaning for several labels
    print("left at exit 1:", (answer.exit == 1).mean(), "labels right:", right.mean())


if __name__ == "__main__":
    main()
