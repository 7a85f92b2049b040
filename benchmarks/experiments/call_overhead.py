"""Measure what a call of an engine takes beyond ``session.run`` of ONNX Runtime.

The network is B-LeNet, designed for one sample per call, on one thread. Every sample leaves at exit 1, where a call is
shortest. Each kind of call takes turns with ``session.run`` on the same feeds. The overhead is the median of the
differences per turn, so other programs slow down both sides equally.

    python benchmarks/experiments/call_overhead.py

Writes the rows of this processor into benchmarks/results/call_overhead.json.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from branchynet import Policy, export, load, zoo
from branchynet.environment import environment
from branchynet.files import read_json, write_json

TURNS = 8000
CALLS = 4  # per turn, after one to warm up
RESULTS = Path(__file__).parents[1] / "results" / "call_overhead.json"
COMMAND = "python benchmarks/experiments/call_overhead.py"


def turns(calls):
    """Microseconds per call, `(calls, TURNS)`."""
    taken = np.empty((len(calls), TURNS))
    for turn in range(TURNS):
        for row, call in enumerate(calls):
            call()
            start = time.perf_counter_ns()
            for _ in range(CALLS):
                call()
            taken[row, turn] = (time.perf_counter_ns() - start) / CALLS / 1000
    return taken


def main():
    torch.set_num_threads(1)
    net = zoo.b_lenet(pretrained=True)
    exits = len(net.branches) + 1
    thresholds = (1e30,) * (exits - 1)
    image = torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    array = image.numpy()
    with tempfile.TemporaryDirectory() as folder:
        path = export(net, Path(folder) / "model.onnx", policy=Policy(thresholds=thresholds), example=image)
        engine = load(path, threads=1)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options)
    names = [output.name for output in session.get_outputs()]
    feeds = {"x": array}
    all_feeds = feeds | {f"threshold_{n}": np.array([1e30], np.float32) for n in range(1, exits)}
    calls = {
        "session.run(names, feeds)": lambda: session.run(names, feeds),
        "session.run(names, feeds), thresholds among them": lambda: session.run(names, all_feeds),
        "engine(array)": lambda: engine(array),
        "engine.outputs(array)": lambda: engine.outputs(array),
        "engine(x=array)": lambda: engine(x=array),
        "engine(tensor)": lambda: engine(image),
        "engine(array, thresholds=...)": lambda: engine(array, thresholds=thresholds),
    }
    taken = turns(list(calls.values()))
    bare = [1 if "thresholds" in name else 0 for name in calls]
    beyond = np.median(taken - taken[bare], axis=1)
    rows = [
        {"call": name, "us": float(us), "beyond_us": float(more)}
        for name, us, more in zip(calls, np.median(taken, axis=1), beyond, strict=True)
    ]
    here = environment()
    others = read_json(RESULTS)["machines"] if RESULTS.exists() else []
    others = [m for m in others if m["environment"]["processor"] != here["processor"]]
    write_json(RESULTS, {"command": COMMAND, "machines": [*others, {"environment": here, "rows": rows}]})
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
