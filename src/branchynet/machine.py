"""What a number was measured on: versions and hardware, to stand beside it."""

import contextlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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
