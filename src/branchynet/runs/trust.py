"""Which functions of run folders may run: those that this user named, and those of folders that the user trusts.

A run folder made elsewhere may name any function as its network. So the user's cache folder remembers which folder may
run which function, with which content where its module lies in the current folder: what a folder holds proves nothing.
"""

import contextlib
import hashlib
import importlib
import os
from importlib.machinery import PathFinder
from pathlib import Path

from ..errors import InputError


def remember(folder: str | os.PathLike[str], function: str) -> None:
    """Let `folder` run `function` from now on, unless nothing can be kept in the cache folder."""
    with contextlib.suppress(OSError):
        _place().mkdir(parents=True, exist_ok=True)
        (_place() / _key(folder, function)).touch()


def check_trust(folder: str | os.PathLike[str], function: str, trust: bool) -> None:
    """Raises `InputError` where `folder`, as it lies there, may not run `function`; with `trust` it may from now on."""
    if trust:
        remember(folder, function)
    elif not (_place() / _key(folder, function)).is_file():
        raise InputError(
            f"to open {folder} runs the function {function!r} that it names as its network, but the folder was not "
            "made here, was moved or copied, or the function's module has changed; if you trust it, add --trust once "
            "(in Python, open_run(..., trust=True))"
        )


def _place() -> Path:
    import pooch

    return Path(pooch.os_cache("branchynet")) / "trusted"


def _key(folder: str | os.PathLike[str], function: str) -> str:
    parts = [os.fsencode(Path(folder).resolve()), function.encode("utf-8", "surrogatepass")]
    parts += [file.read_bytes() for file in _sources(function.partition(":")[0])]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def _sources(module: str) -> list[Path]:
    """The files of the current folder that the import of `module` runs, as far as its name tells; nothing is run."""
    importlib.invalidate_caches()
    found, places, names = [], [str(Path.cwd())], module.split(".")
    for n in range(len(names)):
        spec = PathFinder.find_spec(".".join(names[: n + 1]), places)
        if spec is None:
            break
        if spec.origin and Path(spec.origin).is_file():
            found.append(Path(spec.origin))
        places = list(spec.submodule_search_locations or ())
    return found
