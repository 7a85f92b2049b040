"""Measure the speed of B-LeNet and of the plain LeNet on MNIST, at batch 1 and 64.

Weights are the shipped ones; the threshold is that of mnist_training.py, chosen on validation images. The measurement
is repeated TRIALS times, each with another random order of the test images; all trials are stored.

    python benchmarks/experiments/mnist_speed.py

Writes benchmarks/results/mnist_speed.json.
"""

import statistics
import tempfile
from pathlib import Path

import torch
from mnist_training import threshold_at_share

from branchynet import Policy, Target, bench, evaluate, export, record, zoo
from branchynet.data import load_data, loader
from branchynet.environment import environment
from branchynet.files import write_json

TRIALS = 9
BATCHES = (1, 64)
RESULTS = Path(__file__).parents[1] / "results" / "mnist_speed.json"


def main():
    torch.set_num_threads(1)
    data = load_data("mnist")
    net, plain = zoo.b_lenet(branches="published", pretrained=True), zoo.lenet(pretrained=True)
    images = data.test.images.float() / 255
    policy = Policy(thresholds=(threshold_at_share(record(net, loader(data.val, 1000))),))
    lenet = evaluate(record(plain, loader(data.test, 1000)), Policy())
    trials = []
    with tempfile.TemporaryDirectory() as folder:
        path = export(net, Path(folder) / "model.onnx", policy=policy, example=images[:8])
        for seed in range(TRIALS):
            trials += bench(
                path,
                net,
                (images, data.test.labels),
                [Target(batch) for batch in BATCHES],
                about={"network": "b_lenet", "plain_accuracy": lenet.accuracy},
                seed=seed,
            )
    times = ("plain_us", "branchy_us", "limit_us", "limit_in_order_us", "speedup", "overhead")
    rows = []
    for batch in BATCHES:
        same = [row for row in trials if row["batch"] == batch]
        rows.append({**same[0], **{k: statistics.median(row[k] for row in same) for k in times if same[0][k]}})
    result = {
        "command": "python benchmarks/experiments/mnist_speed.py",
        "environment": environment(),
        "rows": rows,
        "trials": trials,
    }
    write_json(RESULTS, result)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
