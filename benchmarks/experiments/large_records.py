"""Measure the processor time and the memory of `choose` on a million samples.

Each case runs in a process of its own, because the peak of the resident set belongs to a process. Scores are distinct
random numbers, and an exit is wrong with a probability in proportion to its score, so no threshold can be ruled out in
advance: few real records are as slow.

    python benchmarks/experiments/large_records.py  # two minutes on one core

Writes benchmarks/results/large_records.json.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from branchynet import ExitCost, ExitRecord, choose
from branchynet.environment import environment
from branchynet.files import write_json

SAMPLES, SEED = 1_000_000, 0
CASES = ((8, None), (8, 0.95), (3, None), (3, 0.95))  # exits, and confidence of the promise
RESULTS = Path(__file__).parents[1] / "results" / "large_records.json"


def made_up(exits):
    rng = np.random.default_rng(SEED)
    scores = np.empty((SAMPLES, exits), np.float32)
    losses = np.empty_like(scores)
    for n, share in enumerate(np.linspace(0.8, 0.3, exits)):  # by columns: temporary arrays would raise the peak
        scores[:, n] = rng.random(SAMPLES, dtype=np.float32)
        losses[:, n] = rng.random(SAMPLES, dtype=np.float32) < scores[:, n] * share
    return ExitRecord.from_scores(scores, losses)


def peak():
    """The largest resident set so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(exits, confidence):
    record = made_up(exits)
    cost = ExitCost(tuple(range(5, 5 + exits)), (1.0,) * (exits - 1) + (0.0,))
    before, start = peak(), time.process_time()
    choice = choose(record, cost, max_drop=0.02, confidence=confidence)
    seconds = time.process_time() - start
    return {
        "samples": SAMPLES,
        "exits": exits,
        "confidence": confidence,
        "seconds": round(seconds, 1),
        "megabytes": round(peak() - before),
        "mean_us": choice.outcome.mean_us,
        "accuracy": choice.outcome.accuracy,
    }


def main():
    if sys.argv[1:]:
        print(json.dumps(measured(*json.loads(sys.argv[1]))))
        return
    rows = []
    for case in CASES:
        command = [sys.executable, __file__, json.dumps(case)]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        rows.append(json.loads(done.stdout))
        print(rows[-1], flush=True)
    about = {"command": "python benchmarks/experiments/large_records.py", "environment": environment(), "seed": SEED}
    write_json(RESULTS, {**about, "rows": rows})


if __name__ == "__main__":
    main()
