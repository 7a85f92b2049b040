"""Time TorchEngine without batch sizes on a GPU: the plain network, no sample leaving early, and all leaving at exit 1.

    python benchmarks/gpu/torch_engine.py --out FOLDER              # writes torch_engine.json
    python benchmarks/gpu/torch_engine.py --out FOLDER --rehearse   # on the CPU, batch 1 only

Inputs are on the device, outputs are copied to the host; medians over calls.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from branchynet import Policy, zoo
from branchynet.deploy.torch_engine import TorchEngine

NETWORKS = {
    "B-AlexNet": (zoo.alexnet, zoo.b_alexnet),
    "B-ResNet-110": (lambda **k: zoo.resnet(110, **k), lambda **k: zoo.b_resnet(110, **k)),
}
CALLS, WARM = 15, 3


def milliseconds(engine, x, **options):
    """The median time of a call."""
    times = []
    for _ in range(WARM + CALLS):
        start = time.perf_counter()
        engine(x, **options)  # returns numpy arrays, so the device has finished
        times.append(time.perf_counter() - start)
    return round(1e3 * statistics.median(times[WARM:]), 3)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    device = "cpu" if options.rehearse else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device was found; --rehearse runs this on the CPU")
    images = torch.rand(256, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rows = []
    for name, (plain, branchy) in NETWORKS.items():
        net = branchy(pretrained=True)
        never, first = (0.0,) * (net.num_exits - 1), (float("inf"),) * (net.num_exits - 1)
        engine = TorchEngine(net, Policy(thresholds=never), images[:8], device=device, batch_sizes=())
        alone = TorchEngine(plain(pretrained=True), Policy(), images[:8], device=device, batch_sizes=())
        for batch in (1,) if options.rehearse else (1, 8, 64, 256):
            x = images[:batch].to(device)
            row = {
                "network": name,
                "batch": batch,
                "plain_ms": milliseconds(alone, x),
                "never_ms": milliseconds(engine, x),
                "exit1_ms": milliseconds(engine, x, thresholds=first),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    result = {
        "command": "python benchmarks/gpu/torch_engine.py",
        "device": name,
        "torch": torch.__version__,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "torch_engine.json").write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
