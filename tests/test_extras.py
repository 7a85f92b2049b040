"""Exported files need only numpy and ONNX Runtime; anything else names the extra that installs its dependencies."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import branchynet
from branchynet import extras
from branchynet.errors import MissingExtraError
from helpers import device

ROOT = Path(__file__).parents[1]
PACKAGES = {  # packages with another name than their module
    "fastapi_offline": "fastapi-offline",
    "grpc": "grpcio",
    "PIL": "pillow",
    "onnx_ir": "onnx-ir",
    "prometheus_client": "prometheus-client",
    "python_multipart": "python-multipart",
}
PROJECT = (ROOT / "pyproject.toml").read_text()
LISTS = {
    name: re.findall(r'^ *"([^"]+)"|\["([^"]+)"\]', body, flags=re.MULTILINE)
    for name, body in re.findall(r"^(\w+) = (\[[^\n]*\]$|\[.*?^\])", PROJECT, flags=re.MULTILINE | re.DOTALL)
}
STATED = {name: [Requirement(a or b) for a, b in found] for name, found in LISTS.items() if name in
          {"dependencies", "all", *extras.EXTRAS.values()}}  # fmt: skip

BASE = {
    "BranchyNetError", "BudgetController", "Choice", "Engine", "ExitCost", "ExitRecord", "History", "Monitor",
    "Outcome", "Policy", "Prediction", "Promise", "__version__", "data", "evaluate", "frontier", "load", "nn", "report",
    "StagedEngine", "Target", "verify",
}  # fmt: skip


def python(code, *arguments, forbidden=device.OPTIONAL):
    """Run code in a process in which these modules appear not to be installed."""
    paths = os.pathsep.join([str(ROOT / "tests"), str(Path(branchynet.__file__).parents[1])])
    code = f"from helpers import device\ndevice.forbid({', '.join(map(repr, forbidden))})\n{code}"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def missing(code, *arguments, forbidden=device.OPTIONAL):
    """The messages of the `MissingExtraError` that the last expression of each line raises."""
    script = f"""
import json, sys
from branchynet.errors import MissingExtraError
for line in {code.strip().splitlines()!r}:
    try:
        exec(line)
        print(json.dumps(""))
    except MissingExtraError as error:
        print(json.dumps(str(error)))
"""
    done = python(script, *arguments, forbidden=forbidden)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that `device.make` writes."""
    path = tmp_path_factory.mktemp("device")
    device.make(path)
    return path


def test_exported_files_run_with_numpy_and_onnx_runtime_alone(folder):
    done = python("import sys, pathlib; device.run(pathlib.Path(sys.argv[1])); print('ran')", folder)
    assert done.stdout == "ran\n", done.stderr


def test_the_train_extra_suffices_to_train_choose_and_export(tmp_path):
    kept = {"tqdm", "google"}  # accelerate installs tqdm too, and onnx protobuf
    forbidden = [m for m, extra in extras.EXTRAS.items() if extra not in ("train", "verify") and m not in kept]
    code = """
import sys, torch
from branchynet import advise, attach, choose, export, fit, load, measure, record
x = torch.randn(64, 4)
batches = [(x, x.argmax(dim=1))] * 2
net = attach(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)), at=["0"], example=x)
fit(net, batches, batches, epochs=1)
choice = choose(record(net, batches[:1]), measure(net, x[:1]), max_drop=0.1, confidence=None)
export(net, sys.argv[1] + "/model.onnx", policy=choice, example=x)
load(sys.argv[1] + "/model.onnx", verify=True)
"""
    done = python(code, tmp_path, forbidden=forbidden)
    assert done.returncode == 0, done.stderr


def test_a_damaged_file_is_told_without_onnx(folder, tmp_path):
    (tmp_path / "broken.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-300])
    done = python("import sys; import branchynet; branchynet.load(sys.argv[1])", tmp_path / "broken.onnx")
    assert re.search(r"FileError: ONNX Runtime \S+ cannot run .*export it again", done.stderr), done.stderr


def test_every_public_name_is_there_or_names_its_extra():
    names = sorted([*branchynet.__all__, "nn"])
    messages = missing("\n".join(f"import branchynet; branchynet.{name}" for name in names))
    assert {name for name, message in zip(names, messages, strict=True) if not message} == BASE
    for name, message in zip(names, messages, strict=True):
        assert not message or re.fullmatch(
            rf"branchynet\.{name} needs \w+, which is not installed: pip install 'branchynet\[train\]', or "
            r"'branchynet\[all\]' on a machine that trains", message
        ), message  # fmt: skip


def test_what_is_missing_in_use_names_its_extra(folder):
    messages = missing(
        """
from branchynet import load, verify; verify(sys.argv[1] + "/model.onnx")
load(sys.argv[1] + "/model.onnx", verify=True)
load(sys.argv[1] + "/model.onnx", runtime="openvino")
from branchynet.data import read_image
from branchynet.data import load_data
from branchynet.report import write_report
from branchynet.zoo import b_lenet
from branchynet import ExitRecord, Monitor; Monitor(ExitRecord.load(sys.argv[1] + "/outputs.npz"), load(sys.argv[1] + "/model.onnx").policy)
""",  # noqa: E501
        folder,
    )
    wanted = ["verify", "verify", "openvino", "data", "train", "report", "train", "train"]
    assert [re.findall(r"pip install 'branchynet\[(\w+)\]'", message) for message in messages] == [
        [w] for w in wanted
    ], messages


@pytest.mark.parametrize(
    ("forbidden", "arguments", "extra"),
    [
        (device.OPTIONAL, ["--help"], "cli"),
        (["rich"], ["--version"], "cli"),
        (["torch"], ["train", "run"], "train"),
        (["scipy"], ["demo"], "train"),
        (["matplotlib"], ["report", "run"], "report"),
        (["PIL"], ["predict", "model.onnx", "image.png"], "data"),
        (["onnx"], ["verify", "model.onnx"], "verify"),
        (["fastapi"], ["serve", "model.onnx"], "serve"),
        (["grpc"], ["serve", "model.onnx", "--grpc-port", "0"], "grpc"),
        (["tritonclient"], ["serve", "model.onnx", "--grpc-port", "0"], "grpc"),
        (["ray"], ["serve", "model.onnx", "--ray"], "ray"),
    ],
)
def test_a_command_names_the_extra_that_it_needs(folder, forbidden, arguments, extra):
    arguments = [str(folder / "model.onnx") if a == "model.onnx" else a for a in arguments]
    done = python("from branchynet.__main__ import main; main()", *arguments, forbidden=forbidden)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(rf"error: .* needs \w+, .*pip install 'branchynet\[{extra}\]'.*\n", done.stderr), done.stderr


def test_the_command_line_inspects_without_torch(folder):
    forbidden = {"torch", "scipy", "matplotlib", "accelerate", "onnxscript", "onnx_ir", "safetensors", "filelock"}
    for arguments in (["--help"], ["--version"], ["inspect", folder / "model.onnx"], ["verify", folder / "model.onnx"]):
        done = python("from branchynet.__main__ import main; main()", *arguments, forbidden=sorted(forbidden))
        assert done.returncode == 0 and not done.stderr, done.stderr


def test_a_server_answers_without_torch(folder):
    forbidden = {"torch", "scipy", "matplotlib", "accelerate", "onnxscript", "onnx_ir", "safetensors", "filelock"}
    code = """
import asyncio, pathlib, sys
import numpy as np
from branchynet.serve.oip import Options
from branchynet.serve.server import prepared
from branchynet.serve.settings import ServeSettings
server, listener = prepared(pathlib.Path(sys.argv[1]), ServeSettings(port=0))
model = server.repository.ready(server.repository.names[0])
answer = asyncio.run(model.infer({"input": np.zeros((2, 4), np.float32)}, Options()))
server.repository.close()
listener.close()
print(answer.outputs["exit"].shape)
"""
    done = python(code, folder / "model.onnx", forbidden=sorted(forbidden))
    assert done.stdout == "(2,)\n", done.stderr


def test_the_import_alone_loads_nothing_large():
    code = "import sys; before = set(sys.modules); import branchynet; print(*(set(sys.modules) - before))"
    loaded = {name.partition(".")[0] for name in python(code, forbidden=()).stdout.split()}
    assert loaded and not loaded & {*device.OPTIONAL, "numpy", "onnxruntime", "packaging"}


def test_other_missing_modules_stay_what_they_are():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), extras.needed_by("this"):
        import no_such_module  # noqa: F401  # pyright: ignore[reportMissingImports]
    with pytest.raises(MissingExtraError, match=r"this needs typer.*'branchynet\[all\]'"), extras.needed_by("this"):
        raise ModuleNotFoundError(name="typer.main")


def test_extras_are_those_of_the_project():
    found = {(PACKAGES.get(module, module), extra) for module, extra in extras.EXTRAS.items()}
    stated = [(r.name, e) for e, all in STATED.items() for r in all if r.name != "branchynet" and e != "dependencies"]
    assert sorted(stated) == sorted(found)
    assert [r.name for r in STATED["dependencies"]] == ["numpy", "onnxruntime", "packaging"]
    assert STATED["all"][0].extras == set(extras.EXTRAS.values()) - {"verify", "ray"}


def test_types_are_of_the_names_that_packages_have():
    for package in ("", "data", "report"):
        folder = Path(branchynet.__file__).parent / package
        names = re.findall(r"^from \S+ import \w+ as (\w+)$", (folder / "__init__.pyi").read_text(), re.MULTILINE)
        public = getattr(branchynet, package).__all__ if package else [*branchynet.__all__, "nn"]
        assert sorted(names) == sorted(public)
