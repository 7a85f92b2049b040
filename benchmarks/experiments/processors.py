"""Measure how speed-ups depend on the processor: designed exits with all instructions, and with AVX2 only.

Weights are the shipped ones. Thresholds are chosen once, on 2,000 validation images, at the accuracy of the plain
network there. The same files are timed in separate processes, in turns: with all instructions of the machine, and with
AVX-512, VNNI and AMX hidden (tests/processors/hide_avx512.c). Frequency and caches are those of this machine in both
cases: the second runs the kernels of a processor with AVX2 only, but is not such a processor.

    python benchmarks/experiments/processors.py        # about ten minutes; writes benchmarks/results/processors.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from branchynet import Policy, Target, bench, evaluate, export, measure, record, zoo
from branchynet.data import load_data, loader
from branchynet.data.datasets import Split
from branchynet.environment import environment
from branchynet.files import read_json, write_json
from branchynet.policy.choosing import nearest_to

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "processors.json"
HIDE = ROOT.parent / "tests" / "processors" / "hide_avx512.c"
NETWORKS = {
    "B-LeNet": ("mnist", zoo.lenet, zoo.b_lenet),
    "B-AlexNet": ("cifar10", zoo.alexnet, zoo.b_alexnet),
}
TARGETS = {1: "latency", 64: "batch"}
SAMPLES, ROUNDS, CHOSEN_ON = 1000, 3, 2000
KINDS = ("all instructions", "AVX2 alone")


def hiding(folder):
    """The library that hides instructions from a process that preloads it, built in a folder."""
    path = folder / "hide_avx512.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", path, HIDE], check=True)
    return path


def network(name, batch):
    return NETWORKS[name][2](pretrained=True, target=TARGETS[batch]).eval()


def prepare(folder):
    """Choose and export."""
    for name, (data_name, plain, _) in NETWORKS.items():
        data = load_data(data_name)
        val_part, test_part = (Split(p.images[:CHOSEN_ON], p.labels[:CHOSEN_ON]) for p in (data.val, data.test))
        plain_val, plain_test = (
            evaluate(record(plain(pretrained=True), loader(part, 500), progress=False), Policy()).accuracy
            for part in (val_part, test_part)
        )
        for batch in TARGETS:
            net, example = network(name, batch), data.test.images[:64].float() / 255
            val, test = (record(net, loader(part, 500), progress=False) for part in (val_part, test_part))
            cost = measure(net, example[:batch] if batch > 1 else example, Target(batch))
            choice, _ = nearest_to(val, cost, plain_val)
            free = "none" if batch == 1 else "batch"
            export(net, folder / f"{name}-{batch}.onnx", policy=choice.policy, example=example[:8], free=free)
            accuracy = evaluate(test, choice.policy).accuracy
            about = {"network": name, "batch": batch, "accuracy": accuracy, "plain_accuracy": plain_test}
            write_json(folder / f"{name}-{batch}.json", about)


def timed(path):
    """One row of `bench` for a file, in this process."""
    about = read_json(path.with_suffix(".json"))
    name, batch = about["network"], about["batch"]
    data = load_data(NETWORKS[name][0]).test
    rows = bench(
        path, network(name, batch), (data.images[:SAMPLES].float() / 255, data.labels[:SAMPLES]), Target(batch),
        about={key: about[key] for key in ("network", "plain_accuracy")}, samples=SAMPLES, repeats=3,
    )  # fmt: skip
    return {k: rows[0][k] for k in ("plain_us", "branchy_us", "speedup")}


def in_a_process(path, kind, hide):
    changed = {} if kind == KINDS[0] else {"LD_PRELOAD": str(hide)}
    command = [sys.executable, __file__, "--time", str(path)]
    done = subprocess.run(command, env=os.environ | changed, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind}: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time", type=Path, help="time this file in this process and print a row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.time:
        print(json.dumps(timed(options.time)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hide = hiding(folder)
        prepare(folder)
        for path in sorted(folder.glob("*.onnx")):
            found = {kind: [] for kind in KINDS}
            for _ in range(ROUNDS):
                for kind in KINDS:
                    found[kind].append(in_a_process(path, kind, hide))
            about = read_json(path.with_suffix(".json"))
            for kind, trials in found.items():
                medians = {key: statistics.median(t[key] for t in trials) for key in trials[0]}
                rows.append({**about, "kind": kind, **medians, "trials": [t["speedup"] for t in trials]})
                print(json.dumps(rows[-1]), flush=True)
    about = {
        "command": "python benchmarks/experiments/processors.py",
        "environment": environment(),
        "chosen_on": CHOSEN_ON,
    }
    write_json(RESULTS, {**about, "rows": rows})


if __name__ == "__main__":
    main()
