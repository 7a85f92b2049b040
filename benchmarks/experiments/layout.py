"""Measure what it gains to keep feature maps in the memory layout of ONNX Runtime's convolutions.

The network is ResNet-110, whose shortcuts have no parameters, as a plain graph and with two exits at which no sample
leaves. Each runs with the pooling of `branchynet.graph.onnx_layout` and without; all four take turns on one thread.

    python benchmarks/experiments/layout.py

Writes benchmarks/results/layout.json.
"""

import json
import tempfile
from pathlib import Path
from unittest import mock

import onnx_ir as ir
import torch

from branchynet import Policy, attach, load, zoo
from branchynet.deploy import exporting
from branchynet.deploy.assembly import assemble
from branchynet.environment import environment
from branchynet.files import write_json
from branchynet.graph.onnx_flat import flatten
from branchynet.policy.scores import entropy
from branchynet.profiling.clock import interleaved

RESULTS = Path(__file__).parents[1] / "results" / "layout.json"
SECONDS, NEVER = 40.0, -1.0


def row(batch):
    """Microseconds per call, with the pooling and without."""
    torch.manual_seed(0)
    x = torch.rand(batch, 3, 32, 32)
    net = attach(zoo.resnet(110, pretrained=True), "auto", num_exits=3, example=x[:8]).eval()
    flat, found = flatten(net, x[:8], score=entropy, dynamic=batch > 1), {}
    with tempfile.TemporaryDirectory() as folder:
        for blocks in (True, False):
            with mock.patch.object(exporting, "keep_blocks", exporting.keep_blocks if blocks else lambda model: None):
                models = {
                    "plain": assemble(flat, None, outputs=["output_3"]),
                    "exits": assemble(flat, Policy(thresholds=(NEVER, NEVER))),
                }
            for name, model in models.items():
                path = Path(folder) / f"{name}-{blocks}.onnx"
                ir.save(model, path)
                found[name, blocks] = load(path, threads=1).outputs if name == "plain" else load(path, threads=1)
        us = interleaved([lambda call=call: call(x.numpy()) for call in found.values()], SECONDS)
    timed = dict(zip(found, us, strict=True))
    return {"batch": batch} | {
        name: {"us": timed[name, True], "us_without": timed[name, False]} for name in ("plain", "exits")
    }


def main():
    torch.set_num_threads(1)
    rows = [row(batch) for batch in (1, 64)]
    command = "python benchmarks/experiments/layout.py"
    write_json(RESULTS, {"command": command, "environment": environment(), "network": "ResNet-110", "rows": rows})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
