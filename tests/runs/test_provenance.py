"""The files of a run hold their provenance, and mixed files are refused."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from branchynet import Choice, ExitRecord, load
from branchynet.data import load_data
from branchynet.errors import DataError, FileError, InputError
from branchynet.policy.exit_cost import ExitCost
from branchynet.policy.risk_tests import halves
from branchynet.policy.sample_digests import share_samples
from branchynet.runs.design import design_run
from branchynet.runs.provenance import check_data, check_report
from branchynet.runs.report import report_run
from branchynet.runs.run import create_run, open_run
from branchynet.runs.settings import Settings
from branchynet.runs.steps import bench_run, choose_run, export_run, train_run


def trained(folder, **settings):
    run = create_run(
        folder, Settings("b_lenet-published", warm_start_epochs=1, epochs=1, plain=False, augment="none", **settings)
    )
    train_run(run, progress=False)
    return run


def pictures(folder, count=40, seed=0):
    rng = np.random.default_rng(seed)
    for name in ("ant", "bee"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (28, 28), dtype=np.uint8)).save(folder / name / f"{i:03}.png")
    return f"folder:{folder}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs on digits with two seeds; the first has all files of a report except timings."""
    base = tmp_path_factory.mktemp("runs")
    one, other = trained(base / "one"), trained(base / "other", seed=1)
    cost = ExitCost((20.0, 60.0), (5.0, 0.0), plain_us=80.0)  # no test measures costs
    for run in (one, other):
        cost.save(run.path / "cost.json")
        choose_run(run, max_drop=0.5)
    export_run(one)
    return one, other


@pytest.fixture
def run(made, tmp_path):
    """A copy of the first run."""
    shutil.copytree(made[0].path, tmp_path / "run")
    return create_run(tmp_path / "run", made[0].settings)


def timed(run):
    """Write ``bench.json`` as `bench_run` does, without timing."""
    from branchynet.runs.provenance import keep_bench

    keep_bench(run.path, [])


@pytest.mark.parametrize(
    ("files", "verb", "message"),
    [
        (["choice.json"], export_run, r"choice\.json was chosen for other weights .* run `branchynet choose .*run`"),
        (["checkpoint.safetensors"], export_run, "chosen for other weights .* run `branchynet train .*run` again"),
        (["checkpoint.safetensors", "record-val.npz"], export_run, "other weights .* run `branchynet choose .*run`"),
        (["choice.json"], report_run, r"choice\.json was not made from the other files .* `branchynet choose"),
        (["record-val.npz"], report_run, r"record-val\.npz was not made from .* run `branchynet train"),
        (["record-val.npz", "record-test.npz"], report_run, r"choice\.json was not made from .* `branchynet choose"),
        (
            ["record-val.npz", "record-test.npz", "choice.json"],
            report_run,
            r"model\.onnx was not .* `branchynet export",
        ),
    ],
)
def test_files_of_another_run_are_refused_with_the_step_that_recreates_them(run, made, files, verb, message):
    for name in files:
        shutil.copy(made[1].path / name, run.path / name)
    with pytest.raises((FileError, InputError), match=message):
        verb(run)


def test_a_report_does_not_mix_an_old_file_or_old_timings_with_a_new_choice(run):
    timed(run)
    report_run(run)
    choose_run(run, max_drop=0.5, score="margin")
    with pytest.raises(FileError, match=r"model\.onnx was not made from the other files.*`branchynet export"):
        report_run(run)
    export_run(run)
    with pytest.raises(FileError, match=r"bench\.json was not made from the other files.*`branchynet bench"):
        report_run(run)
    timed(run)
    report_run(run)
    stored = json.loads((run.path / "bench.json").read_text())
    del stored["model"]  # as earlier versions wrote it
    (run.path / "bench.json").write_text(json.dumps(stored))
    with pytest.raises(FileError, match=r"bench\.json was not made"):
        report_run(run)


def test_rows_with_other_columns_are_refused_with_the_bench_command(run):
    from branchynet.runs.provenance import keep_bench

    old = {"network": "n", "engine": "onnxruntime", "batch": 1, "threads": 1, "static_us": 2.0, "branchy_us": 1.0}
    keep_bench(run.path, [old])
    with pytest.raises(FileError, match=r"has rows without .*plain_us, runtime.*; run `branchynet bench .*run` again"):
        report_run(run)


def test_a_choice_on_another_record_differs_despite_equal_thresholds(run):
    choice, engine = Choice.load(run.path / "choice.json"), load(run.path / "model.onnx")
    val, test = (ExitRecord.load(run.path / f"record-{part}.npz") for part in ("val", "test"))
    check_report(run.path, choice, val, test, engine)
    other = Choice(choice.policy, choice.constraint, choice.outcome, "0" * 64, choice.promise, choice.network)
    with pytest.raises(FileError, match=r"model\.onnx was not made"):
        check_report(run.path, other, val, test, engine)


def test_files_without_digests_are_accepted(run):
    """Earlier versions wrote no digests."""
    for name in ("val", "test"):
        path = run.path / f"record-{name}.npz"
        old = ExitRecord.load(path)
        ExitRecord(old.outputs, old.labels).save(path)
    stored = json.loads((run.path / "choice.json").read_text())
    (run.path / "choice.json").write_text(
        json.dumps({k: v for k, v in stored.items() if k not in ("samples", "network", "sha256")})
    )
    (run.path / "data.json").unlink()
    export_run(run)
    report_run(run)
    train_run(run, progress=False)
    assert ExitRecord.load(run.path / "record-val.npz").inputs is not None and (run.path / "data.json").exists()


def test_a_learned_choice_holds_the_samples_that_fitted_its_score(run):
    ExitCost((20.0, 60.0), (5.0, 0.0)).save(run.path / "cost-learned.json")
    val = ExitRecord.load(run.path / "record-val.npz")
    tuning, rest = halves(val.samples)
    for confidence in (0.95, None):
        choice = choose_run(run, score="learned", max_drop=0.5, confidence=confidence)
        fitted = Choice.load(run.path / "choice.json").policy.score.fitted_on
        assert share_samples(fitted, val.inputs[tuning]) and not share_samples(fitted, val.inputs[rest])
        assert (choice.record_digest == val.digest) == (confidence is not None)
        assert share_samples(choice.samples, val.inputs[rest])


def test_added_images_are_refused_and_never_move_from_training_to_test(tmp_path):
    name = pictures(tmp_path / "images")
    run = trained(tmp_path / "run", data=name)
    ExitCost((20.0, 60.0), (5.0, 0.0)).save(run.path / "cost.json")
    choose_run(run, max_drop=0.9, confidence=None)
    export_run(run)
    before = load_data(name)
    seen = {image.numpy().tobytes() for image in before.train.images}
    rng, wanted = np.random.default_rng(1), {"train", "test"}
    while wanted:
        path = tmp_path / "images" / "ant" / "new.png"
        Image.fromarray(rng.integers(0, 255, (28, 28), dtype=np.uint8)).save(path)
        after = load_data(name)
        assert not any(image.numpy().tobytes() in seen for image in after.test.images)
        grown = next(
            part for part in ("train", "val", "test") if len(getattr(after, part)) > len(getattr(before, part))
        )
        check_data(run.path, after, [part for part in ("train", "val", "test") if part != grown])
        with pytest.raises(DataError, match=f"the {grown} images of folder:.* are not those that .*run was made with"):
            train_run(run, progress=False)
        if grown == "test" and grown in wanted:
            for verb in (report_run, lambda run: bench_run(run, batches=(1,), threads=(1,), progress=False)):
                with pytest.raises(DataError, match=r"the test images of folder:.* train again into a new folder"):
                    verb(run)
        wanted -= {grown}
    path.unlink()
    train_run(run, progress=False)
    (run.path / "data.json").unlink()  # as in earlier versions, which split in another way
    for verb in (report_run, lambda run: train_run(run, progress=False)):
        with pytest.raises(DataError, match=r"has no data\.json: its images were split in another way"):
            verb(run)


def test_advice_on_other_weights_or_on_all_samples_is_refused(run, monkeypatch):
    folder = run.path / "design-1"
    folder.mkdir()
    options = {"threads": 1, "max_drop": 0.0, "exits": 4, "epochs": 3, "final_epochs": 0}
    (folder / "asked.json").write_text(json.dumps(options))
    design = {"taps": [], "branches": [], "thresholds": [], "us": 1.0, "interval_us": [1.0, 1.0], "accuracy": 0.9,
              "exit_share": [1.0], "trunk_us": [1.0], "branch_us": [0.0], "break_even": [],
              "oracle_us": 1.0}  # fmt: skip
    advice = {"batch_size": 1, "threads": 1, "score": "entropy", "plain_us": 1.0, "accuracy": 0.9, "min_accuracy": 0.9,
              "samples": 100, "designs": [design], "tried": [], "best": 0, "fingerprint": "other"}  # fmt: skip
    old = {"static_us" if k == "plain_us" else k: v for k, v in advice.items()}
    (folder / "advice.json").write_text(json.dumps(old))
    with pytest.raises(FileError, match=r"lacks plain_us\); make it with advise\(.*\), after removing .*design-1"):
        design_run(run, progress=False)
    (folder / "advice.json").write_text(json.dumps(advice))
    with pytest.raises(
        FileError, match=r"advice\.json is advice on other weights than those of .*; remove .*candidates"
    ):
        design_run(run, progress=False)
    shutil.copy(folder / "advice.json", run.path / "advice.json")  # the folder of a design is a run folder
    with pytest.raises(FileError, match=r"does not name the samples that selected the design.*--no-promise"):
        choose_run(run, max_drop=0.5)
    assert choose_run(run, max_drop=0.5, confidence=None).promise is None
    assert choose_run(run, max_latency_us=1e6).promise is None
    advice["selected_on"] = "0" * 16
    (run.path / "advice.json").write_text(json.dumps(advice))
    assert choose_run(run, max_drop=0.5).promise is not None


def test_a_run_of_an_earlier_version_is_refused_with_the_command_that_recreates_it(run):
    config = json.loads((run.path / "config.json").read_text())
    config["settings"]["static"] = config["settings"].pop("plain")
    (run.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        FileError, match=r"'static', which is unknown\); make it with `branchynet train .*run` after you"
    ):
        open_run(run.path)
