"""The installed packages and the machine: version checks against pyproject.toml, and a description for results.

pip can install other versions than pyproject.toml allows, for example with ``--no-deps``. Without a check, such a
version would fail only at export, after training, with an error that does not name it.
"""

import contextlib
import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from .errors import VersionError

EXPORTING = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


@cache  # errors are not cached
def require(*packages: str) -> None:
    """Raise `VersionError` if BranchyNet does not work with an installed version of one of the packages."""
    from packaging.version import Version

    for package in packages:
        try:
            installed = version(package)
        except PackageNotFoundError:  # or it has another name, such as onnxruntime-gpu
            continue
        wanted = _wanted()[package]
        # Vendors add local parts and pre-release tags to versions; they say nothing about compatibility.
        if not wanted.contains(Version(installed).base_version):
            raise VersionError(
                f"{package} {installed} does not work with BranchyNet, which needs {package}{wanted}: "
                f"pip install '{package}{wanted}'"
            )


@cache
def _wanted() -> dict[str, Any]:
    from packaging.requirements import Requirement

    stated = map(Requirement, requires("branchynet") or ())
    return {one.name: one.specifier for one in stated if one.specifier}


def environment() -> dict[str, str | int]:
    """Return the versions of Python and the main packages, the processor's name and core count, and the system."""
    found: dict[str, str | int] = {"python": platform.python_version()}
    for name in ("branchynet", "torch", "onnxruntime", "openvino", "onnx", "numpy"):
        with contextlib.suppress(PackageNotFoundError):  # OpenVINO is optional
            found[name] = version(name)
    return found | {"processor": processor(), "cores": os.cpu_count() or 1, "system": platform.system()}


def processor() -> str:
    """Return the processor's name, such as ``AMD EPYC 7B13``."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


__version__ = version("branchynet")
