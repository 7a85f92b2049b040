"""Versions of other packages: stated once, and checked by name before slow steps."""

import importlib
import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from torch import nn

import branchynet.graph
from branchynet import BranchyNet, environment, load
from branchynet.errors import BranchyNetError, VersionError

ROOT = Path(__file__).parents[1]
STATED = re.findall(r'^    "([\w.-]+(?:[><=!~][^"]*))",', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)


@pytest.fixture
def installed(monkeypatch):
    """A dict that replaces the installed versions; packages that it lacks appear not to be installed."""
    found = {}

    def version(package):
        if package not in found:
            raise PackageNotFoundError(package)
        return found[package]

    monkeypatch.setattr(environment, "version", version)
    monkeypatch.setattr(environment, "requires", lambda name: [*STATED, "other[extra]; extra == 'dev'"])
    for cached in (environment.require, environment._wanted):
        cached.cache_clear()
    yield found
    for cached in (environment.require, environment._wanted):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("package", "wrong"),
    [
        ("torch", "2.6.0"),
        ("torch", "2.7.1+cu126"),
        ("torch", "2.9.0"),
        ("torch", "2.9.1+cpu"),
        ("torch", "2.9.0a0+145a3a7bda.nv25.10"),
        ("onnx-ir", "0.1.16"),
        ("onnxscript", "0.5.7"),
        ("onnxscript", "0.6.1"),
        ("openvino", "2025.4.1"),
        ("openvino", "2026.1.0"),
    ],
)
def test_a_wrong_version_is_refused_by_name(installed, package, wrong):
    installed[package] = wrong
    with pytest.raises(VersionError, match=re.escape(f"{package} {wrong} ") + rf".*pip install '{package}\W.*\d'"):
        environment.require(package)
    if package not in environment.EXPORTING:
        return
    with pytest.raises(BranchyNetError):
        BranchyNet(nn.Linear(2, 2), {})
    with pytest.raises(ImportError):
        importlib.reload(branchynet.graph)


@pytest.mark.parametrize(
    ("package", "right"),
    [
        ("torch", "2.8.0"),
        ("torch", "2.8.0a0+5228986c39.nv25.06"),
        ("torch", "2.10.0+cu128"),
        ("torch", "3.0.0.dev20270101"),
        ("onnx-ir", "0.2.0"),
        ("onnxscript", "0.7.0"),
    ],
)
def test_other_versions_and_absent_packages_pass(installed, package, right):
    environment.require(*environment.EXPORTING, "openvino")
    installed[package] = right
    environment.require(package)
    assert BranchyNet(nn.Linear(2, 2), {}).num_exits == 1


@pytest.mark.parametrize(("runtime", "package"), [("onnxruntime", "onnxruntime"), ("openvino", "openvino")])
def test_load_asks_for_its_own_runtime_alone(installed, tmp_path, runtime, package):
    (tmp_path / "model.onnx").write_bytes(b"no matter")
    installed |= {"torch": "1.0", "onnxruntime": "1.0", "openvino": "2020.1"}
    with pytest.raises(VersionError, match=f"^{package} "):
        load(tmp_path / "model.onnx", runtime=runtime)


def test_all_that_is_asked_for_is_stated():
    assert {*environment.EXPORTING, "openvino"} <= {Requirement(one).name for one in STATED}
    environment.require(*environment.EXPORTING)
    assert torch.__version__


def test_the_lowest_versions_are_those_stated():
    pins = re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "constraints-lowest.txt").read_text(), flags=re.MULTILINE)
    for one in map(Requirement, STATED):
        if one.name == "schemathesis":  # the extra `fuzz` cannot be installed beside the lowest versions of `dev`
            continue
        least = next(Version(s.version) for s in one.specifier if s.operator == ">=")
        assert least in [Version(pin) for name, pin in pins if name == one.name], one
