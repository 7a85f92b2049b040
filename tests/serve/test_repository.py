"""Which models a folder holds, what is refused, and what lies beside a model: policies, choices, costs and records."""

import asyncio
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from branchynet import Choice, ExitCost, ExitRecord, Policy, choose, export, load
from branchynet.errors import FileError, InputError
from branchynet.serve.faults import NotReady, StoppedError, UnknownModel
from branchynet.serve.metrics import Metrics
from branchynet.serve.oip import Options
from branchynet.serve.presets import read_presets, write_presets
from branchynet.serve.repository import Repository
from branchynet.serve.settings import ServeSettings, read_key, read_settings
from helpers.serving import POLICY, network, pictures


@pytest.fixture
def folder(models, tmp_path):
    return shutil.copytree(models, tmp_path / "repository")


@pytest.fixture
def opened():
    """Open repositories, and stop them at the end."""
    found = []

    def open_all(path, **settings):
        repository = Repository(Path(path), ServeSettings(**settings), Metrics())
        found.append(repository)
        repository.load_all()
        return repository

    yield open_all
    for repository in found:
        repository.close()


def states(repository):
    return {one["name"]: one["reason"] or one["state"] for one in repository.index()}


def answer(repository, name, x, options=None):
    return asyncio.run(repository.ready(name).infer({"input": x}, options or Options())).outputs


def test_a_damaged_model_says_why_and_the_others_serve(folder, opened):
    (folder / "nested.onnx").write_bytes((folder / "nested.onnx").read_bytes()[:-500])
    (folder / "staged" / "stage_2.onnx").unlink()
    (folder / "text.onnx").write_text("no model")
    repository = opened(folder)
    found = states(repository)
    assert found["adaptive"] == found["other"] == "READY" and repository.any_ready()
    assert "nested.onnx is not an ONNX file" in found["nested"]
    assert "stage 2 of" in found["staged"] and "is missing" in found["staged"]
    assert "text.onnx" in found["text"]
    with pytest.raises(NotReady, match="the model 'staged' is not ready: stage 2 of"):
        repository.ready("staged")
    assert answer(repository, "adaptive", pictures(2))["exit"].shape == (2,)


def test_files_outside_of_the_folder_are_refused(folder, models, opened):
    (folder / "nested.onnx").unlink()
    (folder / "nested.onnx").symlink_to(models / "nested.onnx")
    (folder / "staged" / "stage_1.onnx").unlink()
    (folder / "staged" / "stage_1.onnx").symlink_to(models / "staged" / "stage_1.onnx")
    (folder / "away").symlink_to(models / "staged", target_is_directory=True)
    (folder / "again.onnx").symlink_to(folder / "adaptive.onnx")
    found = states(opened(folder))
    for name in ("nested", "staged", "away"):
        assert f"leads out of {folder.resolve()}, and is not served" in found[name]
    assert found["again"] == found["adaptive"] == "READY"


@pytest.mark.parametrize("name", ["", ".", "..", "../repository", "/etc/passwd", "nested.onnx", "a\0b", "x" * 5000])
def test_only_names_of_the_folder_are_models(folder, opened, name):
    repository = opened(folder)
    for use in (repository.ready, repository.load, repository.unload):
        with pytest.raises(UnknownModel, match="there is no model") as error:
            use(name)
        assert len(str(error.value)) < 300


@pytest.mark.parametrize("layout", ["nested", "stages"])
def test_a_threshold_for_an_exit_that_was_left_out_is_refused(tmp_path, opened, layout):
    example = torch.from_numpy(pictures(2))
    path = tmp_path / ("net.onnx" if layout == "nested" else "net")
    export(network(), path, policy=Policy("entropy", (None, 0.9)), example=example, layout=layout)
    repository, x = opened(path), pictures(20)
    for given in ((0.5, 0.9), (0.5, None)):
        with pytest.raises(InputError, match="exit 1 was left out of this file"):
            answer(repository, "net", x, Options(thresholds=given))
    wanted = load(path)(x, thresholds=[None, 0.5])
    np.testing.assert_array_equal(answer(repository, "net", x, Options(thresholds=(None, 0.5)))["exit"], wanted.exit)
    write_presets(tmp_path / ("net.policies.json" if layout == "nested" else "net/policies.json"), {"a": POLICY})
    with pytest.raises(FileError, match=r"'a' in .*exit 1 was left out of the model"):
        repository.load("net")


def test_hidden_files_and_others_are_no_models(folder, opened):
    (folder / ".hidden.onnx").write_bytes(b"")
    (folder / "notes.txt").write_text("")
    (folder / "empty").mkdir()
    assert set(opened(folder).names) == {"adaptive", "fixed", "nested", "other", "staged"}


def test_a_folder_without_models_is_an_error(tmp_path):
    with pytest.raises(FileError, match="holds no models"):
        Repository(tmp_path, ServeSettings(), Metrics())
    with pytest.raises(FileError, match="there is no model"):
        Repository(tmp_path / "none", ServeSettings(), Metrics())


def test_a_file_that_replaces_another_serves_after_a_load(folder, opened):
    repository = opened(folder)
    x = pictures(1)
    before = repository.ready("nested")
    shutil.copy(folder / "other.onnx", folder / "new")
    (folder / "new").replace(folder / "nested.onnx")
    assert answer(repository, "nested", x)["exit"].shape == (1,)  # the files that were opened
    repository.load("nested")
    assert repository.ready("nested").metadata["platform"] == "onnxruntime_onnx"
    with pytest.raises(StoppedError):
        asyncio.run(before.infer({"input": x}, Options()))
    (folder / "nested.onnx").write_text("broken")
    with pytest.raises(FileError, match="the earlier files are still served"):
        repository.load("nested")
    assert repository.ready("nested").metadata["platform"] == "onnxruntime_onnx"


def test_a_run_serves_its_stages_and_else_its_file(folder, opened, tmp_path):
    run = tmp_path / "mine"
    run.mkdir()
    shutil.copy(folder / "nested.onnx", run / "model.onnx")
    repository = opened(run)
    assert repository.names == ["mine"] and repository.ready("mine").metadata["platform"] == "branchynet_onnx"
    assert opened(run / "model.onnx").names == ["mine"]
    shutil.copytree(folder / "staged", run / "stages")
    assert opened(run).ready("mine").metadata["platform"] == "branchynet_stages"
    assert opened(run / "stages").names == ["mine"]
    assert opened(folder / "nested.onnx").names == ["nested"]


def record_and_cost(seed=0, samples=400):
    """A record of scores at three exits, of the score of the models; deeper exits are surer and better."""
    rng = np.random.default_rng(seed)
    scores = rng.random((samples, 3)) * [1.4, 1.2, 1.0]
    losses = (rng.random((samples, 3)) < [0.3, 0.2, 0.1]).astype(float)
    return ExitRecord.from_scores(scores, losses, "entropy"), ExitCost((10.0, 20.0, 30.0), (1.0, 1.0, 0.0))


def test_thresholds_that_changed_after_the_export_are_noticed(folder, opened):
    choice = choose(*record_and_cost(), max_drop=0.2, confidence=None)
    choice.save(folder / "staged" / "choice.json")
    found = states(opened(folder))
    assert "other thresholds than" in found["staged"] and "export it again" in found["staged"]
    assert found["nested"] == "READY"


@pytest.fixture
def engine(models):
    return load(models / "staged")


def test_policies_are_read_as_they_were_written(tmp_path, engine):
    record, cost = record_and_cost()
    choice = choose(record, cost, max_drop=0.2)
    assert choice.promise is not None
    write_presets(tmp_path / "policies.json", {"fast": choice, "own": POLICY})
    found = read_presets(tmp_path / "policies.json", engine)
    assert found["fast"].choice == choice and found["fast"].policy == choice.policy
    assert found["fast"].promise == str(choice.promise)
    assert found["own"].policy == POLICY and found["own"].promise is None
    assert read_presets(tmp_path / "none.json", engine) == {}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": POLICY.to_json() | {"thresholds": [0.1]}}, "'a' .*1 thresholds given for 3 exits"),
        (
            {"a": POLICY.to_json() | {"score": "margin"}},
            "'a' .*its score is 'margin', but the score of the model is 'entropy'",
        ),
        ({"a": {"score": "entropy"}}, "'a' .*must have a score and a list"),
        ({"a": 7}, "'a' .*it is int, not an object"),
        ([1], "holds no named policies"),
    ],
)
def test_policies_that_do_not_fit_are_refused(tmp_path, engine, value, message):
    (tmp_path / "policies.json").write_text(json.dumps(value))
    with pytest.raises(FileError, match=message):
        read_presets(tmp_path / "policies.json", engine)


def test_an_edited_promise_is_noticed_and_the_model_is_not_ready(folder, opened):
    path = folder / "staged" / "policies.json"
    write_presets(path, {"fast": choose(*record_and_cost(), max_drop=0.2)})
    path.write_text(path.read_text().replace('"max_drop": 0.2', '"max_drop": 0.1'))
    assert "is damaged or was edited" in states(opened(folder))["staged"]


def test_what_is_no_policy_is_not_written(tmp_path):
    with pytest.raises(InputError, match="the policy 'a' must be a Policy or a Choice"):
        write_presets(tmp_path / "policies.json", {"a": (0.5,)})
    with pytest.raises(InputError, match="must be text"):
        write_presets(tmp_path / "policies.json", {"": POLICY})


def test_an_expected_time_bounds_the_batches(folder, opened):
    record_and_cost()[1].save(folder / "staged" / "cost.json")
    found = opened(folder, batch_us=100.0, max_batch=64).ready("staged").runner
    assert [queue.limit.rows for queue in found._scheduler._queues] == [9, 4, 3]  # 11, 21 and 30 us per sample
    ExitCost((10.0,), (1.0,)).save(folder / "staged" / "cost.json")
    assert "has 1 exits, but the model has 3" in states(opened(folder))["staged"]


def test_drift_raises_the_gauge(folder, opened):
    record = record_and_cost(samples=2000)[0]
    record.save(folder / "staged" / "record.npz")
    repository = opened(folder)
    watch = repository.ready("staged").watch
    assert watch is not None and repository.ready("nested").watch is None
    assert ("branchynet_drift_alarm", 0.0) in {(name, value) for name, _, _, value in repository._gauges()}
    rows = 400
    watch.add({"exit": np.full(rows, 3), "score": np.full(rows, 0.9, np.float32), "label": np.zeros(rows, np.int64)})
    watch.update()
    assert ("branchynet_drift_alarm", 1.0) in {(name, value) for name, _, _, value in repository._gauges()}


def test_thresholds_follow_the_cost_and_do_not_pass_the_promise(folder, opened):
    record, cost = record_and_cost(samples=4000)
    bound = choose(record, cost, max_drop=0.2)
    assert isinstance(bound, Choice) and all(t is not None for t in bound.policy.thresholds)
    write_presets(folder / "staged" / "policies.json", {"fast": bound})
    record.save(folder / "staged" / "record.npz")
    cost.save(folder / "staged" / "cost.json")
    repository = opened(folder / "staged", budget_us=30.0, budget_limit="fast")
    moving = repository.ready("staged").moving
    assert moving is not None and repository.ready("staged").watch is None  # it would need fixed thresholds
    start = moving.thresholds
    for exit, turns in ((3, 300), (1, 300), (3, 300)):  # all too dear, all cheap, all too dear
        for _ in range(turns):
            moving.add({"exit": np.full(64, exit)})
            assert all(t <= most for t, most in zip(moving.thresholds, bound.policy.thresholds, strict=True))
        last = moving.thresholds
        if exit == 3:
            assert last == bound.policy.thresholds
        else:
            assert all(t < s for t, s in zip(last, start, strict=True))
    x = pictures(40)
    found = answer(repository, "staged", x)
    np.testing.assert_array_equal(found["exit"], load(folder / "staged")(x, thresholds=list(last)).exit)


@pytest.mark.parametrize(
    ("presets", "message"),
    [
        ({}, "budget_limit='fast' is not a policy of the model"),
        ({"fast": Policy("entropy", (1.0, 1.0))}, "budget_limit='fast' has no promise"),
    ],
)
def test_a_budget_needs_a_promise(folder, opened, presets, message):
    write_presets(folder / "staged" / "policies.json", presets)
    assert message in states(opened(folder, budget_us=30.0, budget_limit="fast"))["staged"]


def test_settings_come_from_a_file_and_the_call(tmp_path):
    (tmp_path / "serve.toml").write_text('queue = 7\nhost = "::1"\nmax_wait_ms = 2\n')
    found = read_settings(tmp_path / "serve.toml", host=None, queue=9)
    assert (found.queue, found.host, found.max_wait_ms, found.port) == (9, "::1", 2.0, 8000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("queue = ", "is not valid TOML"),
        ("que = 1", "'que', which is unknown; did you mean 'queue'"),
        ('queue = "7"', "queue is '7', not int"),
        ("queue = 0", "queue must be at least 1; got 0"),
        ('runtime = "tensorrt"', "runtime is 'tensorrt'"),
        ("max_wait_ms = -1", "max_wait_ms must be 0 to 30000"),
        ("timeout_s = 1e9", "timeout_s must be at most 86400"),
        ("budget_us = 3.0", "give budget_us and budget_limit together"),
        ('certificate = "c.pem"', "give certificate and private_key together"),
    ],
)
def test_wrong_settings_are_said(tmp_path, text, message):
    (tmp_path / "serve.toml").write_text(text)
    with pytest.raises(FileError, match=message):
        read_settings(tmp_path / "serve.toml")


def test_a_key_must_be_long_and_plain(tmp_path):
    (tmp_path / "key").write_text("0123456789abcdef\nnotes\n")
    assert read_key(tmp_path / "key") == "0123456789abcdef"
    for wrong in (b"short", b"", "ö" * 20, b"\xff" * 20):
        (tmp_path / "key").write_bytes(wrong if isinstance(wrong, bytes) else wrong.encode())
        with pytest.raises(FileError, match="API key"):
            read_key(tmp_path / "key")
