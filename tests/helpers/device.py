"""A device that only runs exported files: ``make FOLDER`` on the training machine, ``run FOLDER`` on the device."""

import copy
import importlib.metadata
import json
import pickle
import sys
from pathlib import Path

import numpy as np

OPTIONAL = """
accelerate fastapi filelock grpc httptools matplotlib onnx onnx_ir onnxscript openvino orjson PIL pooch
prometheus_client python_multipart ray rich safetensors scipy sklearn torch tqdm transformers tritonclient
typer uvicorn uvloop
""".split()


def forbid(*modules):
    """Make these modules appear not to be installed."""

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in modules:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Finder())


def make(folder):
    """Export a network, and write its inputs, outputs, a record, a cost and a pickled monitor to the same folder."""
    import torch
    from torch import nn

    from branchynet import BranchyNet, ExitCost, ExitRecord, Monitor, Policy, export, load

    torch.manual_seed(0)
    net = BranchyNet(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), {"1": nn.Linear(8, 3)}).eval()
    x = torch.randn(300, 4)
    policy = Policy("entropy", (1.0,))
    export(net, folder / "model.onnx", policy=policy, example=x[:2], labels=["a", "b", "c"])
    answer = load(folder / "model.onnx", threads=1)(x.numpy())
    np.savez(folder / "answers.npz", x=x.numpy(), **answer._asdict())
    with torch.no_grad():
        outputs = torch.stack(list(net(x)), dim=1).numpy()
    record = ExitRecord(outputs, outputs[:, -1].argmax(axis=1))
    (folder / "monitor.pickle").write_bytes(pickle.dumps(Monitor(record, policy)))
    record.save(folder / "outputs.npz")
    entropy = -(np.exp(log_p := outputs - np.log(np.exp(outputs).sum(2, keepdims=True))) * log_p).sum(axis=2)
    ExitRecord.from_scores(entropy, record.losses, score="entropy").save(folder / "scores.npz")
    ExitCost((10.0, 20.0), (1.0, 0.0)).save(folder / "cost.json")


def run(folder):
    """Load the file, call it in every way, and monitor it."""
    from branchynet import BudgetController, Engine, ExitCost, ExitRecord, Monitor, Policy, evaluate, frontier, load

    wanted = np.load(folder / "answers.npz")
    x = wanted["x"]
    engine = load(folder / "model.onnx", threads=1)
    assert isinstance(engine, Engine) and engine.labels == ("a", "b", "c")
    for answer in (engine(x), engine.answer_all(x, rows=7), copy.deepcopy(engine)(input=x)):
        for name, array in answer._asdict().items():
            np.testing.assert_allclose(array, wanted[name], rtol=1e-5, atol=1e-5)
    assert 0 < (wanted["exit"] == 1).mean() < 1
    assert (pickle.loads(pickle.dumps(engine))(x, thresholds=[None]).exit == 2).all()
    assert (engine(x, thresholds=[100.0]).exit == 1).all()
    assert (
        engine.policy == Policy("entropy", (1.0,)) == Policy.from_json(json.loads(json.dumps(engine.policy.to_json())))
    )

    record, cost = ExitRecord.load(folder / "scores.npz"), ExitCost.load(folder / "cost.json")
    assert len(frontier(record, cost)) and evaluate(record, engine.policy, cost).mean_us > 0
    controller = BudgetController(record, engine.policy, cost, goal_us=15)
    for monitor in (Monitor(record, engine.policy), pickle.loads((folder / "monitor.pickle").read_bytes())):
        for start in range(0, 300, 50):
            answer = engine(x[start : start + 50], thresholds=controller.thresholds)
            controller.update(answer)
            state = monitor.update(engine(x[start : start + 50]))
        assert state.samples == 300 and not state.alarmed
    loaded = [name for name in OPTIONAL if name in sys.modules]
    assert not loaded, loaded


if __name__ == "__main__":
    {"make": make, "run": run}[sys.argv[1]](Path(sys.argv[2]))
    if sys.argv[1] == "run":
        print("exported files run with", *sorted(d.name for d in importlib.metadata.distributions()))
