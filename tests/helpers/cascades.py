"""Cascades of small networks."""

import torch
from torch import nn

from branchynet import (
    attach,
    cascade,
)

CLASSES, WIDTH = 4, 6


class Answer(dict):
    """A `ModelOutput` of Hugging Face: a dict whose entries are attributes too."""

    __getattr__ = dict.__getitem__


class Two(nn.Module):
    """A network of two inputs."""

    def __init__(self, width, classes=CLASSES):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, width), nn.Linear(3, width)
        self.classify = nn.Linear(width, classes)

    def forward(self, x, extra):
        return self.classify(torch.tanh(self.first(x) + self.second(extra)))


class Named(Two):
    def forward(self, x, extra):
        return Answer(hidden=x, logits=super().forward(x, extra))


def mlp(width, classes=CLASSES, spread=3.0):
    net = nn.Sequential(nn.Linear(WIDTH, width), nn.Tanh(), nn.Linear(width, classes))
    nn.init.normal_(net[2].weight, std=spread)
    return net.eval()


def spread(net):
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.0)
    return net.eval()


def two_inputs():
    x = torch.randn(64, WIDTH), torch.randn(64, 3)
    return cascade(*(spread(Two(width)) for width in (2, 5, 9))), x


def by_keyword():
    x = {"extra": torch.randn(64, 3), "x": torch.randn(64, WIDTH)}
    networks = [spread(Named(2)), spread(Two(5))]
    return cascade(*networks, output=[lambda found: found["logits"], None]), x


def with_branches():
    """A cascade whose first network has exits of its own, and whose last one does too."""
    first = attach(mlp(5), ["0"], example=torch.randn(2, WIDTH)).eval()
    last = attach(mlp(16), ["0"], example=torch.randn(2, WIDTH)).eval()
    return cascade(first, mlp(3), last), (torch.randn(64, WIDTH),)


CASES = [two_inputs, by_keyword, with_branches]
