"""Profile where the overhead of B-LeNet goes, with ONNX Runtime's profiler, node by node, at batch 1 and 64.

Every sample leaves at exit 1 (threshold 1e30), so all work beyond the network is the cost of deciding. The profiler
adds about a microsecond per node, so read shares, not sums. Without the profiler, the exported file and the static
graph up to exit 1 also run on the same batches, in turns.

    python benchmarks/experiments/overhead_profile.py

Writes benchmarks/results/overhead_profile.json.
"""

import json
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnxruntime

from branchynet import Policy, Target, export, load, zoo
from branchynet.data import load_data
from branchynet.environment import environment
from branchynet.files import write_json
from branchynet.graph.onnx_flat import flatten
from branchynet.policy.scores import entropy
from branchynet.profiling.clock import interleaved
from branchynet.profiling.onnx_parts import OnnxParts

RUNS = 500
BATCHES = (1, 64)
RESULTS = Path(__file__).parents[1] / "results" / "overhead_profile.json"
KINDS = {
    "score": ("LogSoftmax", "Exp", "Mul", "ReduceSum", "Neg"),
    "compare": ("Less", "Not"),
    "do all leave": ("ReduceMin",),
    "If and keeping the answer": ("If", "Identity"),
    "exit number": ("Cast", "Sub"),
    "label": ("ArgMax",),
}


def profile(path, inputs, folder):
    """Mean microseconds per run of each kind of node."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(str(path), options)
    for _ in range(RUNS):
        session.run(None, {"x": inputs})
    events = json.loads(Path(session.end_profiling()).read_text())
    kind_of = {op: kind for kind, ops in KINDS.items() for op in ops}
    total = defaultdict(float)
    inside = 0.0  # nodes inside the If are counted separately
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            op = event["args"]["op_name"]
            total[kind_of.get(op, "the network")] += event["dur"] / RUNS
            inside += event["dur"] / RUNS if op == "Identity" else 0.0
    total["If and keeping the answer"] -= inside
    return dict(total)


def main():
    net = zoo.b_lenet(branches="published", pretrained=True)
    images = load_data("mnist").test.images[:64].float() / 255
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = export(net, folder / "model.onnx", policy=Policy(thresholds=(1e30,)), example=images[:8])
        branchy = load(path, threads=1)
        parts = OnnxParts(flatten(net, images[:2], score=entropy))
        with parts.opened({"upto_1": ["output_1", "score_1"]}, Target()) as opened:
            static = opened["upto_1"]
        for batch in BATCHES:
            inputs = np.ascontiguousarray(images[:batch].numpy())
            us = interleaved([lambda x=inputs: branchy(x), lambda x=inputs: static(x)], 20, rounds=4000)
            nodes = profile(path, inputs, folder)
            whole = sum(nodes.values())
            rows.append(
                {
                    "batch": batch,
                    "branchy_us_a_call": us[0],
                    "static_upto_exit_1_us_a_call": us[1],
                    "profiled_share": {kind: value / whole for kind, value in nodes.items()},
                }
            )
    write_json(
        RESULTS,
        {"command": "python benchmarks/experiments/overhead_profile.py", "environment": environment(), "rows": rows},
    )
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
