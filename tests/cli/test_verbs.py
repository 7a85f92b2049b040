"""The command line from training to report, and its errors."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from branchynet import Choice, ExitCost, ExitRecord, Policy, Target, evaluate, load
from branchynet.data import load_data, save_image
from branchynet.errors import GraphError
from branchynet.policy.risk_tests import halves, samples_needed
from branchynet.runs import steps
from helpers.command import PAPER, call


def test_a_run_holds_all_files(run):
    files = {p.name for p in run.iterdir()}
    assert files >= {
        "config.json", "warm-start", "plain", "checkpoint.safetensors", "training.safetensors", "train.csv",
        "record-val.npz", "record-test.npz", "cost.json", "choice.json", "model.onnx", "bench.json", "report.html",
        "tradeoff.png",
    }  # fmt: skip
    assert not [name for name in files if "partial" in name]
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["epochs"] == 3 and config["environment"]["torch"]


def test_the_file_agrees_with_the_test_record(run):
    engine = load(run / "model.onnx", threads=1)
    test = load_data("digits").test
    answer = engine(test.images.numpy().astype(np.float32) / 255)
    outcome = evaluate(ExitRecord.load(run / "record-test.npz"), Policy.from_json(engine.metadata["policy"]))
    share = [(answer.exit == n).mean() for n in (1, 2)]
    np.testing.assert_allclose(share, outcome.exit_share, atol=1.5 / len(test))
    assert (answer.label == test.labels.numpy()).mean() == pytest.approx(outcome.accuracy, abs=1.5 / len(test))


def test_bench_rows_are_complete_and_consistent(run):
    rows = json.loads((run / "rows.json").read_text())
    assert [(row["runtime"], row["batch"]) for row in rows] == [
        (engine, batch) for engine in ("onnxruntime", "openvino") for batch in (1, 7)
    ]
    for row in rows:
        assert list(row) == [
            "network", "runtime", "device", "batch", "threads", "plain_us", "branchy_us", "limit_us",
            "limit_in_order_us", "speedup", "spread", "overhead", "overhead_sorted", "plain_accuracy",
            "accuracy_branchy", "exit_share", "thresholds",
        ]  # fmt: skip
        assert row["speedup"] == pytest.approx(row["plain_us"] / row["branchy_us"])
        assert row["overhead"] == pytest.approx(row["branchy_us"] / row["limit_us"])
        assert sum(row["exit_share"]) == pytest.approx(1)


def test_the_report_is_one_offline_page(run):
    page = (run / "report.html").read_text()
    assert len(page) < 3_000_000
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)
    HTMLParser().feed(page)


def test_training_again_with_the_same_settings_changes_nothing(run, monkeypatch):
    before = (run / "checkpoint.safetensors").read_bytes()
    train = ("train", run, *PAPER, "--warm-start-epochs", 2, "--epochs", 3, "--batch-size", 64, "--quiet")
    assert call(monkeypatch, *train) == 0
    assert (run / "checkpoint.safetensors").read_bytes() == before


def test_stages_are_exported_verified_inspected_and_predict(run, monkeypatch, tmp_path, capsys):
    assert call(monkeypatch, "export", run, "--layout", "stages", "--output", tmp_path / "stages", "--quiet") == 0
    x = load_data("digits").test.images.numpy()[:32].astype(np.float32) / 255
    one, other = load(tmp_path / "stages", threads=1)(x), load(run / "model.onnx", threads=1)(x)
    assert one.exit.tolist() == other.exit.tolist()
    capsys.readouterr()
    assert call(monkeypatch, "verify", tmp_path / "stages") == 0
    assert capsys.readouterr().out.startswith("right: 8 samples")
    assert call(monkeypatch, "inspect", tmp_path / "stages") == 0
    assert "entropy" in capsys.readouterr().out
    save_image((x[0] * 255).astype(np.uint8), tmp_path / "digit.png")
    assert call(monkeypatch, "predict", tmp_path / "stages", tmp_path / "digit.png", "--json") == 0
    assert json.loads(capsys.readouterr().out)["label"] == str(one.label[0])
    assert call(monkeypatch, "export", run, "--layout", "staged") == 1
    assert "layout must be nested or stages; got 'staged'" in capsys.readouterr().err


def test_predict_image_files(run, monkeypatch, tmp_path, capsys):
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
    output = re.sub(r"[^\w./-]", "", capsys.readouterr().out)
    assert "image" in output and "0.png" in output


def test_predict_folders_of_images(run, monkeypatch, tmp_path, capsys):
    test = load_data("digits").test
    for name, image in zip(("b.png", "a/c.png", "a/.hidden.png", "a/b/d.jpg", "e.bmp"), test.images, strict=False):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_image(image.numpy(), tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    assert call(monkeypatch, "predict", run, tmp_path / "e.bmp", tmp_path / "a", tmp_path, "--json") == 0
    answers = [json.loads(line)["image"] for line in capsys.readouterr().out.splitlines()]
    inside = [str(tmp_path / name) for name in ("a/b/d.jpg", "a/c.png")]
    assert answers == [str(tmp_path / "e.bmp"), *inside, str(tmp_path / "b.png")]  # each once


def test_choose_with_promise_and_score(run, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert call(monkeypatch, "choose", copy, "--max-drop", 0.05, "--confidence", 0.9, "--score", "margin") == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "With 90% confidence, accuracy is at most 5.00 points below the last exit's" in output
    choice = Choice.load(copy / "choice.json")
    assert choice.policy.score == "margin" and str(choice.promise) in output
    plain_us = ExitCost.load(copy / "cost-margin.json").plain_us
    assert f"{plain_us / choice.outcome.mean_us:.2f}x the speed of the plain network" in output
    assert call(monkeypatch, "choose", copy, "--max-drop", 0.001) == 1
    assert f"needs at least {2 * samples_needed(0.001, 0.05, 'betting')} samples" in " ".join(
        capsys.readouterr().err.split()
    )
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
    assert abs(np.mean(left == 1) - share) <= 2 / test.samples  # ties may differ


def test_a_report_refuses_the_record_of_another_network(run, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    made = ExitRecord.load(copy / "record-test.npz")
    ExitRecord(made.outputs, made.labels, network=made.network[:-1] + "x").save(copy / "record-test.npz")
    assert call(monkeypatch, "report", copy) == 1
    assert "record-val.npz was not made from the other files" in " ".join(capsys.readouterr().err.split())


def test_inspect_prints_exits_thresholds_and_preprocessing(run, monkeypatch, capsys):
    assert call(monkeypatch, "inspect", run / "model.onnx") == 0
    output = capsys.readouterr().out
    threshold = load(run / "model.onnx").policy.thresholds[0]
    assert f"entropy < {threshold:.6g}" in output and "pixels / 255" in output and "(B, 1, 28, 28)" in output
    assert call(monkeypatch, "inspect", run) == 0
    assert capsys.readouterr().out == output
    assert call(monkeypatch, "inspect", run / "model.onnx", "--json") == 0
    assert json.loads(capsys.readouterr().out)["policy"]["thresholds"] == [threshold]


def test_costs_are_measured_again_when_asked_for(run, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    stored = json.loads((copy / "cost.json").read_text())
    del stored["sha256"]
    (copy / "cost.json").write_text(json.dumps(stored | {"plain_us": 12345.0}))
    choose = ("choose", copy, "--max-drop", 0.02, "--no-promise", "--quiet")
    assert call(monkeypatch, *choose) == 0 and ExitCost.load(copy / "cost.json").plain_us == 12345.0
    assert call(monkeypatch, *choose, "--remeasure") == 0 and ExitCost.load(copy / "cost.json").plain_us != 12345.0


def test_reason_and_next_step_are_printed_if_no_sample_leaves_early(run, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    stored = json.loads((copy / "cost.json").read_text())
    del stored["sha256"]
    branch = [10 * sum(stored["trunk_us"]), 0.0]
    (copy / "cost.json").write_text(json.dumps(stored | {"branch_us": branch, "plain_us": sum(stored["trunk_us"])}))
    assert call(monkeypatch, "choose", copy, "--max-drop", 0.02, "--no-promise") == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "1.00x the speed" in output and f"exit 1 adds {branch[0]:.1f} us" in output and "saves nothing" in output
    assert "branchynet design" in output


def test_a_failing_runtime_does_not_stop_the_others(run, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    timed = json.loads((copy / "bench.json").read_text())["rows"]

    def bench(path, net, data, targets, **_):
        runtime = targets[0].runtime
        if runtime == "openvino":
            raise GraphError("it has no such operator")
        return [row | {"runtime": runtime} for row in timed[: len(targets)]]

    monkeypatch.setattr(steps, "bench", bench)
    arguments = ("bench", copy, "--runtime", "onnxruntime,openvino,onnxruntime-cuda", "--json", tmp_path / "rows.json")
    assert call(monkeypatch, *arguments, "--batch", "1,7", "--quiet") == 1
    output = capsys.readouterr()
    assert output.err == "error: not timed in openvino: it has no such operator\n" and "onnxruntime-cuda" in output.out
    for rows in (
        json.loads((copy / "bench.json").read_text())["rows"],
        json.loads((tmp_path / "rows.json").read_text()),
    ):
        assert [row["runtime"] for row in rows] == ["onnxruntime"] * 2 + ["onnxruntime-cuda"] * 2
    monkeypatch.setattr(steps, "bench", lambda *_, **__: bench(None, None, None, [Target(runtime="openvino")]))
    assert call(monkeypatch, "bench", copy, "--quiet") == 1
    assert capsys.readouterr().err == "error: it has no such operator\n"


def test_a_plain_network_with_fewer_epochs_is_noted(run, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    rows = json.loads((copy / "bench.json").read_text())["rows"]
    monkeypatch.setattr(steps, "bench", lambda *_, about, **given: [rows[0] | about])
    for baseline, output in ((2, "trained for 2 epochs"), (0, "never trained")):
        config["settings"] |= {"plain": False, "warm_start_epochs": baseline}
        (copy / "config.json").write_text(json.dumps(config))
        assert call(monkeypatch, "bench", copy, "--quiet") == 0
        assert output in " ".join(capsys.readouterr().out.split())
    assert json.loads((copy / "bench.json").read_text())["rows"][0]["plain_accuracy"] is None


@pytest.mark.heavy
def test_long_steps_print_progress_unless_quiet(run, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    steps = {
        "measuring": ("choose", copy, "--max-drop", 0.02, "--no-promise", "--remeasure"),
        "exporting": ("export", copy),
        "timing in onnxruntime": ("bench", copy, "--batch", 1),
        "predicting": ("report", copy),
    }
    for output, step in steps.items():
        assert call(monkeypatch, *step) == 0
        assert output in capsys.readouterr().err
        assert call(monkeypatch, *step, "--quiet") == 0
        assert capsys.readouterr().err == ""
