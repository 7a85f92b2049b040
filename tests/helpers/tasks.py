"""Tasks other than classification, each with its score and loss written again in numpy."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from branchynet import BranchyNet, attach
from branchynet.losses import pixel_error

SAMPLES = 48


@dataclasses.dataclass(frozen=True)
class Task:
    """A user's task, and its score and loss for one sample again in numpy float64."""

    net: Callable[[Any], BranchyNet]
    data: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    train: Callable[..., torch.Tensor]
    score: Any
    loss: Callable[..., torch.Tensor]
    slow_score: Callable[[list[np.ndarray]], float]
    slow_loss: Callable[[np.ndarray, np.ndarray], float]


def softmax_entropy(z):
    """Entropy of one vector, in nats."""
    p = np.exp(np.float64(z) - z.max())
    p /= p.sum()
    return -sum(q * math.log(q) for q in p if q > 0)


def mean_entropy(outputs):
    """Over all positions of the latest output (C, ...), one after the other."""
    columns = outputs[-1].reshape(len(outputs[-1]), -1).T
    return sum(softmax_entropy(column) for column in columns) / len(columns)


def share_wrong(output, target):
    pairs = list(zip(output.reshape(len(output), -1).T, target.reshape(-1), strict=True))
    return sum(int(column.argmax() != label) for column, label in pairs) / len(pairs)


# Segmentation (B, C, H, W), with a branch for maps at each tap


def maps(example):
    layers = [nn.Conv2d(2, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU()]
    upsample = nn.Upsample(size=(9, 12), mode="bilinear")
    return attach(nn.Sequential(*layers, nn.Conv2d(6, 3, 1), upsample), ["1", "4"], example=example)


def pictures():
    x = torch.randn(SAMPLES, 2, 9, 12) * torch.rand(SAMPLES, 1, 1, 1) * 2
    return x, x.sum(dim=1).gt(0.3).long() + x[:, 0].gt(1)


# Every word of a sentence has a class (B, C, L); the user brings the branch


def words(example):
    backbone = nn.Sequential(
        nn.Conv1d(4, 8, 3, 1, 1), nn.ReLU(), nn.Conv1d(8, 8, 3, 1, 1), nn.ReLU(), nn.Conv1d(8, 3, 1)
    )
    return BranchyNet(backbone, {"1": nn.Conv1d(8, 3, 1)})


def sentences():
    x = torch.randn(SAMPLES, 4, 7)
    return x, x[:, :3].argmax(dim=1)


# Several labels per sample (B, K)


def several(example):
    return attach(
        nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)),
        ["1"],
        example=example,
    )


def tags():
    x = torch.randn(SAMPLES, 5)
    return x, (x[:, :4] > 0.2).float()


def binary_entropies(outputs):
    z = outputs[-1]
    return F.binary_cross_entropy_with_logits(z, z.sigmoid(), reduction="none").sum(dim=1)


def slow_binary_entropies(outputs):
    return sum(softmax_entropy(np.array([z, 0.0])) for z in np.float64(outputs[-1]))


def hamming(output, target):
    return ((output > 0) != (target > 0.5)).float().mean(dim=1)


# Regression: one number (B, 1) by how far two exits differ, or a number and its expected error (B, 2)


def one_number(example):
    layers = [nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 1)]
    return attach(nn.Sequential(*layers), ["1", "3"], example=example)


def two_numbers(example):
    layers = [nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 2)]
    return attach(nn.Sequential(*layers), ["1"], example=example)


def points():
    x = torch.randn(SAMPLES, 5)
    return x, (x[:, :1] * x[:, 1:2]).sin()


def disagreement(outputs):
    if len(outputs) == 1:
        return torch.full_like(outputs[0][:, 0], math.inf)
    return (outputs[-1] - outputs[-2]).abs().amax(dim=1)


def log_variance(outputs):
    return outputs[-1][:, 1]


def likelihood(output, target):
    return F.gaussian_nll_loss(output[:, :1], target, output[:, 1:].exp())


def squashed(output, target):
    error = (output[:, 0] - target[:, 0]).abs()
    return error / (error + 0.5)


def slow_squashed(output, target):
    error = abs(float(output[0]) - float(target[0]))
    return error / (error + 0.5)


TASKS = {
    "segmentation": Task(maps, pictures, F.cross_entropy, "entropy", pixel_error, mean_entropy, share_wrong),
    "words": Task(words, sentences, F.cross_entropy, "entropy", pixel_error, mean_entropy, share_wrong),
    "labels": Task(
        several,
        tags,
        F.binary_cross_entropy_with_logits,
        binary_entropies,
        hamming,
        slow_binary_entropies,
        lambda output, target: (
            sum(int((z > 0) != (t > 0.5)) for z, t in zip(output, target, strict=True)) / len(target)
        ),
    ),
    "disagreement": Task(
        one_number,
        points,
        F.mse_loss,
        disagreement,
        squashed,
        lambda o: math.inf if len(o) == 1 else abs(float(o[-1][0]) - float(o[-2][0])),
        slow_squashed,
    ),
    "variance": Task(two_numbers, points, likelihood, log_variance, squashed, lambda o: float(o[-1][1]), slow_squashed),
}


def linear(outputs=2):
    return BranchyNet(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, outputs)), {"0": nn.Linear(3, outputs)})
