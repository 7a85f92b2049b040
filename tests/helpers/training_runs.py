"""A small training task, equal in every process: noisy pictures of four patterns, and a network with two exits."""

import functools
import random
from dataclasses import fields

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from branchynet.nn.network import BranchyNet
from branchynet.training.loop import fit
from branchynet.training.options import FitOptions

CLASSES = 4


class Pictures(TensorDataset):
    """Noisy copies of one pattern per class; `interrupt` runs before the given sample is drawn for the n-th time."""

    def __init__(self, samples=60, interrupt=None, at=-1):
        generator = torch.Generator().manual_seed(1)
        patterns = torch.rand(CLASSES, 2, 8, 8, generator=generator)
        labels = torch.randint(CLASSES, (samples,), generator=generator)
        super().__init__(patterns[labels] + 0.3 * torch.randn(samples, 2, 8, 8, generator=generator), labels)
        self.interrupt, self.at, self.drawn = interrupt, at, 0

    def __getitem__(self, index):
        if self.drawn == self.at:
            self.interrupt()
        self.drawn += 1
        image, label = super().__getitem__(index)
        # The augmentation uses all three generators, so a resume that misses one of them fails.
        return image + 0.1 * torch.rand(()) + 0.1 * float(np.random.rand()) + 0.1 * random.random(), label


def make(seed=0, classes=CLASSES, width=4):
    """Two exits with batch normalization and dropout; independent of the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = nn.Sequential(
            nn.Conv2d(2, width, 3),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(36 * width, CLASSES),
        )
        branch = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(36 * width, classes)
        )
        return BranchyNet(backbone, {"0": branch})


def loader(batch_size=10, **kwargs):
    return DataLoader(Pictures(**kwargs), batch_size=batch_size, shuffle=True)


def state(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def quiet(*loaders, **given):
    """`fit` on the CPU without a progress bar; fields of `FitOptions` may be given as arguments."""
    options = {"device": "cpu"} | {f.name: given.pop(f.name) for f in fields(FitOptions) if f.name in given}
    return fit(*loaders, **{"progress": False, "options": FitOptions(**options)} | given)


brisk = functools.partial(torch.optim.Adam, lr=5e-3)


EPOCHS = 3


def resumed(folder, net, interrupt=-1, **changes):
    return net, quiet(net, loader(interrupt=stop, at=interrupt), **{"epochs": EPOCHS, "run": folder} | changes)


class Stop(Exception):
    pass


def stop():
    raise Stop
