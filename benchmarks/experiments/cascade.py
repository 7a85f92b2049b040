"""Compare a cascade of two ready-made networks with one network that has exits: ResNet-20 and ResNet-110 on CIFAR-10.

Each training has its own plain ResNet-110, ResNet-20 and B-ResNet-110: the shipped weights (11 epochs), and those in
benchmarks/weights (109 epochs on a GPU). All files of a training are timed in turns, on one thread. Thresholds are
chosen on validation images at the accuracy of the plain ResNet-110 there, or at the nearest accuracy reached, with the
costs of batch 1; accuracy and time are from test images. All files have a free batch size.

    python benchmarks/experiments/cascade.py      # about 5 minutes on one idle core

Writes benchmarks/results/cascade.json.
"""

import json
import tempfile
from pathlib import Path

import torch

from branchynet import ExitRecord, Policy, cascade, evaluate, export, load, measure, record, zoo
from branchynet.data import load_data
from branchynet.environment import environment
from branchynet.files import write_json
from branchynet.nn.weights import load_weights
from branchynet.policy.choosing import nearest_to
from branchynet.profiling.clock import in_turns

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "cascade.json"
SCORE = "max_probability"
IMAGES = 1000  # of validation, and of test
SAMPLES, REPEATS, SECONDS = {1: 64, 64: 128}, 5, 2.0


def stored(net, name):
    """Return the network with the weights of a file in benchmarks/weights."""
    load_weights(net, ROOT / "weights" / f"{name}-cifar10.safetensors")
    return net.eval()


def trainings():
    """Yield `(epochs, ResNet-20, ResNet-110, networks with exits)`."""
    small, large = (zoo.resnet(n, pretrained=True).eval() for n in (20, 110))
    exits = {
        f"B-ResNet-110, {branches}": zoo.b_resnet(110, branches=branches, pretrained=True).eval()
        for branches in ("published", "designed")
    }
    yield 11, small, large, exits
    small = stored(zoo.resnet(20), "resnet20")
    large = stored(zoo.resnet(110), "resnet110_continued")
    published = stored(zoo.b_resnet(110, branches="published"), "b_resnet110-published")
    yield 109, small, large, {"B-ResNet-110, published": published}


def batches(images, labels):
    """The first images in batches."""
    floats = images[:IMAGES].float() / 255
    return [(floats[i : i + 250], labels[i : i + 250]) for i in range(0, len(floats), 250)]


def rows_of(epochs, small, large, exits, data):
    """Yield one row per network."""
    val, test = (batches(split.images, split.labels) for split in (data.val, data.test))
    images = torch.cat([x for x, _ in test])
    networks = {"ResNet-20": small, "cascade": cascade(small, large), **exits}
    records = {name: tuple(record(net, b, progress=False) for b in (val, test)) for name, net in networks.items()}
    alone = tuple(ExitRecord(found.outputs[:, -1:], found.labels) for found in records["cascade"])
    wanted = evaluate(alone[0], Policy()).accuracy
    with tempfile.TemporaryDirectory() as folder:
        chosen, engines = {"ResNet-110": (None, True), "ResNet-20": (None, True)}, {}
        for name, net in {"ResNet-110": large, **networks}.items():
            if name not in chosen:
                cost = measure(net, images[:8], score=SCORE, seconds=SECONDS)
                choice, reached = nearest_to(records[name][0], cost, wanted, SCORE)
                chosen[name] = choice.policy, reached
            path = export(net, Path(folder) / f"{name}.onnx", policy=chosen[name][0], example=images[:8])
            engines[name] = load(path, threads=1)
        us = {}
        for batch, count in SAMPLES.items():
            parts = [(images[i : i + batch].numpy(),) for i in range(0, count, batch)]
            us[batch] = in_turns(engines, parts, REPEATS)
    for name, (policy, reached) in chosen.items():
        outcome = evaluate(alone[1] if name == "ResNet-110" else records[name][1], policy or Policy())
        yield {
            "epochs": epochs,
            "network": name,
            "accuracy": outcome.accuracy,
            "exit_share": list(outcome.exit_share),
            "reached": reached,
            **{f"us_batch_{batch}": us[batch][name] for batch in SAMPLES},
        }


def main():
    torch.set_num_threads(1)
    data, rows = load_data("cifar10"), []
    about = {"images": IMAGES, "samples": SAMPLES, "score": SCORE}
    command = "python benchmarks/experiments/cascade.py"
    for training in trainings():
        rows += rows_of(*training, data)
        write_json(RESULTS, {"command": command, "environment": environment(), **about, "rows": rows})
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
