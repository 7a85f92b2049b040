"""Compare the time of an epoch of joint training with its work: B-LeNet and LeNet, batch 256, one thread.

Epochs of the two networks take turns on the same images. The ratio of their medians is compared with
1 + branch MACs / trunk MACs. (The released code of the paper runs the trunk once per exit.)

    python benchmarks/experiments/training_cost.py

Writes benchmarks/results/training_cost.json.
"""

import statistics
from pathlib import Path

import torch

from branchynet import fit, zoo
from branchynet.data import load_data, loader
from branchynet.environment import environment
from branchynet.files import write_json
from branchynet.graph.macs import exit_macs
from branchynet.graph.onnx_flat import flatten
from branchynet.training.options import FitOptions

ROUNDS = 7
BATCH = 256
IMAGES = 10_000
RESULTS = Path(__file__).parents[1] / "results" / "training_cost.json"


def main():
    torch.set_num_threads(1)
    val = load_data("mnist").val  # 10,000 images make a short epoch
    trunk, branch = exit_macs(flatten(zoo.b_lenet(branches="published"), torch.rand(2, 1, 28, 28)))
    seconds = {"lenet": [], "b_lenet": []}
    for _ in range(ROUNDS):
        for name, net in (("lenet", zoo.lenet()), ("b_lenet", zoo.b_lenet(branches="published"))):
            history = fit(
                net, loader(val, BATCH, shuffle=True), epochs=1, progress=False, options=FitOptions(channels_last=True)
            )
            seconds[name].append(history.rows[0].seconds)
    ratio = statistics.median(seconds["b_lenet"]) / statistics.median(seconds["lenet"])
    work = 1 + sum(branch) / sum(trunk)
    result = {
        "command": "python benchmarks/experiments/training_cost.py",
        "environment": environment(),
        "images": IMAGES,
        "seconds": seconds,
        "ratio": ratio,
        "work_ratio": work,
        "ratio_over_work": ratio / work,
        "allowed": 1.3,
    }
    write_json(RESULTS, result)
    print({k: v for k, v in result.items() if k != "seconds"})


if __name__ == "__main__":
    main()
