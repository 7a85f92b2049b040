"""Bench: its arithmetic on given times, and its accuracies and exit shares against the file."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from branchynet import BranchyNet, Target, averaged, export, zoo
from branchynet.deploy.assembly import assemble
from branchynet.errors import FileError, InputError
from branchynet.graph.onnx_flat import FlatGraph, flatten
from branchynet.policy.evaluation import evaluate
from branchynet.policy.exit_record import ExitRecord
from branchynet.policy.record_scores import scores_of_record
from branchynet.policy.scores import entropy
from branchynet.policy.values import Policy
from branchynet.profiling import benchmark as module
from branchynet.profiling import onnx_parts
from branchynet.profiling.benchmark import _time, bench
from branchynet.profiling.onnx_parts import OnnxParts
from helpers.onnx_graphs import flat_lenet

KEYS = {
    "network", "runtime", "device", "batch", "threads", "plain_us", "branchy_us", "limit_us", "limit_in_order_us",
    "speedup", "spread", "overhead", "overhead_sorted", "plain_accuracy", "accuracy_branchy", "exit_share",
    "thresholds",
}  # fmt: skip
SAMPLES = 70


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(SAMPLES, 1, 28, 28, generator=generator) * torch.rand(SAMPLES, 1, 1, 1, generator=generator) * 9
    return images, torch.randint(10, (SAMPLES,), generator=generator)


@pytest.fixture(scope="module")
def record(data):
    net, _ = flat_lenet()
    with torch.no_grad():
        outputs = torch.stack(net.eval()(data[0]), dim=1).numpy()
    return ExitRecord(outputs=outputs, labels=data[1].numpy())


@pytest.fixture(scope="module")
def policy(record):
    """Half of the samples leave early, and none so near to the threshold that engines might disagree."""
    scores = np.sort(scores_of_record(record)[:, 0])
    gaps = np.diff(scores[20:50])
    widest = 20 + int(gaps.argmax())
    assert gaps.max() > 1e-4
    return Policy(thresholds=(float(scores[widest : widest + 2].mean()),))


@pytest.fixture(autouse=True)
def cached(monkeypatch):
    """The export of B-LeNet is at hand."""
    net, flat = flat_lenet()
    real = onnx_parts.flatten

    def flatten(given, example, *, score=None, dynamic):
        if given is not net or not dynamic:
            return real(given, example, score=score, dynamic=dynamic)
        assert score is entropy and example[0].shape == (2, 1, 28, 28)
        return flat

    monkeypatch.setattr(onnx_parts, "flatten", flatten)


def write(folder, policy, name="model", flat=None, **options):
    path = folder / f"{name}.onnx"
    ir.save(assemble(flat or flat_lenet()[1], policy, **options), path)
    return path


@pytest.fixture
def file(tmp_path, policy):
    return write(tmp_path, policy)


ABOUT = {"network": "B-LeNet", "plain_accuracy": 0.5}


def rows_of(path, data, batches=None, threads=1, **options):
    targets = None if batches is None and threads == 1 else [Target(batch, threads) for batch in batches or (1,)]
    return bench(path, flat_lenet()[0], data, targets, **({"about": ABOUT} | options))


def test_rows_are_complete_and_consistent(file, data, record, policy):
    rows = rows_of(file, data, batches=(1, 8, 64), repeats=1, samples=64)
    outcome = evaluate(record, policy)
    assert [(r["batch"], r["threads"]) for r in rows] == [(1, 1), (8, 1), (64, 1)]
    for row in rows:
        assert row.keys() == KEYS
        assert (row["network"], row["runtime"], row["plain_accuracy"]) == ("B-LeNet", "onnxruntime", 0.5)
        assert row["thresholds"] == list(policy.thresholds)
        assert min(row["plain_us"], row["branchy_us"], row["limit_us"]) > 0
        assert row["overhead"] == row["branchy_us"] / row["limit_us"]
        assert row["speedup"] == row["plain_us"] / row["branchy_us"]
        assert row["exit_share"] == pytest.approx(outcome.exit_share) and sum(row["exit_share"]) == pytest.approx(1)
        assert row["accuracy_branchy"] == pytest.approx(outcome.accuracy)
    assert 0.25 < outcome.exit_share[0] < 0.75


@pytest.mark.parametrize(("batch", "samples", "timed"), [(1, 20, 20), (8, 20, 16), (64, 20, 64), (7, 10_000, 70)])
def test_the_limit_weighs_times_by_the_exit_shares_of_the_timed_samples(file, data, monkeypatch, batch, samples, timed):
    def fake(engine, parts, inputs, left, size, repeats):
        (inputs,) = inputs
        exits = engine(inputs).exit
        assert left.tolist() == exits.tolist()
        seen.append((inputs, exits))
        assert parts.keys() == {"plain", "upto_1", "upto_2"} and (size, repeats) == (batch, 4)
        one = {"in_order": 50.0, "sorted": 55.0} if batch == 1 else {}
        return {"branchy": 60.0, "plain": 90.0, "upto_1": 20.0, "upto_2": 110.0, **one}, 0.1

    seen = []
    monkeypatch.setattr(module, "_time", fake)
    (row,) = rows_of(file, data, batches=(batch,), samples=samples, repeats=4)
    inputs, exits = seen[0]
    early = float((exits == 1).mean())
    assert len(inputs) == timed and 0 < early < 1
    assert row["limit_us"] == pytest.approx(early * 20 + (1 - early) * 110)
    assert row["limit_in_order_us"] == (50 if batch == 1 else None)
    assert row["overhead_sorted"] == (pytest.approx(55 / row["limit_us"]) if batch == 1 else None)
    assert row["speedup"] == 1.5 and row["overhead"] == pytest.approx(60 / row["limit_us"])
    given = {image.tobytes() for image in data[0].numpy()}
    assert {image.tobytes() for image in inputs} <= given and len({image.tobytes() for image in inputs}) == timed


def test_the_order_is_random_and_depends_on_the_seed(file, data, monkeypatch):
    orders = []
    times = {"branchy": 1.0, "plain": 1.0, "upto_1": 1.0, "upto_2": 1.0, "in_order": 1.0, "sorted": 1.0}
    monkeypatch.setattr(module, "_time", lambda engine, parts, inputs, *rest: orders.append(inputs[0]) or (times, None))
    for seed in (0, 0, 1):
        rows_of(file, data, batches=(1,), seed=seed)
    assert np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[0], orders[2])
    assert not np.array_equal(orders[0], data[0].numpy())


def test_a_file_with_batch_1_is_compared_with_graphs_of_batch_1(tmp_path, file, data, policy, monkeypatch):
    def opened(parts, *rest):
        fixed.append(not parts.flat.dynamic)
        return real(parts, *rest)

    fixed, real = [], OnnxParts.opened
    monkeypatch.setattr(OnnxParts, "opened", opened)
    net, _ = flat_lenet()
    one = export(net, tmp_path / "one.onnx", policy=policy, example=data[0][:4], free="none")
    (row,) = rows_of(one, data, samples=8, repeats=1)
    (same,) = rows_of(file, data, samples=8, repeats=1, batches=(1,))
    assert fixed == [True, False] and row["batch"] == 1
    answers = ("accuracy_branchy", "exit_share", "thresholds")
    assert [row[key] for key in answers] == [same[key] for key in answers]


def test_a_left_out_exit_appears_in_no_number(tmp_path, data, record):
    path = write(tmp_path, Policy(thresholds=(None,)))
    (row,) = rows_of(path, data, batches=(16,), repeats=1)
    assert row["exit_share"] == [0.0, 1.0] and row["thresholds"] == [None]
    assert row["accuracy_branchy"] == pytest.approx(evaluate(record, Policy(thresholds=(None,))).accuracy)


def test_every_engine_runs_the_same_batches_in_turns():
    log = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def __call__(self, rows):
            log.append((self.name, rows.tolist()))

        outputs = __call__

    inputs = np.arange(300)
    times, _ = _time(Fake("branchy"), {n: Fake(n) for n in ("plain", "upto_1")}, (inputs,), inputs, batch=3, repeats=2)
    assert times.keys() == {"branchy", "plain", "upto_1"} and all(t > 0 for t in times.values())
    calls = Counter((name, tuple(rows)) for name, rows in log)
    batches = [tuple(range(i, i + 3)) for i in range(0, 300, 3)]
    assert calls == Counter({(name, rows): 3 for name in times for rows in batches})  # two repeats and a warm-up
    turn = 64 // 3  # calls per turn
    for start in (0, 3 * turn, 6 * turn):
        names = [name for name, _ in log[start : start + 3 * turn : turn]]
        assert sorted(names) == ["branchy", "plain", "upto_1"]
        assert [name for name, _ in log[start : start + 3 * turn]] == [name for name in names for _ in range(turn)]
    assert len({log[start][0] for start in (0, 3 * turn, 6 * turn)}) == 3  # the first engine changes


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x, weight):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)) * weight)))


def spread(outputs):
    return outputs[-1].abs().sum(dim=1)


def test_several_inputs_with_custom_score_and_loss(tmp_path):
    torch.manual_seed(0)
    net = BranchyNet(Pair(), {"a": nn.Linear(6, 3)}).eval()
    inputs = {"x": torch.randn(30, 6), "weight": torch.rand(30, 6) + 0.5}
    target = torch.rand(30, 3)

    def loss(output, target):
        return (output - target).abs().mean(dim=1).clamp(max=1)

    with torch.no_grad():
        outputs = net(**inputs)
    early = spread(outputs[:1]) < (threshold := float(spread(outputs[:1]).median()) + 1e-3)
    path = export(net, tmp_path / "pair.onnx", policy=Policy(spread, (threshold,)), example=inputs)
    options = {"targets": (Target(1), Target(7)), "repeats": 1}
    rows = bench(path, net, (inputs, target), loss=loss, score=spread, **options)
    answers = torch.where(early[:, None], outputs[0], outputs[1])
    for row in rows:
        assert row["accuracy_branchy"] == pytest.approx(1 - float(loss(answers, target).mean()), abs=1e-5)
        assert row["exit_share"] == pytest.approx([float(early.float().mean()), 1 - float(early.float().mean())])
    with pytest.raises(InputError, match=r"uses the score 'spread'.*score="):
        bench(path, net, (inputs, target), loss=loss, **options)
    with pytest.raises(InputError, match=r"uses the score 'spread', not 'entropy'"):
        bench(path, net, (inputs, target), loss=loss, score=entropy, **options)
    with pytest.raises(InputError, match=r"targets must be class indices.*float32 of shape \(30, 3\).*loss="):
        bench(path, net, (inputs, target), score=spread, **options)


def test_one_sample_per_call_runs_in_the_graph_of_its_exit():
    log = Counter()

    class Fake:
        def __init__(self, name):
            self.name = name

        def __call__(self, row):
            log[self.name, int(row[0])] += 1

        outputs = __call__

    inputs, left = np.arange(100), np.where(np.arange(100) % 3, 1, 3)
    parts = {name: Fake(name) for name in ("plain", "upto_1", "upto_3")}
    times, spread = _time(Fake("branchy"), parts, (inputs,), left, batch=1, repeats=1)
    assert spread is None and times.keys() == {"branchy", "in_order", "sorted", *parts}
    for i in inputs:
        ran = {name: log[name, i] for name in ("branchy", *parts)}
        assert ran == {"branchy": 4, "plain": 2, "upto_1": 2, "upto_3": 2, f"upto_{left[i]}": 4}


def test_progress_is_reported(file, data, capfd):
    for progress in (True, False):
        rows_of(file, data, batches=(1, 64), repeats=1, samples=8, progress=progress)
        out, told = capfd.readouterr()
        lines = [f"timing in onnxruntime: batch {n}" for n in (1, 64) if progress]
        assert [line.split(",")[0] for line in told.splitlines()] == lines and out == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": (0,)}, "batch_size must be at least 1; got 0"),
        (
            {"about": {"net": "b_lenet"}},
            r"about= has unknown keys \['net'\]; only network and plain_accuracy are allowed",
        ),
        ({"batches": (1, 71)}, r"1\.\.70.*\[1, 71\]"),
        ({"repeats": 0}, "repeats must be at least 1; got 0"),
        ({"threads": 0}, "threads must be (at least 1|a whole number)"),
    ],
)
def test_wrong_options_are_named(file, data, changes, message):
    with pytest.raises(InputError, match=message):
        rows_of(file, data, **changes)


def test_wrong_data_files_and_networks_are_named(tmp_path, file, data, policy):
    images, labels = data
    with pytest.raises(InputError, match="70 inputs need as many targets; got 69"):
        rows_of(file, (images, labels[:-1]))
    with pytest.raises(InputError, match="float32"):
        rows_of(file, (images.double(), labels))
    with pytest.raises(InputError, match=r"flat\.onnx.*policy=None"):
        rows_of(write(tmp_path, None, "flat"), data)
    with pytest.raises(InputError, match=r"model\.onnx has 2 exits and the network has 1"):
        bench(file, zoo.lenet(), data)
    flat = flat_lenet()[1]
    one = write(tmp_path, policy, "one", FlatGraph(flat.model, flat.num_exits, dynamic=False))
    with pytest.raises(InputError, match=r"one\.onnx takes one sample per call; got batch sizes \[1, 64\]"):
        rows_of(one, data, batches=(1, 64))
    with pytest.raises(FileError, match=r"none\.onnx"):
        rows_of(tmp_path / "none.onnx", data)
    ir.save(flat.model, tmp_path / "foreign.onnx")
    with pytest.raises(FileError, match=r"foreign\.onnx was not written by BranchyNet"):
        rows_of(tmp_path / "foreign.onnx", data)


def test_the_sorted_run_has_the_same_samples_by_exit(file, data, monkeypatch):
    """What is timed as sorted meets every sample once, those of exit 1 first; the rest meets them as they come."""
    met = {}

    def fake(calls, batches, repeats):
        for name in ("sorted", "branchy"):
            each = calls[name] if isinstance(calls[name], list) else [calls[name]] * len(batches)
            met[name] = [call(*batch).exit.item() for call, batch in zip(each, batches, strict=True)]
        return dict.fromkeys(calls, np.ones(1))

    monkeypatch.setattr(module, "passes_in_turns", fake)
    rows_of(file, data, batches=(1,), samples=40, repeats=1)
    assert met["branchy"] != sorted(met["branchy"])
    assert met["sorted"] == sorted(met["branchy"]) and len(met["sorted"]) == 40


def test_averaged_exits_are_compared_with_the_network_without_branches(tmp_path, data, monkeypatch):
    """The averaged last exit reads the branches, which the plain network does not have."""
    net = averaged(flat_lenet()[0].eval(), of="logits")
    seen = {}

    def watched(calls, batches, repeats):
        seen["plain"] = calls["plain"](*batches[0])[-1]
        return dict.fromkeys(calls, np.ones(1))

    real = onnx_parts.save_model

    def spying(model, path):
        real(model, path)
        if path.name == "plain.onnx":
            seen["nodes"] = len(onnx.load(path).graph.node)

    monkeypatch.setattr(onnx_parts, "save_model", spying)
    monkeypatch.setattr(module, "passes_in_turns", watched)
    monkeypatch.setattr(onnx_parts, "flatten", flatten)
    path = export(net, tmp_path / "m.onnx", policy=Policy(thresholds=(0.5,)), example=data[0][:8])
    bench(path, net, data, Target(64), seed=0)
    order = np.random.default_rng(0).permutation(SAMPLES)[:64]
    with torch.no_grad():
        np.testing.assert_allclose(seen["plain"], net.backbone(data[0][order]), atol=1e-4)
    export(net.backbone, tmp_path / "plain.onnx", policy=None, example=data[0][:8])
    assert seen["nodes"] == len(onnx.load(tmp_path / "plain.onnx").graph.node)
