"""What does int8 do to a network with early exits? Accuracy and time beside float, in ONNX Runtime and OpenVINO.

A residual network with one branch is trained on 20,000 MNIST images (minutes). Thresholds are chosen on validation
images, once for the float network on its own record, and once more for the int8 network on what the flat int8 file
answers in the runtime that will run it. Then the four files (static and branchy, float and int8) take turns on the same
test images, one thread; medians over REPEATS passes. `stale` is the int8 file with the float network's thresholds.

    python benchmarks/int8.py

Writes benchmarks/results/int8.json.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from branchynet import attach, choose, evaluate, export, fit, load, measure, record
from branchynet.data import load_data, loader
from branchynet.data.sets import Split
from branchynet.files import write_json
from branchynet.machine import environment
from branchynet.timing import in_turns

TRAIN, EPOCHS, CALIBRATION, TIMED, REPEATS = 20_000, 4, 512, 1024, 15
BATCHES, RUNTIMES, MAX_DROP = (1, 64), ("onnxruntime", "openvino"), 0.002
RESULTS = Path(__file__).parent / "results" / "int8.json"


class Residual(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.short = nn.Identity() if stride == 1 else nn.Conv2d(channels, out, 1, stride)

    def forward(self, x):
        """Feature maps to feature maps."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.short(x))


def network():
    """About 20 million multiply-accumulates an image; the branch stands behind the first third."""
    stem = nn.Sequential(nn.Conv2d(1, 32, 5, 2, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    blocks = [Residual(32, 32, 1), Residual(32, 64, 2), *(Residual(64, 64, 1) for _ in range(2))]
    blocks += [Residual(64, 128, 2), *(Residual(128, 128, 1) for _ in range(2))]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    return nn.Sequential(stem, *blocks, head)


def first(split, samples):
    """The first so many images of a split."""
    return Split(split.images[:samples], split.labels[:samples])


def timed(calls, images, batch):
    """Median microseconds an image of each call; they take turns."""
    return in_turns(calls, [(images[at : at + batch],) for at in range(0, len(images), batch)], REPEATS)


def judged(engine, images, labels, **thresholds):
    """Test accuracy of a file, and the share that leaves at each exit."""
    answers = [engine(images[at : at + 500], **thresholds) for at in range(0, len(images), 500)]
    left = np.concatenate([a.exit for a in answers])
    right = np.concatenate([a.label for a in answers]) == labels
    return {"accuracy": float(right.mean()), "exit_share": [float((left == n).mean()) for n in (1, 2)]}


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = load_data("mnist")
    train = loader(first(data.train, TRAIN), 128, shuffle=True, seed=0)
    val, test = loader(data.val, 500), loader(data.test, 500)
    images, labels = data.test.images.numpy().astype(np.float32) / 255, data.test.labels.numpy()
    example = torch.from_numpy(images[:8])
    net = attach(network(), at=["1"], example=example)
    fit(net, train, epochs=EPOCHS, channels_last=True, run="runs/int8")
    int8 = {"quantize": "int8", "calibration": list(loader(first(data.train, CALIBRATION), 64))}
    rows, quality = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flats = {
            kind: export(net, folder / f"flat-{kind}.onnx", policy=None, example=example, **more)
            for kind, more in (("float", {}), ("int8", int8))
        }
        report = load(flats["int8"]).metadata["quantize"]
        for runtime in RUNTIMES:
            branchy, plain, policies = {}, {}, {}
            for kind, more in (("float", {}), ("int8", int8)):
                flat = load(flats[kind], threads=1, runtime=runtime)
                cost = measure(net, example, runtime=runtime, **more)
                policies[kind] = choose(
                    record(flat, val, progress=False), cost, max_drop=MAX_DROP, confidence=None
                ).policy
                last = evaluate(record(flat, test, progress=False), policies[kind])
                path = export(net, folder / "branchy.onnx", policy=policies[kind], example=example, **more)
                branchy[kind] = load(path, threads=1, runtime=runtime)
                size = path.stat().st_size
                path = export(net.backbone, folder / "plain.onnx", policy=None, example=example, **more)
                plain[kind] = load(path, threads=1, runtime=runtime)
                quality.append(
                    {
                        "engine": runtime,
                        "network": kind,
                        **judged(branchy[kind], images, labels),
                        "accuracy_last_exit": last.last_accuracy,
                        "thresholds": list(policies[kind].thresholds),
                        "bytes": size,
                    }
                )
            stale = judged(branchy["int8"], images, labels, thresholds=policies["float"].thresholds)
            quality.append({"engine": runtime, "network": "int8, stale", **stale})
            for batch in BATCHES:
                calls = {f"{kind}_branchy": engine for kind, engine in branchy.items()}
                calls |= {f"{kind}_static": engine.outputs for kind, engine in plain.items()}
                us = timed(calls, images[:TIMED], batch)
                ratios = {
                    "speedup_exits": us["float_static"] / us["float_branchy"],
                    "speedup_int8": us["float_static"] / us["int8_static"],
                    "speedup_both": us["float_static"] / us["int8_branchy"],
                    "speedup_exits_in_int8": us["int8_static"] / us["int8_branchy"],
                }
                rows.append({"engine": runtime, "batch": batch, **{f"{k}_us": v for k, v in us.items()}, **ratios})
                print(rows[-1])
    result = {
        "command": "python benchmarks/int8.py",
        "environment": environment(),
        "quantize": report,
        "quality": quality,
        "rows": rows,
    }
    write_json(RESULTS, result)
    for row in quality:
        print(row)


if __name__ == "__main__":
    main()
