"""Learning-rate schedules and the default optimizer."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


@dataclass(frozen=True)
class Cosine:
    """A schedule: linear warmup over a `warmup` share of the steps, then a half cosine to 0 (arXiv:1608.03983)."""

    warmup: float = 0.05

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """Return the scheduler, which `fit` steps after every batch."""
        rise = max(1, round(self.warmup * total_steps))

        def factor(step: int) -> float:
            if step < rise:
                return (step + 1) / rise
            return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total_steps - rise)))

        return LambdaLR(optimizer, factor)


@dataclass(frozen=True)
class Constant:
    """A schedule: the constant learning rate of the optimizer, as in the paper."""

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """Return the scheduler, which `fit` steps after every batch."""
        return LambdaLR(optimizer, lambda step: 1.0)


def adam(params: Any) -> Optimizer:
    """Return Adam with a learning rate of 0.001, the default optimizer."""
    return torch.optim.Adam(params, lr=1e-3)
