"""`branchynet design` on a run trained on digits: files, resuming, errors and promises."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from branchynet import Choice, ExitCost, ExitRecord, Policy, Target, evaluate, load
from branchynet.data import load_data
from branchynet.design import Advice
from branchynet.errors import FileError, InputError
from branchynet.runs.design import design_run
from branchynet.runs.run import create_run, load_run, open_run
from branchynet.runs.settings import Settings
from branchynet.runs.steps import train_run
from helpers.command import call

OPTIONS = {"max_drop": 0.02, "epochs": 2, "anyway": True, "progress": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    run = create_run(
        tmp_path_factory.mktemp("base") / "run",
        Settings("b_lenet-published", warm_start_epochs=6, epochs=2, augment="none"),
    )
    train_run(run, progress=False)
    return run


@pytest.fixture(scope="module")
def designed(base):
    return design_run(base, **OPTIONS)


def test_a_design_is_a_complete_run(base, designed):
    advice, comparison = designed
    run = open_run(base.path / "design-1")
    assert (run.settings.taps, run.settings.branches) == (advice.design.taps, advice.design.branches)
    net, _ = load_run(run)
    assert net.taps == advice.design.taps and net.num_exits == len(comparison.exit_share)
    assert Advice.load(run.path / "advice.json") == advice
    for name in ("checkpoint.safetensors", "record-val.npz", "record-test.npz", "record-plain.npz", "cost.json",
                 "choice.json", "model.onnx", "bench.json", "prediction.json", "comparison.json"):  # fmt: skip
        assert (run.path / name).is_file(), name


def test_the_comparison_equals_the_files(base, designed):
    _, comparison = designed
    folder = base.path / "design-1"
    data = load_data("digits")
    answer = [load(folder / "model.onnx")(image[None].numpy()) for image in data.test.images.float() / 255]
    right = np.mean([a.label[0] == label for a, label in zip(answer, data.test.labels, strict=True)])
    assert comparison.accuracy == pytest.approx(right)
    shares = [np.mean([a.exit[0] == n for a in answer]) for n in range(1, len(comparison.exit_share) + 1)]
    assert comparison.exit_share == pytest.approx(shares)
    plain = evaluate(ExitRecord.load(folder / "record-plain.npz"), Policy()).accuracy
    assert comparison.plain_accuracy == plain
    choice, prediction = Choice.load(folder / "choice.json"), json.loads((folder / "prediction.json").read_text())
    assert comparison.predicted_us == prediction["us"] == choice.outcome.mean_us
    plain_us = ExitCost.load(folder / "cost.json").plain_us
    assert comparison.predicted_speedup == prediction["speedup"] == plain_us / prediction["us"]
    assert (folder / "prediction.json").stat().st_mtime_ns < (folder / "model.onnx").stat().st_mtime_ns
    (row,) = json.loads((folder / "bench.json").read_text())["rows"]
    assert (comparison.measured_us, comparison.plain_us) == (row["branchy_us"], row["plain_us"])
    assert comparison.speedup == row["speedup"] and comparison.reached in (True, False)
    assert comparison.error == pytest.approx(row["branchy_us"] / choice.outcome.mean_us - 1)


@pytest.mark.heavy
def test_a_second_call_trains_nothing(base, designed):
    def states():
        return {p: p.stat().st_mtime_ns for p in base.path.rglob("training.safetensors")}

    before = states()
    advice, _ = design_run(base, **OPTIONS)
    assert states() == before and advice == designed[0]


@pytest.mark.heavy
def test_the_verbs_of_a_run_work_on_it_and_the_report_shows_candidates(base, designed, monkeypatch, capsys):
    folder = base.path / "design-1"
    assert call(monkeypatch, "choose", folder, "--max-drop", "0.05", "--no-promise") == 0
    assert call(monkeypatch, "export", folder) == 0
    assert call(monkeypatch, "report", folder) == 1
    assert "bench.json was not made from the other files of this run" in " ".join(capsys.readouterr().err.split())
    (folder / "bench.json").unlink()
    assert call(monkeypatch, "report", folder) == 0
    page = (folder / "report.html").read_text()
    assert "Candidate exits" in page
    for one in designed[0].tried:
        assert f"{one.branch} at {one.tap}" in page


@pytest.mark.heavy
def test_the_command_line_prints_the_advice(base, designed, monkeypatch, capsys):
    options = ("--max-drop", "0.02", "--epochs", "2", "--anyway", "--quiet")
    assert call(monkeypatch, "design", base.path, *options) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "predicted" in output and "measured" in output and "design-1" in output
    assert call(monkeypatch, "design", base.path, "--max-drop", "0.1", "--quiet") == 1
    assert "was designed with" in " ".join(capsys.readouterr().err.split())


def test_design_prints_that_the_plain_network_is_a_warm_start(base, designed, monkeypatch, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(base.path, copy)
    config = json.loads((copy / "config.json").read_text())
    config["settings"]["plain"] = False
    (copy / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("branchynet.runs.design.design_run", lambda *_, **__: designed)
    assert call(monkeypatch, "design", copy, "--quiet") == 0
    assert "the warm start, trained for 6 epochs" in " ".join(capsys.readouterr().out.split())


@pytest.mark.heavy
def test_each_runtime_has_its_own_design_folder(base, designed, monkeypatch, capsys):
    """The design is timed in its runtime; whether it has exits depends on the machine."""
    advice, _ = designed
    monkeypatch.setattr(
        "branchynet.runs.design.advise",
        lambda net, train, val, example, target, **_: replace(advice, runtime=target.runtime),
    )
    before = (base.path / "design-1" / "advice.json").read_bytes()
    options = ("--max-drop", "0.02", "--epochs", "2", "--anyway", "--quiet", "--runtime", "openvino")
    assert call(monkeypatch, "design", base.path, *options) == 0
    folder = base.path / "design-1-openvino"
    assert folder.name in "".join(capsys.readouterr().out.split())
    assert Advice.load(folder / "advice.json").runtime == "openvino"
    assert [row["runtime"] for row in json.loads((folder / "bench.json").read_text())["rows"]] == ["openvino"]
    assert (base.path / "design-1" / "advice.json").read_bytes() == before


def test_untrained_runs_and_wrong_targets_are_refused(base, tmp_path):
    with pytest.raises(FileError, match="is not a run folder"):
        design_run(open_run(tmp_path))
    empty = create_run(tmp_path / "untrained", Settings())
    with pytest.raises(FileError, match="branchynet train"):
        design_run(empty)
    with pytest.raises(InputError, match="exits must be at least 2"):
        design_run(base, Target(2), num_exits=1, progress=False)
    assert not (base.path / "design-2").exists()
