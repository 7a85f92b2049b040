"""AlexNet and ResNet on CIFAR-10, with and without the paper's branches: one recipe a network.

A plain baseline is trained from nothing. From its weights go on, for the same number of epochs and with the same
augmentation, once the network with its branches (joint) and once the plain network alone (continued): the comparison
that is fair to the baseline. The narrower AlexNets, which a user might pick instead of early exits, get the same total
epochs in the same two parts; those beside ResNet-110 are ResNet-20, 32 and 56, each with its own call.

    python benchmarks/cifar_training.py alexnet --phase baseline
    python benchmarks/cifar_training.py alexnet                     # all phases; resumes where it was stopped
    python benchmarks/cifar_training.py resnet110 --precision no    # on a processor without bfloat16

Every phase first makes sure of those before it, and then writes its accuracies and seconds into
benchmarks/results/cifar_training-NETWORK.json. On one core of an AMD EPYC (AVX-512 with bfloat16) an epoch of AlexNet
takes about 50 seconds, of B-AlexNet 60, of ResNet-20 90.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from branchynet import BranchyNet, fit, record, zoo
from branchynet.data import ImageData, flip_crop, load_data, loader
from branchynet.files import read_json, write_json
from branchynet.machine import environment
from branchynet.training.history import History
from branchynet.training.train import Cosine
from branchynet.zoo.alexnet import AlexNet

BATCH = 128
AUGMENT = flip_crop(4)
SCHEDULE = Cosine(warmup=0.15)
# Channels of the five convolutions and widths of the two linear layers, in 1/4, 3/8, 1/2 and 3/4 of AlexNet's.
NARROW = {
    "quarter": ((8, 16, 24, 24, 16), (64, 32)),
    "three-eighths": ((12, 24, 36, 36, 24), (96, 48)),
    "half": ((16, 32, 48, 48, 32), (128, 64)),
    "three-quarters": ((24, 48, 72, 72, 48), (192, 96)),
}
PHASES = ("baseline", "joint", "continued", "narrow")
ROOT = Path(__file__).parent
RUNS = ROOT.parent / "runs" / "cifar"
RESULTS = ROOT / "results"


def sgd(rate):
    """SGD with Nesterov momentum and weight decay; `rate` is the schedule's peak."""
    return partial(torch.optim.SGD, lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)


def adam(rate):
    """Adam, as in the paper; `rate` is the schedule's peak."""
    return partial(torch.optim.Adam, lr=rate)


@dataclass(frozen=True)
class Recipe:
    """What differs from network to network.

    Attributes:
        plain: makes the network without branches.
        branchy: makes the one with them.
        optimizer: makes what `fit` takes as its optimizer from a learning rate.
        epochs: from nothing, and from the baseline's weights on.
        rates: the peak learning rates of these two parts.
        narrow: makes narrower networks of the same kind, by name.
    """

    plain: Callable[[], nn.Module]
    branchy: Callable[[], BranchyNet]
    optimizer: Callable[[float], Callable[[Any], torch.optim.Optimizer]]
    epochs: tuple[int, int]
    rates: tuple[float, float]
    narrow: tuple[tuple[str, Callable[[], nn.Module]], ...] = ()


ALEXNET = Recipe(
    zoo.alexnet,
    partial(zoo.b_alexnet, branches="text"),
    optimizer=adam,
    epochs=(60, 60),
    rates=(1e-3, 1e-3),
    narrow=tuple((name, partial(AlexNet, 10, *widths)) for name, widths in NARROW.items()),
)
RECIPES = {"alexnet": ALEXNET} | {
    f"resnet{n}": Recipe(partial(zoo.resnet, n), partial(zoo.b_resnet, n), sgd, epochs=(30, 15), rates=(0.1, 0.02))
    for n in (20, 32, 56, 110)
}


@dataclass(frozen=True)
class Task:
    """One call of this file: what the phases share."""

    recipe: Recipe
    data: ImageData
    folder: Path
    seed: int
    precision: str

    def fit(self, net, epochs, rate, seed, run):
        """Train `net` in place, or read what `run` holds of it."""
        fit(
            net,
            loader(self.data.train, BATCH, shuffle=True, augment=AUGMENT),
            loader(self.data.val, 500),
            epochs=epochs,
            optimizer=self.recipe.optimizer(rate),
            schedule=SCHEDULE,
            seed=seed,
            mixed_precision=self.precision,
            channels_last=True,
            run=self.folder / run,
        )
        return net

    def begin(self, make, run):
        """A network after the first part of its training."""
        torch.manual_seed(self.seed)
        return self.fit(make(), self.recipe.epochs[0], self.recipe.rates[0], self.seed, run)

    def go_on(self, net, run):
        """The network after the second part."""
        return self.fit(net, self.recipe.epochs[1], self.recipe.rates[1], 100 + self.seed, run)


def trained(task, phase):
    """Yield `(name, network, its run folders)` for each network of a phase; what was trained before is read."""
    if phase == "narrow":
        for name, make in task.recipe.narrow:
            runs = (f"narrow-{name}/baseline", f"narrow-{name}/continued")
            yield f"narrow-{name}", task.go_on(task.begin(make, runs[0]), runs[1]), runs
        return
    net = task.begin(task.recipe.plain, "baseline")
    if phase == "baseline":
        yield phase, net, ("baseline",)
    elif phase == "continued":
        yield phase, task.go_on(net, "continued"), ("baseline", "continued")
    elif phase == "joint":
        torch.manual_seed(task.seed)
        branchy = task.recipe.branchy()
        branchy.backbone.load_state_dict(net.state_dict())
        yield phase, task.go_on(branchy, "joint"), ("baseline", "joint")


def row(task, net, runs):
    """Every exit's accuracy over all validation and all test images, and what the training took."""
    history = [History.load(task.folder / run / "train.csv") for run in runs]
    accuracy = {}
    for part, split in (("val", task.data.val), ("test", task.data.test)):
        losses = record(net, loader(split, 500), progress=False).losses
        accuracy[f"{part}_accuracy"] = [float(a) for a in 1 - losses.mean(axis=0)]
    epochs, seconds = sum(len(h.rows) for h in history), sum(h.seconds for h in history)
    return {**accuracy, "epochs": epochs, "seconds": seconds, "seed": task.seed, "precision": task.precision}


def approximate_images():
    """How many images of this copy of the data set are stand-ins for the published ones, as a list beside it says."""
    listed = Path(os.environ.get("BRANCHYNET_DATA", ".")) / "cifar-10-batches-bin" / "approx_indices.json"
    return {part: len(indices) for part, indices in read_json(listed).items()} if listed.exists() else {}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("network", choices=RECIPES)
    parser.add_argument("--phase", choices=PHASES, help="by default all of them, in this order")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16", help="no where bfloat16 is slow")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe, folder = RECIPES[options.network], RUNS / options.network / f"seed-{options.seed}"
    task = Task(recipe, load_data("cifar10"), folder, options.seed, options.precision)
    results = RESULTS / f"cifar_training-{options.network}.json"
    for phase in [options.phase] if options.phase else PHASES:
        for name, net, runs in trained(task, phase):
            rows = (read_json(results)["rows"] if results.exists() else {}) | {name: row(task, net, runs)}
            result = {
                "command": f"python benchmarks/cifar_training.py {options.network}",
                "environment": environment(),
                "recipe": {
                    "batch": BATCH,
                    "epochs": recipe.epochs,
                    "rates": recipe.rates,
                    "optimizer": recipe.optimizer.__doc__,
                },
                "approximate_images": approximate_images(),
                "rows": rows,
            }
            write_json(results, result)
            print(name, json.dumps(rows[name]), flush=True)


if __name__ == "__main__":
    main()
