"""A server in a process of its own, and a folder that it serves."""

import contextlib
import re
import subprocess
import sys

import torch

from branchynet import ExitCost, Policy, export, record, zoo
from branchynet.data import load_data, loader
from branchynet.serve.presets import write_presets

THRESHOLDS = (0.05, 0.1, 0.2)
COST = ExitCost((8.0, 10.0, 12.0, 60.0), (4.0, 4.0, 4.0, 2.0), plain_us=90.0)
PRESETS = {"careful": Policy("entropy", (0.001, 0.001, 0.001)), "fast": Policy("entropy", (2.0, 2.0, 2.0))}


def digits_folder(path, *, thresholds=THRESHOLDS, layout="stages", records=True, presets=None):
    """Export the shipped B-LeNet to a folder, records of embedded digits, a made-up cost, presets."""
    net, data = zoo.b_lenet(pretrained=True), load_data("digits")
    images = torch.stack([data.val.inputs(torch.arange(8))[n] for n in range(8)])
    path.mkdir(parents=True)
    where = path / "stages" if layout == "stages" else path / "model.onnx"
    labels = [str(n) for n in range(10)]
    export(net, where, policy=Policy("entropy", thresholds), example=images, layout=layout, labels=labels)
    if records:
        record(net, loader(data.val, 300), progress=False).save(path / "record-val.npz")
        record(net, loader(data.test, 300), progress=False).save(path / "record-test.npz")
        COST.save(path / "cost.json")
    if presets:
        write_presets(path / "policies.json", presets)
    return path


@contextlib.contextmanager
def serving(path, *options):
    """Serve a path on a free port; yields the address."""
    command = [sys.executable, "-m", "branchynet", "serve", str(path), "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = []
            for line in process.stderr or ():
                lines.append(line)
                if found := re.search(r" at (https?://\S+)", line):
                    yield found[1]
                    return
            raise AssertionError("".join(lines))
        finally:
            process.terminate()
