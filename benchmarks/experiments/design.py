"""Compare designed exits with published and evenly spread ones, and predicted times with measured ones.

For each network, three designs are trained the same way from the same weights (the shipped ones, if any), with the
recipe in src/branchynet/reproduce/recipes.py: the paper's branches (published), ``attach(at="auto")`` (even), and the
exits from `advise` for batches of 1 and of 64 (designed). Thresholds are chosen on validation at the validation
accuracy of the plain network, which was trained for as long. Accuracy and time are from test images, with everything
timed, on one thread. Each design answers in two ways: with the exit taken, and averaged over the exits passed (exit
weights are fitted on the validation samples that choose thresholds). Predictions are stored before the design is timed.

    python benchmarks/experiments/design.py b_lenet          # trains what is missing, then measures; minutes
    python benchmarks/experiments/design.py b_alexnet        # hours; resumes if it was stopped
    python benchmarks/experiments/design.py b_resnet110      # a day
    python benchmarks/experiments/design.py b_alexnet --train  # trains only; measure on an idle machine
    python benchmarks/experiments/design.py b_lenet --train --ship  # also writes the weights that the package ships
    python benchmarks/experiments/design.py text  # a transformer on source code, see text.py; no published branches
    python benchmarks/experiments/design.py b_resnet110 --only even --batch 64   # these rows only

Writes rows into benchmarks/results/design.json.
"""

import argparse
import copy
import itertools
import json
import tempfile
from pathlib import Path

import torch
from text import Text
from torch import nn

from branchynet import (
    FitOptions,
    SearchOptions,
    Target,
    attach,
    averaged,
    bench,
    evaluate,
    export,
    load,
    measure,
    record,
)
from branchynet.data import load_data, loader
from branchynet.design import Advice, advise
from branchynet.environment import environment
from branchynet.files import read_json, write_json
from branchynet.nn.attaching import attach_branches
from branchynet.nn.weights import load_weights, save_weights
from branchynet.policy.averaging import averaged_record, fit_averaging
from branchynet.policy.choosing import nearest_to
from branchynet.policy.evaluation import first_correct
from branchynet.policy.values import Policy
from branchynet.profiling.clock import interleaved
from branchynet.reproduce.recipes import RECIPES, Training

ROOT = Path(__file__).parents[1]
RUNS = ROOT.parent / "runs"
RESULTS = ROOT / "results" / "design.json"
SHIPPED = ROOT.parent / "src" / "branchynet" / "zoo" / "weights"
BATCHES = (1, 64)
TARGETS = {1: "latency", 64: "batch"}  # names of designs in the zoo
SCORE = "max_probability"  # of all designs; see docs/scores.md
SAMPLES, REPEATS = 1024, {"b_resnet110": 3}  # of the others nine; a pass over ResNet-110's graphs takes 20 s
EXITS = 3  # of the evenly spread
# As a recipe's, which has none above for ResNet-110 and one standard error of LeNet's 10,000 images.
SLACK = {"b_resnet110": (0.003, -0.005), "b_lenet": (-0.001, -0.002)}
DESIGNS = ("published", "designed", "even")
PASSES = {"b_resnet110": 3, "text": 2}  # epochs of candidate branches, if six take too long
FINAL = {"b_resnet110": 4}  # more epochs of the best branches


class Images:
    """A network of the paper, with its recipe, as a task."""

    channels_last = True

    def __init__(self, recipe, folder, precision):
        self.name, self.precision = recipe.name, precision
        self.slack = (0.0, *SLACK.get(recipe.name, recipe.slack))
        start = SHIPPED / f"{recipe.baseline}.safetensors"
        given = start if start.exists() else None
        self.training = Training(recipe, load_data(recipe.data), folder, 0, precision, start=given)
        self.folder, self.seed = folder, 0
        self.baseline, self.continued = self.training.baseline, self.training.continued
        self.with_exits, self.published = self.training.with_exits, self.training.joint

    def loader(self, part):
        recipe, split = self.training.recipe, getattr(self.training.data, part)
        if part == "train":
            return loader(split, recipe.batch, shuffle=True, augment=recipe.augment)
        return loader(split, 500)

    def test(self):
        return self.training.data.test.images.float() / 255, self.training.data.test.labels

    def example(self):
        return self.training.data.val.images[:8].float() / 255


def task_of(name, precision):
    """A task: loaders, and networks that are trained on first use."""
    if name == "text":
        return Text(RUNS / "text" / "seed-0", precision)
    folder = RUNS / ("mnist" if name == "b_lenet" else "cifar") / name.removeprefix("b_") / "seed-0"
    return Images(RECIPES[name], folder, precision)


def advised(task, batch):
    """The advice for a batch size, read from disk if present, and a function that adds the design to a network."""
    folder, example = task.folder / f"designed-{batch}", task.example()
    if (folder / "advice.json").exists():
        advice = Advice.load(folder / "advice.json")
    else:
        advice = advise(
            task.baseline(), task.loader("train"), task.loader("val"), example, Target(batch),
            run=task.folder / "candidates",
            search=SearchOptions(PASSES.get(task.name, 6), FINAL.get(task.name, 0), score=SCORE),
            options=FitOptions(task.seed, task.precision, channels_last=task.channels_last),
        )  # fmt: skip
        save_weights(advice.network, folder / "warm.safetensors")
        advice.save(folder / "advice.json")
    print(advice, flush=True)

    def add(baseline):
        net = attach_branches(baseline, advice.design.taps, advice.design.branches, example)
        load_weights(net, folder / "warm.safetensors")
        return net

    return advice, add


def designs(task, wanted, sizes):
    """Yield `(design, batch sizes, network, advice or None)`, all trained for equally long."""

    def even(baseline):
        return attach(baseline, "auto", num_exits=EXITS, example=task.example())

    published = task.published() if "published" in wanted else None
    if published is not None:
        yield "published", sizes, published, None
    found = {}
    for batch in BATCHES if "designed" in wanted else ():
        advice, add = advised(task, batch)
        design = advice.design.taps, advice.design.branches
        if not advice.design.taps:
            continue
        if design not in found:  # otherwise one network serves both
            found[design] = task.with_exits(add, f"designed-{batch}")
        if batch in sizes:
            yield "designed", (batch,), found[design], advice
    if "even" in wanted:
        yield "even", sizes, task.with_exits(even, "even"), None


class Least(nn.Module):
    """Return ten numbers of the input: the time of a call that computes nothing."""

    def forward(self, x):
        """Logits `(B, 10)`."""
        return x.flatten(1)[:, :10].float()


def floor(inputs, batch):
    """Microseconds per sample of a call that computes nothing."""
    with tempfile.TemporaryDirectory() as folder:
        free = "none" if batch == 1 else "batch"
        path = export(Least().eval(), Path(folder) / "least.onnx", policy=None, example=inputs[:8], free=free)
        engine, rows = load(path, threads=1), inputs[:batch].numpy()
        return interleaved([lambda: engine.outputs(rows)], 1.0)[0] / batch


def rows_of(task, only, sizes):
    """Yield each row twice: with its prediction, then with its measurement.

    ``oracle_us`` is the predicted time if every test sample left at its first exit that is right.
    """
    plain = task.continued().eval()
    wanted, baseline = (
        evaluate(record(plain, task.loader(part), progress=False), Policy()).accuracy for part in ("val", "test")
    )
    inputs, labels = task.test()
    floors = {batch: floor(inputs, batch) for batch in sizes}
    for name, batches, net, advice in designs(task, only, sizes):
        on_val, on_test = (record(net.eval(), task.loader(part), progress=False) for part in ("val", "test"))
        weights = fit_averaging(on_val, of="logits")
        answers = {
            "of the exit": (net, on_val),
            "averaged": (averaged(net, weights, of="logits"), averaged_record(on_val, weights, of="logits")),
        }
        for (answer, (net_here, found)), batch in itertools.product(answers.items(), batches):
            cost = measure(net_here, task.example(), Target(batch), score=SCORE, seconds=10.0)
            for slack in task.slack:
                choice, reached = nearest_to(found, cost, wanted - slack, SCORE)
                row = {
                    "network": task.name,
                    "batch": batch,
                    "design": name,
                    "answers": answer,
                    "taps": list(net.taps),
                    "below_points": 100 * slack,
                    "reached": reached,
                    "predicted_us": choice.outcome.mean_us,
                    "predicted_speedup": cost.plain_us / choice.outcome.mean_us,
                    "advised_speedup": advice.speedup if advice else None,
                    "floor_us": floors[batch],
                    "processor": environment()["processor"],
                }
                yield row
                with tempfile.TemporaryDirectory() as folder:
                    path = export(
                        net_here, Path(folder) / "model.onnx", policy=choice.policy, example=inputs[:8],
                        free="none" if batch == 1 else "batch",
                    )  # fmt: skip
                    (timed,) = bench(
                        path, net_here, (inputs, labels), Target(batch),
                        about={"network": task.name, "plain_accuracy": baseline},
                        samples=SAMPLES, repeats=REPEATS.get(task.name, 9),
                    )  # fmt: skip
                row["measured_us"] = timed["branchy_us"]
                row["accuracy"] = timed["accuracy_branchy"]
                row |= {key: timed[key] for key in ("plain_us", "speedup", "overhead", "exit_share")}
                row["plain_accuracy"] = baseline
                row["exit_accuracy"] = [float(a) for a in 1 - on_test.losses.mean(axis=0)]
                row["oracle_us"] = float(cost.latency_us([True] * cost.num_exits)[first_correct(on_test.losses)].mean())
                yield row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("network", choices=[*RECIPES, "text"])
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16", help="no where bfloat16 is slow")
    parser.add_argument("--train", action="store_true", help="train everything, measure nothing")
    parser.add_argument("--ship", action="store_true", help="with --train: write the weights that the package ships")
    parser.add_argument("--only", nargs="+", choices=DESIGNS, default=DESIGNS, help="these designs alone")
    parser.add_argument("--batch", nargs="+", type=int, choices=BATCHES, default=BATCHES, help="these sizes alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = task_of(options.network, options.precision)
    if options.train:
        train(task, options.ship, options.only, options.batch)
    else:
        judge(task, options.only, options.batch)


def train(task, ship, only, sizes):
    """Train everything; with `ship`, write the weights of designed networks into the package, in half precision."""
    task.continued()
    shipped = []
    for name, batches, net, _ in designs(task, only, sizes):
        print(name, *net.taps, flush=True)
        if ship and name == "designed" and net not in shipped:
            shipped.append(net)
            data = RECIPES[task.name].data
            save_weights(copy.deepcopy(net).half(), SHIPPED / f"{task.name}-{TARGETS[batches[0]]}-{data}.safetensors")


def judge(task, only, sizes):
    """Measure designs and replace their rows."""
    found = []
    for row in rows_of(task, only, sizes):
        if row not in found:
            found.append(row)
        # Read each time, because another process may measure another network.
        kept = read_json(RESULTS)["rows"] if RESULTS.exists() else []
        here = environment()["processor"]
        kept = [
            r for r in kept
            if r["network"] != task.name or r["design"] not in only or r["batch"] not in sizes or r["processor"] != here
        ]  # fmt: skip
        command = "python benchmarks/experiments/design.py NETWORK"
        write_json(RESULTS, {"command": command, "environment": environment(), "rows": [*kept, *found]})
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
