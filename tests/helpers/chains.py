"""A chain of three layers with an exit after each; tests can change its parts."""

import torch
from torch import nn

from branchynet.nn.network import BranchyNet
from branchynet.policy.values import Policy


class Chain(nn.Module):
    """Three linear layers. `early` changes the input, `late` and `final` the input and output of the last layer."""

    def __init__(self, width=8, early=None, late=None, final=None):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, 4)
        self.early, self.late, self.final = (f or (lambda x: x) for f in (early, late, final))

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.a(self.early(x)))))
        return self.final(self.c(self.late(x)))


def branchy(width=8, **changes):
    torch.manual_seed(0)
    branches = {tap: nn.Linear(width, 4) for tap in "ab"}
    net = BranchyNet(Chain(width, **changes), branches).eval()
    with torch.no_grad():
        for head in (*net.branches, net.backbone.c):
            head.weight *= 6
    return net


def inputs(rows=8, seed=0):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))


TWO = Policy(thresholds=(0.9, 0.9))


@torch.no_grad()
def alone(net, x):
    """Every exit's output (N, B, C), computed one sample at a time."""
    return torch.stack([torch.stack([o[0] for o in net(row[None])]) for row in x], dim=1).numpy()
