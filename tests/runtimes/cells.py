"""Exported files of every layout with the answers of our engine, and the comparison of another runtime with them.

``make FOLDER`` exports and answers; ``check FOLDER RUNTIME`` loads the files in a runtime of `load`. ``run.mjs`` does
the same in the runtimes of npm, without this package.
"""

import json
import sys
from pathlib import Path

import numpy as np

LAYOUTS = {
    "default": {},
    "input": {"thresholds": "input"},
    "batch 1": {"free": "none"},
    "stages": {"layout": "stages"},
    "flat": {"policy": None},
}
NETWORKS = ("b_lenet", "tokens")
PER_SAMPLE = ("input", "stages")  # the layouts that take thresholds per sample
SAMPLES, BATCHES = 64, (1, 7, 64)
TOLERANCE = 1e-4  # of scores and outputs, relative to the largest of them: runtimes add up in different orders
NEVER, ALWAYS = -1.0, 1e30


def make(folder):
    """Write the files of every network and layout, and ``cases.json``: inputs, thresholds and answers."""
    networks = {name: _network(folder, name) for name in NETWORKS}
    (folder / "cases.json").write_text(json.dumps({"tolerance": TOLERANCE, "networks": networks}))


def _network(folder, name):
    import torch

    from branchynet import Policy, export, load, zoo
    from helpers import networks
    from helpers.loop import every_exit, safe_thresholds

    if name == "b_lenet":
        net = zoo.b_lenet(pretrained=True).eval()
        inputs = (torch.rand(SAMPLES, 1, 28, 28, generator=torch.Generator().manual_seed(0)),)
    else:
        net, example = networks.build(getattr(networks, name), 0)
        inputs = networks.draw(example, SAMPLES, 0)
    own = safe_thresholds(every_exit(net, inputs), (0.3, 0.5, 0.5)[: net.num_exits - 1], gap=1e-3)
    files = {}
    for layout, options in LAYOUTS.items():
        path = folder / f"{name}-{layout.replace(' ', '')}{'' if layout == 'stages' else '.onnx'}"
        files[layout] = export(net, path, **{"policy": Policy(thresholds=own), "example": inputs, **options}).name
    arrays = [i.numpy() for i in inputs]
    engine, flat = load(folder / files["input"], threads=1), load(folder / files["flat"], threads=1)
    each = [np.where(np.arange(SAMPLES) % 2, t, NEVER).tolist() for t in own]
    given = [list(own), [ALWAYS] * len(own), [NEVER] * len(own), [NEVER, *own[1:]], each]
    cases = []
    for rows in BATCHES:
        for thresholds in given:
            own_rows = [t[:rows] if isinstance(t, list) else t for t in thresholds]
            call = [np.array(t, np.float32) if isinstance(t, list) else t for t in own_rows]
            answer = engine(*(a[:rows] for a in arrays), thresholds=call)
            wanted = {name: values.tolist() for name, values in answer._asdict().items()}
            cases.append({"rows": rows, "thresholds": own_rows, "answer": wanted})
    return {
        "files": files,
        "inputs": [
            {"name": i.name, "dtype": str(a.dtype), "shape": a.shape, "values": a.ravel().tolist()}
            for i, a in zip(engine.inputs, arrays, strict=True)
        ],
        "own": list(own),
        "cases": cases,
        "flat": [values.tolist() for values in flat.outputs(*arrays)],
    }


def check(folder, name, layout, runtime):
    """Compare the answers of one file in a runtime of `load`. Raise `AssertionError` where they differ."""
    from branchynet import load

    network = json.loads((folder / "cases.json").read_text())["networks"][name]
    arrays = [np.array(i["values"], i["dtype"]).reshape(i["shape"]) for i in network["inputs"]]
    engine = load(folder / network["files"][layout], threads=1, runtime=runtime)
    if layout == "flat":
        for wanted, found in zip(network["flat"], engine.outputs(*arrays), strict=True):
            close(found, wanted)
        return
    for case in network["cases"]:
        thresholds = [np.array(t, np.float32) if isinstance(t, list) else t for t in case["thresholds"]]
        if layout not in PER_SAMPLE and any(isinstance(t, np.ndarray) for t in thresholds):
            continue
        rows = [a[: case["rows"]] for a in arrays]
        answers = [engine.answer_all(*rows, thresholds=thresholds)]
        if case["thresholds"] == network["own"]:
            answers.append(engine.answer_all(*rows))
        for answer in answers:
            assert answer.label.tolist() == case["answer"]["label"]
            assert answer.exit.tolist() == case["answer"]["exit"]
            close(answer.score, case["answer"]["score"])
            close(answer.output, case["answer"]["output"])


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE * max(1.0, np.abs(wanted).max()))


def main(verb, folder, runtime=None):
    if verb == "make":
        make(Path(folder))
        return
    for name in NETWORKS:
        for layout in LAYOUTS:
            check(Path(folder), name, layout, runtime)
            print(f"{runtime}: {name}, {layout}: answers agree")


if __name__ == "__main__":
    main(*sys.argv[1:])
