"""Messages of the command line: next steps, errors, and checks before a step starts."""

import json
import re
import shutil

import numpy as np
import pytest

from branchynet import Choice, ExitRecord, choose, evaluate
from branchynet.data import save_image
from branchynet.errors import InputError, counted
from branchynet.policy.exit_cost import ExitCost
from branchynet.policy.limits import Limit
from branchynet.policy.promise import check_size, tightest_limit
from branchynet.policy.risk_tests import halves, samples_needed
from branchynet.runs import steps
from branchynet.runs.run import create_run
from branchynet.runs.settings import Settings
from branchynet.runs.steps import train_run
from helpers.command import call


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one epoch, with costs, so that no test measures them."""
    run = create_run(
        tmp_path_factory.mktemp("words") / "run",
        Settings("b_lenet-published", warm_start_epochs=1, epochs=1, plain=False),
    )
    train_run(run, progress=False)
    ExitCost((20.0, 60.0), (5.0, 0.0), plain_us=80.0).save(run.path / "cost.json")
    return run.path


@pytest.fixture
def run(trained, tmp_path):
    """A copy of that run."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.parametrize("bound", ["betting", "binomial"])
@pytest.mark.parametrize("samples", [20, 101, 300, 1386, 9999, 200_000])
def test_the_tightest_limit_can_be_promised_and_a_smaller_one_cannot(samples, bound):
    size = len(halves(samples)[1])
    limit = tightest_limit(samples, 0.05, bound)
    assert samples_needed(limit, 0.05, bound) <= size and limit <= 0.5
    assert samples_needed(limit * 0.9, 0.05, bound) > size
    assert 1 - tightest_limit(samples, 0.05, bound, absolute=True) == pytest.approx(limit, abs=0.011 * limit)
    for name, least in (("max_drop", limit), ("min_accuracy", tightest_limit(samples, 0.05, bound, absolute=True))):
        check_size(samples, Limit(name, least), 0.05, bound)
        less = 1 - 0.9 * limit if name == "min_accuracy" else 0.9 * limit
        with pytest.raises(InputError, match=f"take {name}={re.escape(f'{least:g}')}, .*confidence=None"):
            check_size(samples, Limit(name, less), 0.05, bound)


def test_too_few_samples_have_no_limit():
    assert tightest_limit(2, 0.05, "betting") is None
    with pytest.raises(InputError, match=r"early: record more, or ask for no promise"):
        check_size(2, Limit("max_drop", 0.1), 0.05, "betting")


@pytest.mark.parametrize(
    ("samples", "message"), [(None, "--max-drop 0.05"), (60, "--no-promise"), (120, "--max-drop 0.1")]
)
def test_the_next_command_after_training_works(run, samples, message, monkeypatch, capsys):
    arguments = (
        "train",
        run,
        "--network",
        "b_lenet-published",
        "--warm-start-epochs",
        1,
        "--epochs",
        1,
        "--no-plain",
        "--quiet",
    )
    if samples:
        whole = ExitRecord.load(run / "record-val.npz")
        monkeypatch.setattr(steps, "record", lambda *_, **__: whole.take(slice(0, samples)))
    assert call(monkeypatch, *arguments) == 0
    (command,) = re.findall("next: branchynet (.*)", capsys.readouterr().out)
    assert command.endswith(message)
    ExitCost((20.0, 60.0), (5.0, 0.0), plain_us=80.0).save(run / "cost.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        assert call(patch, *command.split(), "--quiet") == 0


def test_the_limit_in_an_error_works(run, monkeypatch, capsys):
    for asked in (("--max-drop", 0.005), ("--min-accuracy", 0.999), ("--max-disagreement", 0.001)):
        assert call(monkeypatch, "choose", run, *asked, "--quiet") == 1
        output = capsys.readouterr().err
        option, value = re.search(r"take (--[a-z-]+) ([0-9.]+),", output).groups()
        assert option == asked[0] and "--no-promise" in output
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)
            call(patch, "choose", run, option, value, "--quiet")  # may be infeasible, which this test does not check
        assert "needs at least" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--max-drop", 5),
        ("--max-drop", 0.005),
        ("--max-drop", 0.1, "--max-macs", 5),
        ("--max-latency-us", "nan"),
        ("--confidence", 2),
        ("--max-drop", 0.1, "--score", "entropi"),
    ],
)
def test_refused_arguments_measure_nothing(run, arguments, monkeypatch, capsys):
    (run / "cost.json").unlink()
    monkeypatch.setattr(steps, "measure", lambda *_, **__: pytest.fail("measured"))
    assert call(monkeypatch, "choose", run, *arguments) == 1
    output = capsys.readouterr().err
    assert output.startswith("error: ") and len(output.splitlines()) == 1


def finished(run):
    """The run with a choice and a file."""
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, "choose", run, "--max-drop", 0.5, "--no-promise", "--quiet") == 0
        assert call(patch, "export", run, "--quiet") == 0
    return run / "model.onnx"


VERBS = {
    "predict": lambda run: ("predict", run, run / "none.png"),
    "inspect": lambda run: ("inspect", run),
    "verify": lambda run: ("verify", run),
    "bench": lambda run: ("bench", run, "--quiet"),
}


def test_after_more_epochs_every_verb_refuses_the_old_file(run, monkeypatch, capsys):
    model = finished(run)
    train = ("train", run, "--network", "b_lenet-published", "--warm-start-epochs", 1, "--no-plain", "--quiet")
    assert call(monkeypatch, *train, "--epochs", 1) == 0
    assert "out of date" not in capsys.readouterr().out
    assert call(monkeypatch, *train, "--epochs", 2) == 0
    output = capsys.readouterr().out
    assert "out of date, made with earlier weights: choice.json, model.onnx\n" in output
    for verb, arguments in VERBS.items():
        assert call(monkeypatch, *arguments(run)) == 1, verb
        output = capsys.readouterr().err
        assert "model.onnx was made with other weights" in output, verb
        assert f"`branchynet choose {run}` and `branchynet export {run}` again" in output, verb
    assert call(monkeypatch, "inspect", model) == 0  # the file itself can be inspected
    ExitCost((20.0, 60.0), (5.0, 0.0), plain_us=80.0).save(run / "cost.json")
    assert call(monkeypatch, "choose", run, "--max-drop", 0.5, "--no-promise", "--quiet") == 0
    capsys.readouterr()
    for verb, arguments in VERBS.items():
        assert call(monkeypatch, *arguments(run)) == 1, verb
        output = capsys.readouterr().err
        assert "other weights" in output and f"run `branchynet export {run}` again" in output, verb
    assert call(monkeypatch, "export", run, "--quiet") == 0
    assert call(monkeypatch, "inspect", run) == 0 and call(monkeypatch, "verify", run) == 0


def test_after_another_choice_every_verb_refuses_the_old_thresholds(run, monkeypatch, capsys):
    finished(run)
    ExitCost((20.0, 60.0), (5.0, 0.0), plain_us=80.0).save(run / "cost-margin.json")
    assert call(monkeypatch, "choose", run, "--max-drop", 0.5, "--no-promise", "--score", "margin", "--quiet") == 0
    capsys.readouterr()
    for verb, arguments in VERBS.items():
        assert call(monkeypatch, *arguments(run)) == 1, verb
        assert f"has other thresholds than {run / 'choice.json'}" in capsys.readouterr().err, verb


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_a_missing_file_names_its_command_once(verb, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, verb, tmp_path / "nope.onnx") == 1
    assert capsys.readouterr().err.endswith("nope.onnx; write one with `branchynet export`\n")


@pytest.mark.parametrize(("number", "message"), [(0, "0 epochs"), (1, "1 epoch"), (2, "2 epochs"), (11, "11 epochs")])
def test_singular_and_plural(number, message):
    assert counted(number, "epoch") == message


def test_singular_epoch_in_a_run(tmp_path, monkeypatch, capsys):
    arguments = (
        "train",
        tmp_path / "run",
        "--network",
        "b_lenet-published",
        "--warm-start-epochs",
        1,
        "--epochs",
        1,
        "--no-plain",
    )
    assert call(monkeypatch, *arguments) == 0
    assert "1 epoch of" in (output := capsys.readouterr().err) and "1 epochs" not in output


def test_predict_prints_good_files_and_reports_failed_ones(run, tmp_path, monkeypatch, capsys):
    finished(run)
    files = [tmp_path / f"{n}.png" for n in range(70)]  # more than a batch
    for file in files:
        save_image(np.full((1, 28, 28), 0.5), file)
    bad = [tmp_path / "none.png", tmp_path / "text.png", tmp_path / "cut.png"]
    bad[1].write_text("no image")
    bad[2].write_bytes(files[0].read_bytes()[:40])
    capsys.readouterr()
    given = (bad[0], *files[:30], bad[1], *files[30:], files[0], bad[2], bad[0])
    assert call(monkeypatch, "predict", run, *given, "--json") == 1
    output = capsys.readouterr()
    assert [json.loads(line)["image"] for line in output.out.splitlines()] == [str(file) for file in files]
    assert len(output.err.splitlines()) == 1 and all(output.err.count(f"image {file}") == 1 for file in bad)
    assert call(monkeypatch, "predict", run, bad[0], files[3]) == 1
    output = capsys.readouterr()
    assert "3.png" in output.out and "none.png" in output.err
    assert call(monkeypatch, "predict", run, bad[0]) == 1
    assert capsys.readouterr().out == ""


def test_bench_prints_last_exit_promise_and_unsteady_times(run, monkeypatch, capsys):
    row = {
        "network": "b_lenet", "runtime": "onnxruntime", "batch": 1, "threads": 1, "plain_us": 80.0, "branchy_us": 50.0,
        "limit_us": 40.0, "speedup": 1.6, "overhead": 1.25, "plain_accuracy": 0.99, "accuracy_branchy": 0.9,
        "exit_share": [0.5, 0.5], "thresholds": [0.1],
    }  # fmt: skip
    test = ExitRecord.load(run / "record-test.npz")
    assert call(monkeypatch, "choose", run, "--max-drop", 0.4, "--quiet") == 0
    assert call(monkeypatch, "export", run, "--quiet") == 0
    outcome = evaluate(test, Choice.load(run / "choice.json").policy)
    for spread, steady in ((None, True), (0.02, True), (0.2, False)):
        monkeypatch.setattr(steps, "bench", lambda *_, spread=spread, **__: [row | {"spread": spread}])
        capsys.readouterr()
        assert call(monkeypatch, "bench", run, "--batch", "1", "--quiet") == 0
        output = capsys.readouterr().out
        assert ("not steady" in output) != steady
        assert f"the last exit alone {outcome.last_accuracy:.2%}" in output
        assert (
            "promised relative to the last exit" in output
            and f"{outcome.last_accuracy - outcome.accuracy:+.2%}" in output
        )
    assert call(monkeypatch, "choose", run, "--max-drop", 0.4, "--no-promise", "--quiet") == 0
    assert call(monkeypatch, "export", run, "--quiet") == 0
    capsys.readouterr()
    assert call(monkeypatch, "bench", run, "--batch", "1", "--quiet") == 0
    assert "promised" not in capsys.readouterr().out


@pytest.mark.filterwarnings("always")
def test_choose_shows_its_own_warning_as_one_line(run, monkeypatch, capsys):
    assert call(monkeypatch, "choose", run, "--max-drop", 0.4, "--quiet") == 0
    lines = capsys.readouterr().err.splitlines()
    assert "warning: --max-drop 0.4 allows 40 points: it is a fraction; for 0.4 points give 0.004" in lines
    assert not [line for line in lines if not line.startswith("warning: ") or "UserWarning" in line]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("export", "--free", 8),
            "--free must be batch or none; got '8': a file with a free batch reads batches of any",
        ),
        (("export", "--free", "all"), "--free must be batch or none; got 'all'"),
        (("export", "--thresholds", "inputs"), "--thresholds must be default or input; got 'inputs'"),
        (("bench", "--batch", "0"), "--batch must be at least 1; got 0"),
        (("bench", "--threads", "1,0"), "--threads must be at least 1; got 0"),
        (("bench", "--runtime", "tvm"), "unknown runtime 'tvm'"),
        (("design", "--batch", 0), "--batch must be at least 1; got 0"),
        (("design", "--epochs", 0), "--epochs must be at least 1 and --final-epochs 0; got 0 and 0"),
        (("design", "--final-epochs", -1), "--epochs must be at least 1 and --final-epochs 0; got 3 and -1"),
    ],
)
def test_a_value_out_of_range_is_refused_before_any_work(arguments, message, run, monkeypatch, capsys):
    Choice.save(choose(ExitRecord.load(run / "record-val.npz"), max_drop=0.5, confidence=None), run / "choice.json")
    for place in ("steps.load_run", "steps.data_of", "design.data_of", "design.advise"):
        monkeypatch.setattr(f"branchynet.runs.{place}", lambda *_, **__: pytest.fail("worked"))
    verb, *options = arguments
    assert call(monkeypatch, verb, run, *options, "--quiet") == 1
    assert f"error: {message}" in capsys.readouterr().err
