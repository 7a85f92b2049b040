"""Compare B-LeNet on MNIST with smaller plain LeNets, trained with the same recipe for the same total epochs.

A network is named by the channels of its three convolutions (LeNet has 5, 10, 20). Accuracy is from test images. All
networks are timed in the same engine, in turns. LeNet and B-LeNet have the shipped weights, B-LeNet the threshold of
mnist_speed.py.

    python benchmarks/experiments/mnist_smaller.py  # about 5 minutes per network on one core; resumes
    python benchmarks/experiments/mnist_smaller.py --ship     # also writes the weights that the package ships

Writes benchmarks/results/mnist_smaller.json.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from mnist_training import RECIPE, SHIPPED, train

from branchynet import Policy, evaluate, export, load, record, zoo
from branchynet.data import load_data, loader
from branchynet.environment import environment
from branchynet.files import write_json
from branchynet.nn.weights import save_weights
from branchynet.profiling.clock import in_turns

BATCHES = (1, 64)
PASSES = 15
SAMPLES = 2048
ROOT = Path(__file__).parents[1]
RUNS = ROOT.parent / "runs" / "mnist_smaller"
RESULTS = ROOT / "results" / "mnist_smaller.json"
SPEED = ROOT / "results" / "mnist_speed.json"


def smaller(data):
    """The narrower LeNets, trained, by name."""
    nets = {}
    for name, make, weights in RECIPE.smaller:
        torch.manual_seed(0)
        nets[name] = make()
        train(nets[name], data, 0, 0, RUNS / weights / "warm")
        train(nets[name], data, 1, 100, RUNS / weights / "joint")
        if "--ship" in sys.argv[1:]:
            save_weights(nets[name], SHIPPED / f"{weights}.safetensors")
    return nets


def main():
    torch.set_num_threads(1)
    data = load_data("mnist")
    images = data.test.images.float() / 255
    order = np.random.default_rng(0).permutation(len(images))
    policy = Policy(thresholds=tuple(json.loads(SPEED.read_text())["rows"][0]["thresholds"]))
    b_lenet = zoo.b_lenet(branches="published", pretrained=True)
    accuracy = {"B-LeNet": evaluate(record(b_lenet, loader(data.test, 1000)), policy).accuracy}
    with tempfile.TemporaryDirectory() as folder:
        path = export(b_lenet, Path(folder) / "b_lenet.onnx", policy=policy, example=images[:8])
        engines = {"B-LeNet": load(path, threads=1)}
        for name, net in {"LeNet": zoo.lenet(pretrained=True), **smaller(data)}.items():
            accuracy[name] = evaluate(record(net, loader(data.test, 1000)), Policy()).accuracy
            path = export(net, Path(folder) / f"{name}.onnx", policy=None, example=images[:8])
            engines[name] = load(path, threads=1)
        shuffled = images.numpy()[order][:SAMPLES]
        times = {b: in_turns(engines, [(shuffled[i : i + b],) for i in range(0, SAMPLES, b)], PASSES) for b in BATCHES}
    rows = [
        {"network": name, "accuracy": accuracy[name], **{f"us_batch_{b}": times[b][name] for b in BATCHES}}
        for name in engines
    ]
    write_json(
        RESULTS,
        {
            "command": "python benchmarks/experiments/mnist_smaller.py",
            "environment": environment(),
            "recipe": {"epochs": sum(RECIPE.epochs), "batch": RECIPE.batch, "seed": 0},
            "rows": rows,
        },
    )
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
