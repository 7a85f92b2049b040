"""A folder of stages answers as the paper's Figure 2, as the nested file does, and stage by stage."""

import copy
import json
import os
import pickle
import shutil

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from branchynet import BranchyNet, Policy, StagedEngine, TorchEngine, export, load, verify
from branchynet.errors import FileError, InputError
from branchynet.runs.run import create_run, open_run
from branchynet.runs.settings import Settings
from helpers.loop import BATCHES, QUANTILES, agree, agree_everywhere, every_exit, safe_thresholds
from helpers.networks import FAMILIES, build, draw


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def case(request, tmp_path_factory):
    """A random network, its folder and its nested file, 64 samples, every exit's outputs, and thresholds."""
    net, example = build(request.param, 1)
    inputs = draw(example, 64, 1)
    outputs = every_exit(net, inputs)
    folder = tmp_path_factory.mktemp("stages")
    policy = Policy(thresholds=safe_thresholds(outputs, QUANTILES[1][: net.num_exits - 1]))
    export(net, folder / "staged", policy=policy, example=inputs, layout="stages")
    export(net, folder / "nested.onnx", policy=policy, example=inputs)
    return net, folder, [i.numpy() for i in inputs], outputs, policy


@pytest.fixture(scope="module")
def staged(case):
    return load(case[1] / "staged", threads=1)


@pytest.fixture(scope="module")
def others(case):
    """The engines of the nested file and of PyTorch."""
    net, folder, inputs, _, policy = case
    nested = load(folder / "nested.onnx", threads=1)
    return nested, TorchEngine(net, policy, tuple(map(torch.from_numpy, inputs)))


@pytest.mark.parametrize("batch", BATCHES)
def test_the_folder_agrees_with_the_loop_and_with_the_nested_file(case, staged, others, batch):
    _, _, inputs, outputs, policy = case
    rows = [i[:batch] for i in inputs]
    answer = staged(*rows)
    agree(answer, outputs[:batch], policy.thresholds)
    nested, in_torch = (engine(*rows) for engine in others)
    largest = np.abs(outputs).max()
    # Kernels may add up in another order in a smaller graph, and in PyTorch.
    for other, allowed in ((nested, 1e-5 * largest), (in_torch, 1e-4)):
        for name in ("label", "exit"):
            assert getattr(answer, name).tolist() == getattr(other, name).tolist()
        np.testing.assert_allclose(answer.output, other.output, atol=allowed)
        np.testing.assert_allclose(answer.score, other.score, atol=allowed)
    assert [a.dtype for a in answer] == [a.dtype for a in nested]


def test_the_folder_agrees_with_the_loop_at_any_thresholds_and_batch(case, staged):
    agree_everywhere(staged, case[2], case[3])


def test_stages_one_by_one_give_what_the_engine_gives(case, staged):
    """A scheduler that mixes two batches after the first stage gets every sample's answer."""
    _, _, inputs, _, policy = case
    expected = staged(*inputs)
    names = [i.name for i in staged.inputs]
    found = {}
    waiting = [(np.arange(a, b), {n: i[a:b] for n, i in zip(names, inputs, strict=True)}) for a, b in ((0, 9), (9, 64))]
    for number, stage in enumerate(staged.stages, 1):
        later = []
        for rows, values in waiting:
            answers, scores, carried = staged.stage(number).run(values)
            assert set(carried) == set(stage.keeps)
            limit = np.inf if number == len(staged.stages) else policy.thresholds[stage.exit - 1]
            leave = stage.leave(scores)
            assert leave.tolist() == (scores < np.float32(limit)).tolist()
            found |= {row: (stage.exit, answers.output[k]) for k, row in enumerate(rows) if leave[k]}
            later.append((rows[~leave], {name: value[~leave] for name, value in carried.items()}))
        rows = np.concatenate([rows for rows, _ in later])
        if not len(rows):
            break
        waiting = [(rows, {name: np.concatenate([v[name] for _, v in later]) for name in later[0][1]})]
    assert [found[row][0] for row in range(64)] == expected.exit.tolist()
    np.testing.assert_allclose([found[row][1] for row in range(64)], expected.output, atol=1e-4)  # another batch size


def test_stream_yields_an_exit_before_the_next_stage_runs(case, staged, monkeypatch):
    inputs = case[2]
    expected = staged(*inputs)
    ran = []
    for stage in staged.stages:
        run = stage._run
        monkeypatch.setitem(stage.__dict__, "_run", lambda feeds, n=stage.exit, run=run: ran.append(n) or run(feeds))
    seen = np.zeros(64, int)
    for rows, answers in staged.stream(*inputs):
        assert set(answers.exit.tolist()) == {ran[-1]}
        assert answers.exit.tolist() == expected.exit[rows].tolist()
        np.testing.assert_allclose(answers.output, expected.output[rows], atol=1e-5)
        seen[rows] += 1
    assert (seen == 1).all()
    assert len(ran) == len([s for s in staged.stages if s.exit <= expected.exit.max()])
    assert list(staged.stream(*(i[:0] for i in inputs))) == []


def test_the_manifest_describes_the_files(case):
    _, folder, inputs, _, policy = case
    manifest = json.loads((folder / "staged" / "stages.json").read_text())
    stages = manifest["stages"]
    assert [s["exit"] for s in stages] == [n for n, on in enumerate(policy.enabled, 1) if on]
    assert [s["threshold"] for s in stages[:-1]] == [t for t in policy.thresholds if t is not None]
    assert stages[-1]["threshold"] is None
    sizes = {}
    for n, stage in enumerate(stages, 1):
        graph = onnx.load(folder / "staged" / stage["file"]).graph
        assert [i.name for i in graph.input] == [i["name"] for i in stage["inputs"]]
        assert [o.name for o in graph.output] == [o["name"] for o in stage["outputs"]]
        assert [o.name for o in graph.output][:3] == ["label", "score", "output"]
        for value in (*graph.input, *graph.output):
            assert value.type.tensor_type.shape.dim[0].dim_param == "batch", value.name
        for value in stage["inputs"]:
            if value["source"] != "network":
                assert value["source"] < n
                assert sizes[value["name"]] == (value["source"], value["dtype"], value["shape"])
        sizes |= {o["name"]: (n, o["dtype"], o["shape"]) for o in stage["outputs"]}
        every = [*stage["inputs"], *stage["outputs"]]
        assert all(v["bytes"] == np.dtype(v["dtype"]).itemsize * np.prod(v["shape"], dtype=int) for v in every)
    assert sum(s["macs"] for s in stages) >= 0
    assert [i["name"] for i in manifest["inputs"]] == manifest["metadata"]["inputs"]
    assert len(inputs) == len(manifest["inputs"])


def test_exits_can_be_left_out(case, tmp_path):
    net, _, inputs, outputs, policy = case
    example = tuple(map(torch.from_numpy, inputs))
    for never in range(net.num_exits - 1):
        fewer = tuple(None if n == never else t for n, t in enumerate(policy.thresholds))
        export(net, tmp_path / "fewer", policy=Policy(thresholds=fewer), example=example, layout="stages")
        engine = load(tmp_path / "fewer", threads=1)
        assert len(engine.stages) == net.num_exits - 1
        agree(engine(*inputs), outputs, fewer)


class LengthFirst(nn.Module):
    """Sequences `(B, T, F)` that the layers read with the batch as the second dimension."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 6)
        self.classify = nn.Linear(6, 3)

    def forward(self, x):
        steps = torch.tanh(self.first(x.transpose(0, 1)))
        later = torch.tanh(self.second(steps - steps.mean(0, keepdim=True)))
        return self.classify((later + steps)[-1])


class LastStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.classify = nn.Linear(6, 3)

    def forward(self, x):
        return self.classify(x[-1])


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_carried_values_have_their_batch_first(runtime, tmp_path):
    torch.manual_seed(0)
    net = BranchyNet(LengthFirst(), {"first": LastStep()}).eval()
    x = torch.randn(16, 5, 4)
    with torch.no_grad():
        outputs = np.stack([o.numpy() for o in net(x)], axis=1)
    thresholds = safe_thresholds(outputs, (0.5,))
    export(net, tmp_path / "net", policy=Policy(thresholds=thresholds), example=x, layout="stages")
    engine = load(tmp_path / "net", threads=1, runtime=runtime)
    agree(engine(x), outputs, thresholds)
    _, _, carried = engine.stage(1).run({engine.inputs[0].name: x.numpy()})
    assert carried and all(len(value) == 16 for value in carried.values())


# Files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    net, example = build(FAMILIES[1], 0)
    path = tmp_path_factory.mktemp("files") / "staged"
    return export(net, path, policy=Policy(thresholds=(0.5, 0.5)), example=draw(example, 8, 0), layout="stages")


def test_verify_checks_the_folder(folder):
    found = verify(folder)
    assert found.passed and found.samples == 8
    assert load(folder, verify=True, threads=1).num_exits == 3


def test_engines_pickle_and_copy(folder, tmp_path):
    engine = load(folder, threads=1)
    x = np.random.default_rng(0).random((5, *engine.inputs[0].shape), np.float32)
    for twin in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert isinstance(twin, StagedEngine)
        np.testing.assert_array_equal(twin(x).output, engine(x).output)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: (f / "stage_2.onnx").unlink(), r"stage 2 of .* is missing"),
        (lambda f: (f / "stages.json").write_text("{}"), "stages.json"),
        (lambda f: (f / "stages.json").write_text((f / "stages.json").read_text()[:200]), "stages.json"),
        (lambda f: os.truncate(f / "stage_1.onnx", 500), r"stage_1\.onnx"),
        (lambda f: shutil.copy(f / "stage_1.onnx", f / "stage_2.onnx"), r"stage_2\.onnx .*another export"),
    ],
    ids=["missing", "empty manifest", "short manifest", "short stage", "another stage"],
)
def test_damaged_folders_are_refused(folder, tmp_path, damage, match):
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    damage(copied)
    with pytest.raises(FileError, match=match):
        load(copied)


def test_a_stage_of_another_export_is_refused(folder, tmp_path):
    net, example = build(FAMILIES[1], 1)
    policy = Policy(thresholds=(0.5, 0.5))
    other = export(net, tmp_path / "other", policy=policy, example=draw(example, 8, 0), layout="stages")
    shutil.copytree(folder, tmp_path / "mixed")
    shutil.copy(other / "stage_3.onnx", tmp_path / "mixed" / "stage_3.onnx")
    with pytest.raises(FileError, match=r"stage_3\.onnx .*another export.*copy the whole folder again"):
        load(tmp_path / "mixed")


def test_a_single_stage_is_not_a_network(folder):
    with pytest.raises(FileError, match=r"stage 2 of a staged network; load its folder"):
        load(folder / "stage_2.onnx")


def test_stages_refuse_wrong_values(folder):
    engine = load(folder, threads=1)
    x = np.zeros((3, *engine.inputs[0].shape), np.float32)
    name = engine.inputs[0].name
    _, _, carried = engine.stage(1).run({name: x})
    shorter = {n: v[: 2 + k] for k, (n, v) in enumerate(carried.items())}
    for wrong, match in (
        ({}, "needs '"),
        ((x, x), "rows must be a Mapping"),
        (shorter, "must agree"),
        ({n: v.astype(np.float64) for n, v in carried.items()}, "float64"),
        ({n: v[:, :1] for n, v in carried.items()}, "network reads"),
    ):
        with pytest.raises(InputError, match=match):
            engine.stage(2).run(wrong)
    with pytest.raises(InputError, match="there is no stage 4; the network has 3"):
        engine.stage(4)
    with pytest.raises(InputError, match="at least 1"):
        engine.stage(0)


def test_an_export_is_written_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    net, example = build(FAMILIES[1], 0)
    arguments = {"policy": Policy(thresholds=(0.5, 0.5)), "example": draw(example, 8, 0), "layout": "stages"}
    kept = tmp_path / "net"
    shutil.copytree(folder, kept)
    before = {file.name: file.read_bytes() for file in kept.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("branchynet.deploy.staged_writing.write_sealed", full)
        with pytest.raises(FileError, match="No space left"):
            export(net, kept, **arguments)
    assert {file.name: file.read_bytes() for file in kept.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["net"]
    (tmp_path / ".net-killed.partial").mkdir()
    export(net, kept, **arguments)
    assert sorted(file.name for file in kept.iterdir()) == [
        "stage_1.onnx",
        "stage_2.onnx",
        "stage_3.onnx",
        "stages.json",
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["net"]


def test_other_folders_are_not_replaced(tmp_path):
    net, example = build(FAMILIES[1], 0)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    policy = Policy(thresholds=(0.5, 0.5))
    export(net, tmp_path / "net", policy=policy, example=draw(example, 4, 0), layout="stages")
    (tmp_path / "net" / "config.json").write_bytes(b"")
    with pytest.raises(FileError, match=r"also holds 'config\.json'"):
        export(net, tmp_path / "net", policy=policy, example=draw(example, 4, 0), layout="stages")
    for path in (tmp_path / "photos", tmp_path / "file"):
        with pytest.raises(FileError, match=r"holds no stages\.json; give the path of a new folder"):
            export(net, path, policy=Policy(thresholds=(0.5, 0.5)), example=draw(example, 4, 0), layout="stages")
    with pytest.raises(InputError, match="needs a policy"):
        export(net, tmp_path / "new", policy=None, example=draw(example, 4, 0), layout="stages")


def test_other_paths_of_an_export_are_named(folder, tmp_path):
    with pytest.raises(FileError, match=r"describes the stages of a network; load its folder"):
        load(folder / "stages.json")
    with pytest.raises(FileError, match=r"the folder has no stages\.json"):
        load(tmp_path)
    with pytest.raises(FileError, match="holds the exported stages of a network, not a run"):
        open_run(folder)
    with pytest.raises(FileError, match="holds the exported stages of a network, not a run"):
        create_run(folder, Settings(network="b_lenet", data="digits"))
