"""Early exits for semantic segmentation: images with few clear shapes leave early, crowded and noisy ones continue."""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from branchynet import attach, choose, evaluate, export, fit, load, measure, record
from branchynet.losses import pixel_error

SIDE = 32


def shapes(samples, seed):
    """Return noisy images (S, 1, 32, 32) of squares and discs; masks (S, 32, 32): 0 background, 1 square, 2 disc."""
    random = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return torch.randint(low, high, (samples, 1, 1), generator=random)

    rows, columns = torch.arange(SIDE).view(1, -1, 1), torch.arange(SIDE).view(1, 1, -1)
    masks, crowd = torch.zeros(samples, SIDE, SIDE, dtype=torch.int64), draw(0, 4)
    for shape in range(3):
        kind, half, y, x = draw(1, 3), draw(3, 11), draw(5, 27), draw(5, 27)
        square = torch.maximum((rows - y).abs(), (columns - x).abs()) <= half
        disc = (rows - y) ** 2 + (columns - x) ** 2 <= half**2
        masks = torch.where((shape < crowd) & torch.where(kind == 1, square, disc), kind, masks)
    noise = 0.1 * crowd * torch.randn(samples, SIDE, SIDE, generator=random)
    return TensorDataset(((masks > 0) + noise).unsqueeze(1), masks)


def backbone(width=40):
    """Fully convolutional: reduce to a quarter of the size, process, and upsample to logits (B, 3, 32, 32)."""
    layers, before = [], 1
    for stride, dilation in ((2, 1), (2, 1), (1, 1), (1, 2), (1, 4), (1, 2), (1, 1)):
        layers += [nn.Conv2d(before, width, 3, stride, dilation, dilation), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.Conv2d(width, 3, 1), nn.Upsample(scale_factor=4, mode="bilinear"))


def main(epochs=5, samples=1600, progress=True):
    torch.manual_seed(0)
    train, val, test = (shapes(n, seed) for seed, n in enumerate((samples, 500, 500)))
    val_loader, test_loader = DataLoader(val, 100), DataLoader(test, 100)
    example = val.tensors[0][:8]

    net = attach(backbone(), at=["5"], example=example)  # a branch that returns masks, like the backbone
    fit(net, DataLoader(train, 32, shuffle=True), val_loader, epochs=epochs, progress=progress)
    cost = measure(net, example)
    # The record keeps two numbers per image and exit: the share of wrong pixels, and the mean entropy over pixels.
    choice = choose(record(net, val_loader, loss=pixel_error, progress=progress), cost, max_drop=0.01, confidence=None)
    print("threshold:", choice.policy.thresholds)
    print("test:", evaluate(record(net, test_loader, loss=pixel_error, progress=progress), choice.policy, cost))

    with tempfile.TemporaryDirectory() as folder:
        path = export(net, Path(folder) / "model.onnx", policy=choice, example=example)
        images, masks = test.tensors
        answer = load(path, threads=1)(images.numpy())
    print("left at exit 1:", (answer.exit == 1).mean(), "pixels right:", (answer.label == masks.numpy()).mean())


if __name__ == "__main__":
    main()
