"""The command line as a person uses it: a run from training to report, and every way to get it wrong."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from branchynet import Choice, ExitCost, ExitRecord, Policy, cli, evaluate, load
from branchynet.data import load_data, save_image
from branchynet.engine.onnx import RUNTIMES
from branchynet.guarantee import fewest, halves


def call(monkeypatch, *arguments):
    """Run the command line in this process and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["branchynet", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
        raise SystemExit(0)
    return stop.value.code or 0


def test_every_runtime_is_named():
    assert cli.ENGINES == ", ".join(RUNTIMES)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with everything in it, made by the verbs in turn."""
    path = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        train = ("train", path, "--baseline-epochs", 2, "--epochs", 3, "--batch-size", 64, "--quiet")
        assert call(patch, *train) == 0
        assert call(patch, "choose", path, "--max-drop", 0.02, "--no-promise") == 0
        assert call(patch, "export", path) == 0
        bench = ("bench", path, "--batch", "1,7", "--engine", "onnxruntime,openvino", "--json", path / "rows.json")
        assert call(patch, *bench, "--quiet") == 0
        assert call(patch, "report", path) == 0
    return path


def test_a_run_holds_what_the_design_says(run):
    files = {p.name for p in run.iterdir()}
    assert files >= {
        "config.json", "baseline", "static", "checkpoint.safetensors", "training.safetensors", "train.csv",
        "record-val.npz", "record-test.npz", "cost.json", "choice.json", "model.onnx", "bench.json", "report.html",
    }  # fmt: skip
    assert not [name for name in files if "partial" in name]
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["epochs"] == 3 and config["environment"]["torch"]


def test_the_file_does_on_test_images_what_the_record_says(run):
    engine = load(run / "model.onnx", threads=1)
    test = load_data("digits").test
    answer = engine(test.images.numpy().astype(np.float32) / 255)
    outcome = evaluate(ExitRecord.load(run / "record-test.npz"), Policy.from_json(engine.metadata["policy"]))
    share = [(answer.exit == n).mean() for n in (1, 2)]
    np.testing.assert_allclose(share, outcome.exit_share, atol=1.5 / len(test))
    assert (answer.label == test.labels.numpy()).mean() == pytest.approx(outcome.accuracy, abs=1.5 / len(test))


def test_bench_rows_are_complete_and_consistent(run):
    rows = json.loads((run / "rows.json").read_text())
    assert [(row["engine"], row["batch"]) for row in rows] == [
        (engine, batch) for engine in ("onnxruntime", "openvino") for batch in (1, 7)
    ]
    for row in rows:
        assert list(row) == [
            "network", "engine", "batch", "threads", "static_us", "branchy_us", "limit_us", "limit_in_order_us",
            "speedup", "overhead", "overhead_sorted", "accuracy_static", "accuracy_branchy", "exit_share", "thresholds",
        ]  # fmt: skip
        assert row["speedup"] == pytest.approx(row["static_us"] / row["branchy_us"])
        assert row["overhead"] == pytest.approx(row["branchy_us"] / row["limit_us"])
        assert sum(row["exit_share"]) == pytest.approx(1)


def test_the_report_is_one_offline_page(run):
    page = (run / "report.html").read_text()
    assert len(page) < 3_000_000
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)
    HTMLParser().feed(page)


def test_training_again_with_the_same_settings_changes_nothing(run, monkeypatch):
    before = (run / "checkpoint.safetensors").read_bytes()
    train = ("train", run, "--baseline-epochs", 2, "--epochs", 3, "--batch-size", 64, "--quiet")
    assert call(monkeypatch, *train) == 0
    assert (run / "checkpoint.safetensors").read_bytes() == before


def test_predict_answers_image_files(run, monkeypatch, tmp_path, capsys):
    test = load_data("digits").test
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for file, image in zip(files, test.images, strict=False):
        save_image(image.numpy(), file)
    assert call(monkeypatch, "predict", run, *files, "--json") == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    direct = load(run / "model.onnx")(test.images[:5].numpy().astype(np.float32) / 255)
    assert [a["label"] for a in answers] == [str(n) for n in direct.label]
    assert [a["exit"] for a in answers] == direct.exit.tolist()
    np.testing.assert_allclose([a["score"] for a in answers], direct.score, atol=1e-6)
    assert call(monkeypatch, "predict", run / "model.onnx", files[0]) == 0
    told = re.sub(r"[^\w./-]", "", capsys.readouterr().out)
    assert "image" in told and "0.png" in told


def test_choose_promises_and_takes_a_score(run, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert call(monkeypatch, "choose", copy, "--max-drop", 0.05, "--confidence", 0.9, "--score", "margin") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "With 90 % confidence, accuracy is at most 5.00 points below the last exit's" in told
    choice = Choice.load(copy / "choice.json")
    assert choice.policy.score == "margin" and str(choice.promise) in told
    plain_us = ExitCost.load(copy / "cost-margin.json").plain_us
    assert f"{plain_us / choice.outcome.mean_us:.2f}x the speed of the network without exits" in told
    assert call(monkeypatch, "choose", copy, "--max-drop", 0.001) == 1
    assert f"needs at least {2 * fewest(0.001, 0.05, 'betting')} samples" in " ".join(capsys.readouterr().err.split())
    assert Choice.load(copy / "choice.json") == choice


def test_a_learned_score_is_fitted_chosen_exported_and_reported(run, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert call(monkeypatch, "choose", copy, "--max-drop", 0.05, "--no-promise", "--score", "learned") == 0
    assert "learned < " in capsys.readouterr().out
    choice = Choice.load(copy / "choice.json")
    val = ExitRecord.load(copy / "record-val.npz")
    others = val.take(halves(val.samples)[1])
    assert choice.record_digest == others.digest and choice.outcome == evaluate(
        others, choice.policy, ExitCost.load(copy / "cost-learned.json")
    )
    (copy / "bench.json").unlink()  # of another file
    for verb in ("export", "report"):
        assert call(monkeypatch, verb, copy) == 0
    test = ExitRecord.load(copy / "record-test.npz")
    left = load(copy / "model.onnx")(load_data("digits").test.images.numpy().astype(np.float32) / 255).exit
    share = evaluate(test, choice).exit_share[0]
    assert abs(np.mean(left == 1) - share) <= 2 / test.samples  # ties may be decided otherwise


def test_what_another_network_recorded_is_not_reported(run, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    made = ExitRecord.load(copy / "record-test.npz")
    ExitRecord(made.outputs, made.labels, network=made.network[:-1] + "x").save(copy / "record-test.npz")
    assert call(monkeypatch, "report", copy) == 1
    assert "record-val.npz was not made from the other files" in " ".join(capsys.readouterr().err.split())


def test_inspect_tells_exits_thresholds_and_preprocessing(run, monkeypatch, capsys):
    assert call(monkeypatch, "inspect", run / "model.onnx") == 0
    told = capsys.readouterr().out
    threshold = load(run / "model.onnx").policy.thresholds[0]
    assert f"entropy < {threshold:.6g}" in told and "pixels / 255" in told and "(B, 1, 28, 28)" in told
    assert call(monkeypatch, "inspect", run / "model.onnx", "--json") == 0
    assert json.loads(capsys.readouterr().out)["policy"]["thresholds"] == [threshold]


def foreign(path):
    graph = helper.make_graph(
        [helper.make_node("Identity", ["a"], ["b"])],
        "g",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [1])],
    )
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)]), path)


MISTAKES = {
    "no run": (["choose", "{tmp}/nowhere"], "branchynet train"),
    "not trained": (["choose", "{tmp}/empty"], "branchynet train"),
    "unknown network": (["train", "{tmp}/new", "--network", "b_lenett"], "b_lenet"),
    "data that the network cannot read": (
        ["train", "{tmp}/new", "--network", "b_alexnet", "--data", "digits"],
        "(1, 28, 28)",
    ),
    "unknown data": (["train", "{tmp}/new", "--data", "mnits"], "mnist"),
    "missing data": (["train", "{tmp}/new", "--data", "folder:{tmp}/none"], "none"),
    "unknown augment": (["train", "{tmp}/new", "--augment", "afine"], "affine"),
    "too many weights": (["train", "{tmp}/new", "--weights", "1,2,3", "--quiet"], "3"),
    "not numbers": (["bench", "{run}", "--batch", "one"], "one"),
    "batch too large": (["bench", "{run}", "--batch", "100000", "--quiet"], "100000"),
    "unknown engine": (["bench", "{run}", "--engine", "tvm", "--quiet"], "openvino"),
    "other settings": (["train", "{run}", "--epochs", "4"], "epochs"),
    "infeasible": (["choose", "{run}", "--min-accuracy", "1.5"], "1.5"),
    "two limits": (["choose", "{run}", "--min-accuracy", "0.5", "--max-drop", "0"], "max_drop"),
    "foreign onnx": (["inspect", "{tmp}/foreign.onnx"], "BranchyNet"),
    "truncated onnx": (["inspect", "{tmp}/truncated.onnx"], "truncated.onnx"),
    "no onnx": (["inspect", "{tmp}/none.onnx"], "none.onnx"),
    "no image": (["predict", "{run}", "{tmp}/none.png"], "none.png"),
    "text as image": (["predict", "{run}", "{tmp}/text.png"], "text.png"),
    "truncated record": (["choose", "{tmp}/broken"], "record-val.npz"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line(mistake, run, monkeypatch, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for folder in ("empty", "broken"):
        (tmp_path / folder / "config.json").write_bytes((run / "config.json").read_bytes())
    (tmp_path / "broken" / "record-val.npz").write_bytes((run / "record-val.npz").read_bytes()[:2000])
    foreign(tmp_path / "foreign.onnx")
    (tmp_path / "truncated.onnx").write_bytes((run / "model.onnx").read_bytes()[:5000])
    (tmp_path / "text.png").write_text("no image")
    arguments, expected = MISTAKES[mistake]
    status = call(monkeypatch, *(a.format(tmp=tmp_path, run=run) for a in arguments))
    told = capsys.readouterr().err
    assert status == 1
    assert told.startswith("error: ") and expected in told and "Traceback" not in told
    assert len(told.strip().splitlines()) == 1


def test_wrong_usage_is_status_2_and_a_real_process_says_the_same(run):
    command = [sys.executable, "-m", "branchynet.cli"]
    wrong = subprocess.run([*command, "chose"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "No such command" in wrong.stderr
    missing = subprocess.run([*command, "inspect", str(run / "none.onnx")], capture_output=True, text=True)
    assert missing.returncode == 1 and missing.stderr.startswith("error: ")
