"""Errors of the command line: one line each, in terms of its options."""

import re
import subprocess
import sys

import onnx
import pytest
from onnx import TensorProto, helper

from helpers.command import PAPER, call


def foreign(path):
    graph = helper.make_graph(
        [helper.make_node("Identity", ["a"], ["b"])],
        "g",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [1])],
    )
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)]), path)


MISTAKES = {
    "too many weights for two exits": (
        ["train", "{tmp}/new", *PAPER, "--loss-weights", "1,1,1", "--quiet"],
        "3 for 2 exits",
    ),
    "a negative weight": (["train", "{tmp}/new", *PAPER, "--loss-weights", "1,-1"], "not negative"),
    "a step size of nothing": (["train", "{tmp}/new", "--lr", "0"], "lr must"),
    "no images a step": (["train", "{tmp}/new", "--batch-size", "0"], "--batch-size must be at least 1"),
    "epochs below nothing": (["train", "{tmp}/new", "--warm-start-epochs", "-1"], "--warm-start-epochs"),
    "distilled backwards": (["train", "{tmp}/new", "--distill", "nan"], "distill"),
    "unknown precision": (["train", "{tmp}/new", "--mixed-precision", "bf61"], "bf16"),
    "a promise that takes more samples": (["choose", "{run}", "--max-drop", "0.001"], "--no-promise"),
    "a confidence beyond 1": (["choose", "{run}", "--confidence", "2"], "--no-promise"),
    "no batch": (["bench", "{run}", "--batch", ""], "one batch size"),
    "a folder without images": (["predict", "{run}", "{tmp}/empty"], "empty"),
    "a folder without a file": (["inspect", "{tmp}/empty"], "branchynet export"),
    "lists of nothing": (["bench", "{run}", "--threads", "1,"], "not a list of numbers"),
    "weights of nothing": (["train", "{tmp}/new", "--loss-weights", ","], "not a list of numbers"),
    "a seed beyond all": (["train", "{tmp}/new", "--seed", "99999999999999999999"], "seed must be at most"),
    "a seed whose next is beyond": (["train", "{tmp}/new", "--seed", "4294967295"], "seed must be at most"),
    "half precision without a GPU": (["train", "{tmp}/new", "--mixed-precision", "fp16"], "GPU"),
    "a run without a name": (["train", ""], "empty path"),
    "a run to choose without a name": (["choose", ""], "empty path"),
    "a file without a name": (["inspect", ""], "empty path"),
    "an image without a name": (["predict", "{run}", ""], "empty path"),
    "an output without a name": (["export", "{run}", "--output", ""], "empty path"),
    "rows without a name": (["bench", "{run}", "--json", ""], "empty path"),
    "a file to train in": (["train", "{run}/config.json"], "config.json is a file, not a folder"),
    "a file to choose in": (["choose", "{run}/model.onnx"], "model.onnx is a file, not a folder"),
    "a folder in a file": (["train", "{run}/config.json/new", "--quiet"], "config.json is a file, not a folder"),
    "settings to verify": (["verify", "{run}/config.json"], "config.json"),
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
    "not numbers": (["bench", "{run}", "--batch", "one"], "one"),
    "batch too large": (["bench", "{run}", "--batch", "100000", "--quiet"], "100000"),
    "unknown runtime": (["bench", "{run}", "--runtime", "tvm", "--quiet"], "openvino"),
    "other settings": (["train", "{run}", *PAPER, "--epochs", "4"], "epochs"),
    "infeasible": (["choose", "{run}", "--min-accuracy", "1.5"], "1.5"),
    "a drop of one per cent": (["choose", "{run}", "--max-drop", "1"], "--max-drop 1 limits nothing"),
    "a drop in percent that is everything": (["choose", "{run}", "--max-drop", "100%"], "limits nothing"),
    "a design that may lose everything": (["design", "{run}", "--max-drop", "1"], "--max-drop 1 limits nothing"),
    "two limits": (["choose", "{run}", "--min-accuracy", "0.5", "--max-drop", "0"], "--max-drop"),
    "foreign onnx": (["inspect", "{tmp}/foreign.onnx"], "BranchyNet"),
    "truncated onnx": (["inspect", "{tmp}/truncated.onnx"], "truncated.onnx"),
    "no onnx": (["inspect", "{tmp}/none.onnx"], "none.onnx"),
    "no image": (["predict", "{run}", "{tmp}/none.png"], "none.png"),
    "text as image": (["predict", "{run}", "{tmp}/text.png"], "text.png"),
    "truncated record": (["choose", "{tmp}/broken"], "record-val.npz"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_error_is_one_line(mistake, run, monkeypatch, tmp_path, capsys):
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
    output = capsys.readouterr().err
    assert status == 1
    output = "".join(
        line for line in output.splitlines(keepends=True) if not line.startswith(("measuring", "exporting"))
    )
    assert output.startswith("error: ") and expected in output and "Traceback" not in output
    assert len(output.strip().splitlines()) == 1
    words = output.replace(str(tmp_path), "").replace(str(run), "")
    assert not re.search(r"\w=|\bNone\b|\(\.\.\.\)|\b(max|min|batch|warm|mixed)_", words), "advice in Python"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("wrong", ["none", "None", "high", "95%"])
def test_a_confidence_that_is_no_number_names_the_option_without_one(wrong, run, monkeypatch, capsys):
    before = (run / "choice.json").read_bytes()
    assert call(monkeypatch, "choose", run, "--confidence", wrong) != 0
    told = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert f"'{wrong}' is not a number; give one such as 0.95, or --no-promise" in told and "Traceback" not in told
    assert (run / "choice.json").read_bytes() == before


def test_a_score_without_a_name_is_refused(run, monkeypatch, capsys):
    assert call(monkeypatch, "choose", run, "--score", "", "--no-promise") == 1
    assert (
        "unknown score '': it is one of entropy, max_probability, margin, patience, agreement, learned"
        in capsys.readouterr().err
    )


def test_wrong_usage_has_status_2_also_in_a_process(run):
    command = [sys.executable, "-m", "branchynet"]
    wrong = subprocess.run([*command, "chose"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "No such command" in wrong.stderr
    missing = subprocess.run([*command, "inspect", str(run / "none.onnx")], capture_output=True, text=True)
    assert missing.returncode == 1 and missing.stderr.startswith("error: ")
