"""Compare the transformer of text.py with transformers of fewer blocks, trained for as long.

Accuracy is from test snippets. All networks are timed in the same engine, in turns.

    python benchmarks/experiments/text_smaller.py  # three quarters of an hour on one core; resumes if stopped

Writes benchmarks/results/text_smaller.json.
"""

import tempfile
from functools import partial
from pathlib import Path

import torch
from text import Coder, Text

from branchynet import Policy, evaluate, export, load, record
from branchynet.environment import environment
from branchynet.files import write_json
from branchynet.profiling.clock import in_turns

BLOCKS = (6, 4, 3, 2)
BATCHES = (1, 64)
PASSES, SAMPLES = 9, 1024
ROOT = Path(__file__).parents[1]
RUNS = ROOT.parent / "runs" / "text"
RESULTS = ROOT / "results" / "text_smaller.json"


def main():
    torch.set_num_threads(1)
    engines, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for blocks in BLOCKS:
            of_six = blocks == BLOCKS[0]
            task = Text(RUNS / ("seed-0" if of_six else f"blocks-{blocks}"), "no", make=partial(Coder, blocks))
            net = task.continued().eval()
            accuracy = evaluate(record(net, task.loader("test")), Policy()).accuracy
            path = export(net, Path(folder) / f"{blocks}.onnx", policy=None, example=task.example())
            engines[blocks] = load(path, threads=1)
            rows.append({"blocks": blocks, "accuracy": accuracy})
            print(rows[-1], flush=True)
        texts = task.test()[0][torch.randperm(len(task.test()[0]), generator=torch.Generator().manual_seed(0))].numpy()
        for batch in BATCHES:
            calls = [(texts[i : i + batch],) for i in range(0, SAMPLES, batch)]
            times = in_turns(engines, calls, PASSES)
            for row in rows:
                row[f"us_batch_{batch}"] = times[row["blocks"]]
    command = "python benchmarks/experiments/text_smaller.py"
    write_json(RESULTS, {"command": command, "environment": environment(), "rows": rows})
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
