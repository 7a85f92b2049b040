"""Measure how long `advise` takes, from a trained network to the advice, on all cores of this machine.

    python benchmarks/experiments/advising.py LeNet          # minutes
    python benchmarks/experiments/advising.py ResNet-56      # goal: 20 minutes on two cores

Writes a row into benchmarks/results/advising.json.
"""

import argparse
import os
import time
from functools import partial
from pathlib import Path

import torch

from branchynet import FitOptions, zoo
from branchynet.data import affine, flip_crop, load_data, loader
from branchynet.design import advise
from branchynet.environment import environment
from branchynet.files import read_json, write_json

RESULTS = Path(__file__).parents[1] / "results" / "advising.json"
# Network, data set, augmentation, goal in minutes.
TASKS = {
    "LeNet": (zoo.lenet, "mnist", affine(degrees=10, translate=2 / 28, scale=0.1), 3),
    "ResNet-56": (partial(zoo.resnet, 56), "cifar10", flip_crop(4), 20),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("network", choices=TASKS)
    name = parser.parse_args().network
    make, data, augment, wanted = TASKS[name]
    torch.set_num_threads(os.cpu_count() or 1)
    data = load_data(data)
    train = loader(data.train, 256, shuffle=True, augment=augment)
    start = time.perf_counter()
    advice = advise(make(pretrained=True), train, loader(data.val, 500), data.val.images[:8].float() / 255,
                    options=FitOptions(channels_last=True))  # fmt: skip
    row = {
        "network": name,
        "minutes": (time.perf_counter() - start) / 60,
        "wanted_minutes": wanted,
        "candidates": len(advice.tried),
        "advice": str(advice),
    }
    rows = [r for r in (read_json(RESULTS)["rows"] if RESULTS.exists() else []) if r["network"] != name]
    result = {
        "command": "python benchmarks/experiments/advising.py NETWORK",
        "environment": environment(),
        "rows": [*rows, row],
    }
    write_json(RESULTS, result)
    print(row)


if __name__ == "__main__":
    main()
