"""Compare accuracy and time of int8 and float networks with early exits, in ONNX Runtime and OpenVINO.

    python benchmarks/experiments/int8.py                    # every network, about 20 minutes
    python benchmarks/experiments/int8.py B-LeNet            # one network; the rows of the others stay
    python benchmarks/experiments/int8.py --accuracy         # no times; stored times stay

Accuracy is that of every exit on test images, for float, `int8` (7 bits per weight) and `int8-full-range` (all 8). It
is measured on this processor, and again as on an AMD EPYC of Zen 2 (tests/processors/hide_avx512.c), which has AVX2 but
no VNNI, so 16-bit sums may saturate. The outputs there are compared with those on this processor.

Times are those of five files that take turns on the same images, on one thread: the plain network in float and in both
kinds of int8, and the network with exits in float and in int8. Thresholds are chosen on validation images; for int8, on
a record of the flat int8 file. Medians are over REPEATS passes; on a busy machine only ratios are meaningful.

Writes benchmarks/results/int8.json.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from branchynet import choose, export, load, measure, record, zoo
from branchynet.data import load_data, loader
from branchynet.data.datasets import Split
from branchynet.environment import environment
from branchynet.files import read_json, write_json
from branchynet.profiling.clock import in_turns
from processors import hiding

# Constructor and data set; test images, timed images. The whole test sets of CIFAR-10 would take B-AlexNet minutes and
# B-ResNet-110 half an hour.
NETWORKS = {
    "B-LeNet": (zoo.b_lenet, "mnist", 10_000, 1024),
    "B-AlexNet": (zoo.b_alexnet, "cifar10", 2_000, 256),
    "B-ResNet-110": (partial(zoo.b_resnet, 110), "cifar10", 1_000, 64),
}
KINDS, RUNTIMES, BATCHES = ("float", "int8", "int8-full-range"), ("onnxruntime", "openvino"), (1, 64)
CALIBRATION, VALIDATION, MAX_DROP, REPEATS = 256, 1_000, 0.005, 11
EMULATED = "AMD EPYC of Zen 2, emulated"
RESULTS = Path(__file__).parents[1] / "results" / "int8.json"

# The process that runs as on another processor: MODEL RUNTIME IMAGES ANSWERS.
ANSWER = """
import sys
import numpy as np
from branchynet import load
call, images = load(sys.argv[1], threads=1, runtime=sys.argv[2]).outputs, np.load(sys.argv[3])
answers = [call(images[at : at + 50])[1:] for at in range(0, len(images), 50)]
np.savez(sys.argv[4], *(np.concatenate(parts) for parts in zip(*answers)))
"""


def first(split, samples):
    """The first images of a split."""
    return Split(split.images[:samples], split.labels[:samples])


def asked(kind, calibration):
    """The arguments of `export` for float or a kind of int8."""
    return {} if kind == "float" else {"precision": kind, "calibration": calibration}


def answers(path, images, runtime):
    """Outputs of every exit of a flat file on this processor: an array (S, C) per exit."""
    engine = load(path, threads=1, runtime=runtime)
    parts = [engine.outputs(images[at : at + 50])[1:] for at in range(0, len(images), 50)]
    return [np.concatenate(exit) for exit in zip(*parts, strict=True)]


def answers_as_amd(path, images, runtime, hide):
    """Outputs of every exit of a flat file as on an AMD processor."""
    with tempfile.TemporaryDirectory() as name:
        given, taken = Path(name) / "images.npy", Path(name) / "answers.npz"
        np.save(given, images)
        done = subprocess.run(
            [sys.executable, "-c", ANSWER, path, runtime, given, taken],
            env=os.environ | {"OMP_NUM_THREADS": "1", "LD_PRELOAD": str(hide), "HIDE_AS_AMD": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{path.name} failed as on {EMULATED}:\n{done.stderr}")
        with np.load(taken) as found:
            return [found[name] for name in found.files]


def judged(found, here, labels):
    """Accuracy per exit by kind, and the kinds whose outputs equal those of this machine bit by bit."""
    return {
        "images": len(labels),
        "accuracy": {
            kind: [float((exit.argmax(1) == labels).mean()) for exit in exits] for kind, exits in found.items()
        },
        "as_here": [
            kind
            for kind, exits in found.items()
            if all(np.array_equal(a, b) for a, b in zip(exits, here[kind], strict=True))
        ],
    }


def accuracies(network, flats, images, labels, hide):
    """Two rows per runtime: this processor, and an AMD processor without VNNI."""
    rows = []
    for runtime in RUNTIMES:
        here = {kind: answers(path, images, runtime) for kind, path in flats.items()}
        there = {kind: answers_as_amd(path, images, runtime, hide) for kind, path in flats.items()}
        for name, vnni, found in ((environment()["processor"], has_vnni(), here), (EMULATED, False, there)):
            about = {"network": network, "runtime": runtime, "processor": name, "vnni": vnni}
            rows.append({**about, **judged(found, here, labels)})
            print(rows[-1], flush=True)
    return rows


def has_vnni():
    """Whether Linux lists VNNI among the features of this processor."""
    info = Path("/proc/cpuinfo")
    return info.exists() and "_vnni" in info.read_text()


def times(network, net, flats, folder, data, calibration):
    """A row per runtime and batch size: speed-ups over the plain float network."""
    _, _, tested, timed = NETWORKS[network]
    test, example = first(data.test, tested), data.test.images[:8].float() / 255
    images = (data.test.images[:timed].float() / 255).numpy()
    cost, paths = measure(net, example), {}
    for kind in KINDS:
        more = asked(kind, calibration)
        flat = load(flats[kind], threads=1)
        paths[f"{kind}_plain"] = export(
            net.backbone, folder / f"plain-{kind}.onnx", policy=None, example=example, **more
        )
        if kind != "int8-full-range":
            val = record(flat, loader(first(data.val, VALIDATION), 50), progress=False)
            policy = choose(val, cost, max_drop=MAX_DROP, confidence=None).policy
            paths[f"{kind}_exits"] = export(net, folder / f"exits-{kind}.onnx", policy=policy, example=example, **more)
    rows = []
    for runtime in RUNTIMES:
        engines = {name: load(path, threads=1, runtime=runtime) for name, path in paths.items()}
        calls = {name: engine.outputs if "plain" in name else engine for name, engine in engines.items()}
        right = [engines["int8_exits"](x.numpy()).label == y.numpy() for x, y in loader(test, 50)]
        for batch in BATCHES:
            us = in_turns(calls, [(images[at : at + batch],) for at in range(0, len(images), batch)], REPEATS)
            rows.append(
                {
                    "network": network,
                    "runtime": runtime,
                    "batch": batch,
                    "processor": environment()["processor"],
                    "us": us,
                    "speedup": {name: us["float_plain"] / taken for name, taken in us.items()},
                    "accuracy_both": float(np.mean(right)),
                }
            )
            print(rows[-1], flush=True)
    return rows


def keep(network, kind, rows):
    """Replace the stored rows of one kind of a network."""
    stored = read_json(RESULTS) if RESULTS.exists() else {"accuracy": [], "times": []}
    rows = [row for row in stored[kind] if row["network"] != network] + rows
    rows.sort(key=lambda row: list(NETWORKS).index(row["network"]))
    result = {"command": "python benchmarks/experiments/int8.py", "environment": environment()}
    result |= {"max_drop": MAX_DROP, "validation": VALIDATION}
    write_json(RESULTS, {**stored, **result, kind: rows})


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("network", nargs="?", choices=NETWORKS)
    parser.add_argument("--accuracy", action="store_true", help="measure no times")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for network in [options.network] if options.network else NETWORKS:
        make, name, tested, _ = NETWORKS[network]
        data, net = load_data(name), make(pretrained=True)
        calibration = list(loader(first(data.train, CALIBRATION), 64))
        images = data.test.images[:tested].float() / 255
        with tempfile.TemporaryDirectory() as at:
            folder = Path(at)
            flats = {
                kind: export(
                    net, folder / f"flat-{kind}.onnx", policy=None, example=images[:8], **asked(kind, calibration)
                )
                for kind in KINDS
            }
            labels = data.test.labels[:tested].numpy()
            keep(network, "accuracy", accuracies(network, flats, images.numpy(), labels, hiding(folder)))
            if not options.accuracy:
                keep(network, "times", times(network, net, flats, folder, data, calibration))


if __name__ == "__main__":
    main()
