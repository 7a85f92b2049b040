"""Compare TorchEngine on a GPU in every mode with the network on the CPU: B-LeNet, random images."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from branchynet import Policy, TorchEngine, zoo

MODES = {
    "eager": {"batch_sizes": ()},
    "recorded": {},
    "compiled": {"compile": True, "batch_sizes": (1, 8, 64)},
    "fp16": {"precision": "fp16"},
    "bf16": {"precision": "bf16"},
}
ALLOWED = {"fp16": 2e-2, "bf16": 1e-1}  # of the largest output; TF32 rounds to 10 bits


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    device = "cpu" if options.rehearse else "cuda"
    x = torch.rand(300, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    net = zoo.b_lenet(pretrained=True).eval()
    early = net.num_exits - 1
    with torch.no_grad():
        outputs = [output.numpy() for output in net(x)]
    found = {}
    for mode, how in MODES.items():
        if options.rehearse and mode != "eager":
            how = {"batch_sizes": (1, 8, 64), **how, "compile": False}
        engine = TorchEngine(net.to(device), Policy(thresholds=(1.0,) * early), x[:4], device=device, **how)
        worst = 0.0
        for batch in (0, 1, 2, 7, 64, 300):
            for exit in range(1, net.num_exits + 1):
                answer = engine(x[:batch], thresholds=[np.inf if n == exit else None for n in range(1, net.num_exits)])
                own = outputs[exit - 1]
                if batch:
                    assert (answer.exit == exit).all(), (mode, batch, exit)
                    worst = max(worst, float(np.abs(answer.output - own[:batch]).max() / np.abs(own).max()))
            middle = float(np.median(engine(x, thresholds=[np.inf] * early).score))
            answer = engine(x[:batch], thresholds=[middle] * early)
            for n, output in enumerate(outputs, 1):
                rows = answer.exit == n
                if rows.any():
                    off = np.abs(answer.output - output[:batch])[rows].max() / np.abs(output).max()
                    worst = max(worst, float(off))
        allowed = ALLOWED.get(mode, 1e-2)
        found[mode] = {"difference": float(f"{worst:.2g}"), "allowed": allowed, "passed": worst <= allowed}
        print(mode, found[mode], file=sys.stderr, flush=True)
        (options.out / "parity.json").write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(not all(one["passed"] for one in found.values()))


if __name__ == "__main__":
    main()
