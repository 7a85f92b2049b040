"""Train AlexNet and ResNet-110 on CIFAR-10, with and without the paper's branches, and smaller plain networks.

The recipes are those of `branchynet.reproduce`. First a plain network is trained from nothing (baseline). From its
weights, with the same number of epochs and the same augmentation, the network with branches (joint) and the plain
network (continued) are trained. The branches of B-ResNet-110 learn on the frozen baseline: with a trunk that trains,
untrained branches do harm that so short a training cannot repair. Smaller plain networks get the same epochs in the
same two parts.

    python benchmarks/experiments/cifar_training.py b_alexnet --phase baseline
    python benchmarks/experiments/cifar_training.py b_alexnet  # all phases; resumes if it was stopped
    python benchmarks/experiments/cifar_training.py b_resnet110 --precision no  # on a processor without bfloat16
    python benchmarks/experiments/cifar_training.py b_alexnet --ship  # also writes the weights that the package ships
    python benchmarks/experiments/cifar_training.py b_alexnet --shipped-baseline  # the second part only

Each phase runs the phases before it if needed, and writes accuracies and seconds into
benchmarks/results/cifar_training-NETWORK.json. On one core of a server, an epoch takes about 50 to 75 seconds for
AlexNet, 90 to 120 for ResNet-20, and nine to thirteen minutes for ResNet-110. ResNets therefore train for few epochs,
the first of them on smaller images.
"""

import argparse
import copy
import json
import os
import statistics
from pathlib import Path

import torch

from branchynet import record
from branchynet.data import load_data, loader
from branchynet.environment import environment
from branchynet.files import read_json, write_json
from branchynet.nn.weights import load_weights, save_weights
from branchynet.reproduce.recipes import RECIPES, Training
from branchynet.training.history import History

PHASES = ("baseline", "joint", "continued", "smaller")
ROOT = Path(__file__).parents[1]
RUNS = ROOT.parent / "runs" / "cifar"
RESULTS = ROOT / "results"
SHIPPED = ROOT.parent / "src" / "branchynet" / "zoo" / "weights"


def trained(task, phase):
    """Yield `(name, network, run folders)` for each network of a phase; trained networks are read from disk."""
    first = () if task.start else ("baseline",)
    if phase == "smaller":
        for name, net in task.smaller():
            yield name, net, (f"{name}/baseline", f"{name}/continued")
    elif phase == "baseline":
        yield phase, task.baseline(), first
    else:
        warm = ("joint-warm",) if phase == "joint" and task.recipe.warm else ()
        yield phase, getattr(task, phase)(), (*first, *warm, phase)


def accuracies(net, split):
    """Accuracy per exit, over all images."""
    return [float(a) for a in 1 - record(net, loader(split, 500), progress=False).losses.mean(axis=0)]


def row(task, net, runs):
    """Accuracy per exit over all validation and all test images, and the seconds of the training."""
    parts = [task.folder / run / "train.csv" for run in runs]
    history = [History.load(part) for part in parts if part.exists()]  # a part without epochs has no file
    accuracy = {f"{part}_accuracy": accuracies(net, getattr(task.data, part)) for part in ("val", "test")}
    epochs = sum(len(h.rows) for h in history)
    # Medians, because the machine had other work at times.
    seconds = sum(len(h.rows) * statistics.median(r.seconds for r in h.rows) for h in history)
    start = {"start": task.start.stem} if task.start else {}
    how = {"seed": task.seed, "precision": task.precision, "processor": environment()["processor"]}
    return {**accuracy, **start, "epochs": epochs, "seconds": seconds, **how}


def approximate_images():
    """How many images of this copy approximate the published ones, according to the list that comes with it."""
    listed = Path(os.environ.get("BRANCHYNET_DATA", ".")) / "cifar-10-batches-bin" / "approx_indices.json"
    return {part: len(indices) for part, indices in read_json(listed).items()} if listed.exists() else {}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("network", choices=[name for name in RECIPES if name != "b_lenet"])
    parser.add_argument("--phase", choices=PHASES, help="by default all of them, in this order")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16", help="no where bfloat16 is slow")
    parser.add_argument("--shipped-baseline", action="store_true", help="begin from the baseline that ships")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ship", action="store_true", help="write the weights that the package ships")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = RECIPES[options.network]
    folder = RUNS / options.network.removeprefix("b_") / f"seed-{options.seed}"
    start = SHIPPED / f"{recipe.baseline}.safetensors" if options.shipped_baseline else None
    task = Training(recipe, load_data(recipe.data), folder, options.seed, options.precision, start=start)
    results = RESULTS / f"cifar_training-{options.network}.json"
    weights = {"baseline": recipe.baseline, "joint": recipe.weights[0], "continued": recipe.weights[1]}
    for phase in [options.phase] if options.phase else PHASES[start is not None :]:
        for name, net, runs in trained(task, phase):
            rows = (read_json(results)["rows"] if results.exists() else {}) | {name: row(task, net, runs)}
            result = {
                "command": f"python benchmarks/experiments/cifar_training.py {options.network}",
                "environment": environment(),
                "recipe": {
                    "batch": recipe.batch,
                    "epochs": recipe.epochs,
                    "rates": recipe.lrs,
                    "warm": recipe.warm,
                    "sides": recipe.sides,
                    "distill": recipe.distill,
                    "optimizer": recipe.optimizer.__doc__,
                },
                "approximate_images": approximate_images(),
                "rows": rows,
            }
            if options.ship:
                path = SHIPPED / f"{weights.get(name, name)}.safetensors"
                save_weights(copy.deepcopy(net).half(), path)
                load_weights(net, path)  # accuracy with weights in half precision
                rows[name]["shipped_test_accuracy"] = accuracies(net, task.data.test)
            write_json(results, result)
            print(name, json.dumps(rows[name]), flush=True)


if __name__ == "__main__":
    main()
