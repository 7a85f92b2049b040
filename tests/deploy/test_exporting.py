"""Export: refused arguments and networks, the metadata of the file, and failures that leave no partial file."""

import getpass
import importlib
import json
import os
import platform
import resource
import signal
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import branchynet
from branchynet.deploy import checksum
from branchynet.deploy import exporting as module
from branchynet.deploy.engine import METADATA_KEY
from branchynet.deploy.exporting import export
from branchynet.deploy.loading import load
from branchynet.deploy.stored_samples import SAMPLES_KEY
from branchynet.environment import __version__
from branchynet.errors import FileError, GraphError, InputError
from branchynet.graph.onnx_flat import flatten
from branchynet.nn.fingerprint import fingerprint
from branchynet.nn.network import BranchyNet
from branchynet.policy.scores import entropy
from branchynet.policy.values import Policy
from helpers.chains import TWO, Chain, branchy, inputs


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    notes = {"labels": ["ant", "bee", "cat", "dog"], "preprocessing": {"size": [2, 3]}}
    export(branchy(), path, policy=TWO, example=inputs().requires_grad_(), **notes)
    return path


# The file


def test_metadata_says_all_that_is_documented(exported):
    engine = load(exported, threads=1)
    assert engine.metadata == {
        "format": 1,
        "version": __version__,
        "policy": {"score": "entropy", "thresholds": [0.9, 0.9]},
        "inputs": [i.name for i in engine.inputs],
        "exits": 3,
        "thresholds": "default",
        "batch": "dynamic",
        "output_shape": [4],
        "labels": ["ant", "bee", "cat", "dog"],
        "preprocessing": {"size": [2, 3]},
        "promise": None,
        "network": fingerprint(branchy()),
        "selected_on": [],
        "sample_bytes": engine.metadata["sample_bytes"],
    }
    assert engine.metadata["sample_bytes"] > 0
    assert engine.labels == ("ant", "bee", "cat", "dog") and engine.policy == TWO and engine.num_exits == 3
    stored = {p.key: p.value for p in onnx.load(exported).metadata_props}
    # These names are part of the format: older files must still load.
    assert (METADATA_KEY, SAMPLES_KEY, checksum.KEY) == ("branchynet", "branchynet.samples", "branchynet_sha256")
    assert json.loads(stored.pop(METADATA_KEY)) == engine.metadata
    assert stored.pop(SAMPLES_KEY) and list(stored) == [checksum.KEY]


def test_the_file_names_neither_the_machine_nor_the_source(exported):
    content = exported.read_bytes()
    here = Path(__file__).resolve()
    secrets = [str(here.parent), str(Path.home()), "site-packages", ".py", "forward", "pkg.torch", "stack", "Traceback"]
    secrets += [name for name in (platform.node(), getpass.getuser()) if len(name) > 5]
    assert [s for s in secrets if s.encode() in content] == []


def test_the_public_name_is_the_function_in_any_order_of_imports():
    for name, home in {
        "bench": "profiling.benchmark",
        "export": "deploy.exporting",
        "record": "profiling.recording",
    }.items():
        room = importlib.import_module(f"branchynet.{home}")
        assert getattr(branchynet, name) is getattr(room, name)


def test_export_returns_the_path_and_makes_the_folder(cached, tmp_path):
    path = tmp_path / "a" / "b" / "model.onnx"
    assert export(branchy(), str(path), policy=TWO, example=inputs()) == path and path.is_file()
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    mask = os.umask(0o022)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask  # not the private mode of temporary files


# Refused before the export


STORED = Policy.from_json({"score": "entropi", "thresholds": [0.5, 0.5]})  # a name in a file may be that of a callable


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": STORED}, "'entropi'.*did you mean 'entropy'"),
        ({"policy": Policy(thresholds=(0.5,))}, "1 thresholds; 3 exits need 2"),
        ({"policy": Policy(thresholds=(0.5,) * 3)}, "3 thresholds; 3 exits need 2"),
        ({"thresholds": "constant"}, "'constant'"),
        ({"free": 2}, "2"),
        ({"example": [[1.0]]}, "tensor"),
        ({"example": ()}, "tensor"),
        ({"example": torch.tensor(1.0)}, "leading batch"),
        ({"example": inputs(0)}, "leading batch"),
        ({"example": (inputs(2), inputs(3))}, r"\[2, 3\]"),
        ({"policy": Policy(lambda outputs: outputs[-1], (0.5, 0.5))}, r"score gives shape \(2, 4\).*exit 1.*\(B,\)"),
        ({"policy": Policy(lambda outputs: outputs[-1].amax(), (0.5, 0.5))}, r"score gives shape \(\)"),
        ({"policy": Policy(lambda outputs: 0.5, (0.5, 0.5))}, "score gives float"),
    ],
)
def test_wrong_arguments_are_named(changes, message, tmp_path):
    arguments = {"policy": TWO, "example": inputs()} | changes
    with pytest.raises(InputError, match=message):
        export(branchy(), tmp_path / "model.onnx", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_policy_for_a_network_without_branches_is_refused(tmp_path):
    backbone = branchy().backbone
    for net in (backbone, BranchyNet(backbone, {})):
        with pytest.raises(InputError, match=r"no branches, but the policy is for 3 exits: .* not its backbone"):
            export(net, tmp_path / "a.onnx", policy=TWO, example=inputs())
    assert not list(tmp_path.iterdir())


def test_exits_of_different_classes_or_rank_are_refused(tmp_path):
    uneven = BranchyNet(Chain(), {"a": nn.Linear(8, 3)})
    with pytest.raises(GraphError, match=r"exit 1 gives shape \(2, 3\) and the last exit \(2, 4\).*of one shape"):
        export(uneven, tmp_path / "model.onnx", policy=Policy(thresholds=(0.5,)), example=inputs())
    flat = Chain(final=lambda y: y[:, 0])
    with pytest.raises(GraphError, match=r"shape \(2,\).*\(B, C, \.\.\.\)"):
        export(flat, tmp_path / "model.onnx", policy=None, example=inputs())
    assert not list(tmp_path.iterdir())


# Refused networks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"late": lambda x: F.dropout(x, 0.5, training=True)}, "random numbers.*Dropout.*eval mode"),
        ({"early": lambda x: x + torch.rand_like(x)}, "random numbers.*RandomUniformLike"),
        ({"early": lambda x: x if x.sum() > 0 else -x}, "cannot be exported.*data-dependent.*torch.where"),
    ],
)
def test_networks_that_cannot_be_graphs_are_refused(changes, message, tmp_path):
    with pytest.raises(GraphError, match=f"(?s){message}"):
        export(branchy(**changes), tmp_path / "model.onnx", policy=TWO, example=inputs())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["early", "late"])
def test_a_network_that_mixes_the_samples_of_a_batch_is_caught(where, tmp_path):
    net = branchy(**{where: lambda x: x - x.mean(0)})
    with pytest.raises(GraphError, match=f"exit {1 if where == 'early' else 3}.*other samples of the batch"):
        export(net, tmp_path / "model.onnx", policy=TWO, example=inputs())
    assert not list(tmp_path.iterdir())


def test_a_file_that_disagrees_with_the_network_is_refused(cached, tmp_path):
    other = branchy()
    with torch.no_grad():
        other.backbone.b.bias += 1  # after exit 1, so exits 2 and 3 differ from the export in `cached`
    with pytest.raises(GraphError, match="exit 2"):
        export(other, tmp_path / "model.onnx", policy=TWO, example=inputs())
    assert not list(tmp_path.iterdir())


def test_the_network_is_left_as_it_was(tmp_path):
    net = branchy()
    net.backbone.b = nn.Sequential(nn.Dropout(0.9), net.backbone.b, nn.BatchNorm1d(8))
    net.train()
    net.backbone.b[0].eval()
    net.branches[1].eval()
    net.backbone.a.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    wanted = [p.requires_grad for p in net.parameters()]
    export(net, tmp_path / "model.onnx", policy=TWO, example=inputs())
    with pytest.raises(InputError):
        export(net, tmp_path / "model.onnx", policy=Policy(lambda o: o[-1], (1, 1)), example=inputs())
    assert [m.training for m in net.modules()] == modes and len(set(modes)) == 2
    assert [p.requires_grad for p in net.parameters()] == wanted and len(set(wanted)) == 2
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())
    assert torch.is_grad_enabled()


# Failures of the disk, and death


@pytest.fixture(scope="module")
def flat():
    return flatten(branchy(), inputs(), score=entropy)


@pytest.fixture
def cached(flat, monkeypatch):
    """Exports of `branchy()` take the flat graph that is there, so that they cost milliseconds."""
    monkeypatch.setattr(module, "flatten", lambda net, example, **options: flat)


@pytest.mark.parametrize("limit", [0, 1000, 4000])
@pytest.mark.parametrize("old", [None, b"the last good file"])
def test_a_full_disk_leaves_the_previous_file(cached, limit, old, tmp_path):
    path = tmp_path / "model.onnx"
    if old:
        path.write_bytes(old)
    net, x = branchy(), inputs()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard[1]))
    try:
        with pytest.raises(FileError, match=r"cannot write .*model\.onnx.*space"):
            export(net, path, policy=TWO, example=x)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, hard)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({"model.onnx": old} if old else {})


def test_a_folder_that_cannot_be_written_is_named(cached, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(FileError, match=r"cannot write .*file/model\.onnx"):
        export(branchy(), tmp_path / "file" / "model.onnx", policy=TWO, example=inputs())
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(FileError, match=r"cannot write .*folder\.onnx"):
        export(branchy(), tmp_path / "folder.onnx", policy=TWO, example=inputs())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.onnx"]


WIDTH = 200


def die_at_every_moment(folder):
    """In a child process: export again and again in children of its own, killing each at another moment.

    A moment is the k-th time that Python tells of an operation on the temporary file, or the middle of writing it, when
    the kernel kills the process for a file larger than its limit.
    """
    folder = Path(folder)
    torch.set_num_threads(1)
    net, x = branchy(WIDTH), inputs()
    flat = flatten(net, x, score=entropy)
    module.flatten = lambda *args, **options: flat
    seen = []
    watching = True
    sys.addaudithook(lambda event, args: seen.append(event) if watching and ".partial" in str(args) else None)
    good = export(net, folder / "good.onnx", policy=TWO, example=x).read_bytes()
    watching = False

    def death(moment, path):
        if moment == "writing":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, len(good) // 2))
        else:
            left = iter(range(moment, -1, -1))

            def hook(event, args):
                if ".partial" in str(args) and next(left) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
        export(net, path, policy=Policy(thresholds=(0.1, 0.2)), example=x)

    for moment in ("writing", *range(len(seen))):
        for old in (True, False):
            name = f"{moment}-{'old' if old else 'new'}"
            (folder / name).mkdir()
            if old:
                (folder / name / "model.onnx").write_bytes(good)
            child = os.fork()
            if child == 0:
                death(moment, folder / name / "model.onnx")
                os._exit(0)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status), f"no death at {moment}: {seen}"
    (folder / "moments.json").write_text(json.dumps(seen))


def test_death_at_any_moment_leaves_the_old_file_or_none(tmp_path):
    paths = os.pathsep.join([*map(str, Path(__file__).parents[:2]), str(Path(branchynet.__file__).parents[1])])
    command = f"import test_exporting; test_exporting.die_at_every_moment({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", command], env={**os.environ, "PYTHONPATH": paths}, check=True, timeout=300)
    moments = json.loads((tmp_path / "moments.json").read_text())
    assert {"open", "os.chmod", "os.rename"} <= set(moments)
    good = (tmp_path / "good.onnx").read_bytes()
    half_written = 0
    for moment in ("writing", *range(len(moments))):
        for old in (True, False):
            folder = tmp_path / f"{moment}-{'old' if old else 'new'}"
            path = folder / "model.onnx"
            half_written += sum(0 < p.stat().st_size < 0.9 * len(good) for p in folder.iterdir())
            if path.exists() and path.read_bytes() != good:  # killed after the work was done
                assert moment > moments.index("os.rename")
                assert load(path, threads=1).policy.thresholds == (0.1, 0.2)
            else:
                assert path.exists() == old
    assert half_written == 2  # the temporary files of the two that died while writing
