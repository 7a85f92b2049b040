"""What the page says of other thresholds, against the exit rule applied to the record of the whole network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import branchynet
from branchynet import ExitCost, ExitRecord, Policy, load
from branchynet.policy.exit_rule import route
from branchynet.policy.record_scores import scores_of_record
from branchynet.serve.curve import predicted
from helpers.served import COST, PRESETS, THRESHOLDS, digits_folder

ALL, SOME = THRESHOLDS, (0.05, None, 0.2)  # the second leaves exit 2 out


@pytest.fixture(scope="module", params=[ALL, SOME], ids=["all exits", "an exit left out"])
def served(request, tmp_path_factory):
    folder = digits_folder(tmp_path_factory.mktemp("served") / "model", thresholds=request.param)
    return folder, load(folder / "stages")


def outcome(record, thresholds, enabled):
    """Accuracy, mean time and shares, sample by sample."""
    exits = route(scores_of_record(record, "entropy"), thresholds)
    us = COST.latency_us(enabled)
    right = [1 - record.losses[s, n - 1] for s, n in enumerate(exits)]
    return np.mean(right), np.mean([us[n - 1] for n in exits]), np.bincount(exits, minlength=5)[1:] / len(exits)


def presets_for(engine):
    """The presets, without the exits that the file leaves out."""
    own = engine.policy.thresholds
    return {
        name: Policy("entropy", [None if t is None else one.thresholds[n] for n, t in enumerate(own)])
        for name, one in PRESETS.items()
    }


def test_every_point_is_the_outcome_on_the_test_record(served):
    folder, engine = served
    presets = presets_for(engine)
    found = predicted(folder, engine, presets)
    test = ExitRecord.load(folder / "record-test.npz")
    assert found["settable"] and not found["reason"] and found["samples"] == test.samples
    assert found["own"]["thresholds"] == list(engine.policy.thresholds)
    assert {name: tuple(one["thresholds"]) for name, one in found["presets"].items()} == {
        name: one.thresholds for name, one in presets.items()
    }
    assert len(found["points"]) > 10
    for point in [found["own"], *found["presets"].values(), *found["points"]]:
        accuracy, mean_us, share = outcome(test, point["thresholds"], engine.policy.enabled)
        assert point["accuracy"] == pytest.approx(accuracy)
        assert point["mean_us"] == pytest.approx(mean_us)
        assert point["share"] == pytest.approx(share)
        assert point["speedup"] == pytest.approx(COST.plain_us / mean_us)
        left_out = [n for n, own in enumerate(engine.policy.thresholds) if own is None]
        assert all(point["thresholds"][n] is None for n in left_out)  # requests may not give others
    assert found["points"][-1]["share"] == [0, 0, 0, 1]


def test_no_thresholds_of_the_file_are_better_than_the_points(served):
    folder, engine = served
    (folder / "record-test.npz").rename(folder / "kept")
    try:
        points = predicted(folder, engine, {})["points"]  # chosen on the record that predicts
    finally:
        (folder / "kept").rename(folder / "record-test.npz")
    record = ExitRecord.load(folder / "record-val.npz")
    scores = scores_of_record(record, "entropy")
    generator = np.random.default_rng(0)
    for _ in range(200):
        drawn = [
            None if own is None or generator.random() < 0.2 else float(generator.choice(scores[:, n]))
            for n, own in enumerate(engine.policy.thresholds)
        ]
        accuracy, mean_us, _ = outcome(record, drawn, engine.policy.enabled)
        worse = [p for p in points if p["accuracy"] < accuracy - 1e-9 and p["mean_us"] > mean_us + 1e-9]
        assert not [p for p in worse if p is not points[-1]]  # the last sends all to the last exit


def test_a_record_of_scores_needs_no_pytorch_and_one_of_logits_says_that_it_does(served, tmp_path):
    folder, engine = served
    code = """
import json, sys
from helpers import device
device.forbid("torch")
from branchynet import load
from branchynet.serve.curve import predicted
from pathlib import Path
print(json.dumps(predicted(Path(sys.argv[1]), load(sys.argv[2]), {})))
"""
    record = ExitRecord.load(folder / "record-test.npz")
    scores = ExitRecord.from_scores(scores_of_record(record, "entropy"), record.losses, "entropy", record.network)
    COST.save(tmp_path / "cost.json")
    for kept in (scores, record):
        kept.save(tmp_path / "record.npz")
        paths = os.pathsep.join(map(str, (Path(__file__).parents[1], Path(branchynet.__file__).parents[1])))
        command = [sys.executable, "-c", code, tmp_path, folder / "stages"]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        if kept is scores:
            assert found == predicted(tmp_path, engine, {})
        else:
            assert found["points"] == [] and "torch" in found["reason"]


def test_without_what_it_needs_it_says_why(served, tmp_path):
    folder, engine = served
    assert "No record" in predicted(None, engine, {})["reason"]
    assert "No record" in predicted(tmp_path, engine, {})["reason"]
    for name in ("record-val.npz", "cost.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
        reason = predicted(tmp_path, engine, {})["reason"]
        assert ("No cost.json" in reason) == (name == "record-val.npz")
    assert reason == ""
    ExitCost((1.0, 2.0), (1.0, 1.0)).save(tmp_path / "cost.json")
    found = predicted(tmp_path, engine, {})
    assert "cost.json has 2 exits, but the model has 4" in found["reason"]
    assert found["settable"] and found["points"] == [] and found["own"] is None
    COST.save(tmp_path / "cost.json")
    (tmp_path / "record-val.npz").write_bytes(b"damaged")
    assert "record-val.npz" in predicted(tmp_path, engine, {})["reason"]
    scores = np.zeros((3, 4))
    ExitRecord.from_scores(scores, scores, "entropy", network="another").save(tmp_path / "record-val.npz")
    assert "another" in predicted(tmp_path, engine, {})["reason"]


def test_a_file_without_early_exits_takes_no_thresholds(tmp_path):
    folder = digits_folder(tmp_path / "model", thresholds=(None, None, None), layout="nested", records=False)
    for engine in (load(folder / "model.onnx"), None):
        found = predicted(folder, engine, {})
        assert not found["settable"] and "no early exits" in found["reason"]
