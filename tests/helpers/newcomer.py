"""What a new user has: a small network with exits, images, and what the verbs made of them."""

import copy
import functools

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from branchynet import (
    BranchyNet,
    ExitCost,
    Policy,
    attach,
    fit,
    record,
)
from branchynet.deploy.torch_engine import TorchEngine


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))

    def forward(self, x):
        return self.last(self.first(x))


class FixedBatch(Small):
    def forward(self, x):
        return super().forward(self.first[0].weight[:1, :, :1, :1] + x).view(16, -1)


class WithLoss(nn.Module):
    """A network as in transformers: it reads labels only for the loss."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x, labels=None):
        return self.last(self.first(x).relu())


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.rand(3, 8, 8), 0)] * 4)


@functools.cache
def world():
    """A network with exits, images, labels, their loader, a record, a cost, a policy."""
    torch.manual_seed(0)
    x, y = torch.rand(16, 3, 8, 8), torch.arange(16) % 4
    net = attach(Small(), at=["first"], example=x)
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    found = record(net, loader, progress=False)
    return net, x, y, loader, found, ExitCost((10.0, 10.0), (1.0, 0.0)), Policy(thresholds=(0.5,))


def batches(x, y):
    return DataLoader(TensorDataset(x, y), batch_size=8)


quick = functools.partial(fit, epochs=1, progress=False)
silent = functools.partial(record, progress=False)
net, x, y, loader, found, cost, policy = world()

dense = torch.rand(2, 4, 3, 3)
single = nn.Sequential(nn.Flatten(), nn.Linear(192, 1))


def misfitting(branch):
    return BranchyNet(Small(), {"first": branch})


def retrained():
    other = copy.deepcopy(net)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    return other


@functools.cache
def engine():
    return TorchEngine(net, policy, x)
