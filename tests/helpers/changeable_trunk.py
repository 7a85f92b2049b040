"""A network of three layers whose values a test may change."""

import torch
from torch import nn

from branchynet import BranchyNet


class Trunk(nn.Module):
    """Three linear layers; a test may change the input and output of the first, and the input of the second.

    `seen` computes the input of a branch at "tap".
    """

    def __init__(self, seen=None, then=None, before=None):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.tap = nn.Identity()
        self.seen, self.then, self.before = seen, then, before
        self.register_buffer("count", torch.zeros(()))
        self.plain = torch.arange(8.0)
        self.lstm = nn.LSTM(2, 3)
        self.bare = nn.BatchNorm1d(8, track_running_stats=False)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        h = self.a(x if self.before is None else self.before(self, x))
        value = h if self.seen is None else self.seen(self, h)
        self.tap(value)
        h = torch.relu(h) if self.then is None else self.then(self, h, value)
        return self.c(torch.relu(self.b(h)))


class Read(nn.Module):
    """A branch that sums its input to four numbers per sample, (B, 4)."""

    def __init__(self, read=None):
        super().__init__()
        self.fc = nn.Linear(1, 4)
        self.read = read or (lambda h: h.flatten(1).sum(1, keepdim=True))

    def forward(self, h):
        return self.fc(self.read(h))


def trunk(seen=None, then=None, before=None, read=None):
    torch.manual_seed(0)
    return BranchyNet(Trunk(seen, then, before), {"tap": Read(read)}).eval()


def example(rows=6):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(1))
