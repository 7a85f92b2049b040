"""The versions of other packages that BranchyNet works with, as pyproject.toml states them.

pip installs others where it is told to, with ``--no-deps`` for example. The errors that follow name everything but the
version, and come when a network is exported, after its training. So the verbs ask again before they start.
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


@cache  # which keeps no error
def require(*packages: str) -> None:
    """Check installed packages against the versions that BranchyNet works with; those not installed are passed over.

    Raises:
        VersionError: a package is installed in another version.
    """
    from packaging.version import Version

    for package in packages:
        try:
            installed = version(package)
        except PackageNotFoundError:  # or it is there under another name, such as onnxruntime-gpu
            continue
        wanted = _wanted()[package]
        # The local part and the pre-release tag of a vendor's own build say nothing of what it can do.
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


_PACKAGES = ("branchynet", "torch", "onnxruntime", "openvino", "onnx", "numpy")


def environment() -> dict[str, str | int]:
    """Versions of Python and the packages that matter, the processor's name and the number of its cores."""
    found: dict[str, str | int] = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # OpenVINO need not be there
            found[name] = version(name)
    return found | {"processor": processor(), "cores": os.cpu_count() or 1, "system": platform.system()}


def processor() -> str:
    """The processor's name, such as ``AMD EPYC 7B13``."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


__version__ = version("branchynet")
