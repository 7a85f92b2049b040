"""Optional dependencies: the extra that installs each, and the error for a missing one."""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .errors import MissingExtraError

# The extra of pyproject.toml that installs each module.
EXTRAS = {
    **dict.fromkeys(
        ("accelerate", "filelock", "onnx_ir", "onnxscript", "rich", "safetensors", "scipy", "torch"), "train"
    ),
    **dict.fromkeys(("PIL", "pooch", "tqdm"), "data"),
    "matplotlib": "report",
    "typer": "cli",
    "onnx": "verify",
    "openvino": "openvino",
    **dict.fromkeys(
        (
            "fastapi",
            "fastapi_offline",
            "httptools",
            "orjson",
            "prometheus_client",
            "python_multipart",
            "uvicorn",
            "uvloop",
        ),
        "serve",
    ),
    **dict.fromkeys(("grpc", "tritonclient"), "grpc"),
    "ray": "ray",
}


@contextlib.contextmanager
def needed_by(what: str, extra: str | None = None) -> Iterator[None]:
    """Raise `MissingExtraError` if the block imports an optional dependency that is not installed.

    Args:
        what: what needs it, such as ``"branchynet.fit"``, for the message.
        extra: the extra that installs everything that the block imports; by default the missing module's.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS:
            raise
        wanted = extra or EXTRAS[module]
        also = "" if wanted == "ray" else ", or 'branchynet[all]' on a machine that trains"
        raise MissingExtraError(
            f"{what} needs {module}, which is not installed: pip install 'branchynet[{wanted}]'{also}"
        ) from error


def first_used(package: str, homes: Mapping[str, Sequence[str]], extra: str | None = None) -> Callable[[str], Any]:
    """Return a ``__getattr__`` that imports names of a `package` on first use.

    `homes` holds the public names in each of its modules; `extra` is that of `needed_by`.
    """
    modules = {name: module for module, names in homes.items() for name in names}

    def getattribute(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with needed_by(f"{package}.{name}", extra):
            value = getattr(importlib.import_module(f".{modules[name]}", package), name)
        setattr(sys.modules[package], name, value)
        return value

    return getattribute
