"""Compare a folder of stages with the nested file, and thresholds per sample with shared thresholds.

B-LeNet and B-AlexNet with the shipped weights of their designs for batches answer test images in batches of 64, on one
thread. Thresholds are quantiles of the scores of these images. All calls take turns on the same batch. Times are
processor time, which does not include waiting for other programs; on an idle machine a caller waits this long. Each is
divided by the pace of its turn. Ratios are medians over the turns.

    BRANCHYNET_DATA=... python benchmarks/experiments/stages.py

Writes benchmarks/results/stages.json.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from branchynet import Policy, export, load, zoo
from branchynet.data import load_data
from branchynet.environment import environment
from branchynet.files import write_json
from branchynet.policy.scores import entropy
from branchynet.profiling.clock import at_one_pace, spread_of

BATCH, SAMPLES, SECONDS = 64, 2048, 15.0
SHARES = (0.5, 0.9, 0.0)  # of the samples that reach an exit and leave there
NETWORKS = {"B-LeNet": (zoo.b_lenet, "mnist"), "B-AlexNet": (zoo.b_alexnet, "cifar10")}
RESULTS = Path(__file__).parents[1] / "results" / "stages.json"
COMMAND = "python benchmarks/experiments/stages.py"


def thresholds_at(scores, share):
    """Thresholds at which `share` of the samples that reach an exit leave there; `scores` is (S, N)."""
    thresholds, staying = [], np.ones(len(scores), bool)
    for column in scores.T[:-1]:
        thresholds.append(float(np.quantile(column[staying], share)) if share else -1.0)
        staying &= column >= thresholds[-1]
    return tuple(thresholds)


def first_answer(engine, rows):
    """Seconds of the processor until `stream` hands out the first answers."""
    start = time.process_time()
    next(iter(engine.stream(rows)))
    return time.process_time() - start


def whole(call, rows):
    start = time.process_time()
    call(rows)
    return time.process_time() - start


def times(calls, images):
    """Microseconds `(calls, turns)` at one pace, each turn on the next batch. The first run of a call only warms up."""
    taken, end, turn = [[] for _ in calls], time.perf_counter() + SECONDS, 0
    while time.perf_counter() < end or turn % (SAMPLES // BATCH):
        rows = images[turn * BATCH % SAMPLES :][:BATCH]
        for call, found in zip(calls, taken, strict=True):
            call(rows)
            found.append(min(call(rows) for _ in range(2)) * 1e6)
        turn += 1
    return at_one_pace(taken)


def row(network, net, images, scores, share):
    policy = Policy(thresholds=thresholds_at(scores, share))
    how = {"policy": policy, "example": torch.from_numpy(images[:8])}
    with tempfile.TemporaryDirectory() as folder:
        nested = load(export(net, Path(folder) / "nested.onnx", **how), threads=1)
        given = load(export(net, Path(folder) / "given.onnx", thresholds="input", **how), threads=1)
        staged = load(export(net, Path(folder) / "staged", layout="stages", **how), threads=1)
    shared = list(policy.thresholds)
    each = [np.full(BATCH, t, np.float32) for t in shared]
    name = staged.inputs[0].name
    calls = {
        "nested": lambda x: whole(nested, x),
        "staged": lambda x: whole(staged, x),
        "stage_1": lambda x: whole(staged.stage(1).run, {name: x}),
        "first_answer": lambda x: first_answer(staged, x),
        "shared": lambda x: whole(lambda x: given(x, thresholds=shared), x),
        "per_sample": lambda x: whole(lambda x: given(x, thresholds=each), x),
        "staged_shared": lambda x: whole(lambda x: staged(x, thresholds=shared), x),
        "staged_per_sample": lambda x: whole(lambda x: staged(x, thresholds=each), x),
    }
    taken = times(list(calls.values()), images)
    us = dict(zip(calls, np.median(taken, axis=1).tolist(), strict=True))
    of = dict(zip(calls, np.asarray(taken), strict=True))
    ratio = {(a, b): float(np.median(of[a] / of[b])) for a in calls for b in calls}  # of calls of the same turn
    exits = staged.answer_all(images).exit
    assert (exits == nested.answer_all(images).exit).all()
    found = {
        "network": network,
        "batch": BATCH,
        "exit_share": [float((exits == n).mean()) for n in range(1, net.num_exits + 1)],
        "us_a_call": us,
        "spread": spread_of(taken),
        "staged_to_nested": ratio["staged", "nested"],
        "first_answer_to_stage_1": ratio["first_answer", "stage_1"],
        "per_sample_to_shared": ratio["per_sample", "shared"],
        "per_sample_to_default": ratio["per_sample", "nested"],
        "staged_per_sample_to_shared": ratio["staged_per_sample", "staged_shared"],
    }
    print(found)
    return found


def main():
    torch.set_num_threads(1)
    rows = []
    for network, (make, data) in NETWORKS.items():
        net = make(pretrained=True, target="batch").eval()
        images = load_data(data).test.inputs(slice(0, SAMPLES))
        with torch.no_grad():
            scores = torch.stack([entropy((output,)) for output in net(images)], dim=1).numpy()
        rows += [row(network, net, images.numpy(), scores, share) for share in SHARES]
    write_json(RESULTS, {"command": COMMAND, "environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
