"""Which run folders may run the function that they name as their network.

A run folder from elsewhere may name any function. The user's cache folder therefore holds the trusted pairs of folder
and function, together with the content of the function's module if it is in the current folder.
"""

import contextlib
import hashlib
import importlib
import os
from importlib.machinery import PathFinder
from pathlib import Path

from ..errors import InputError


def remember(folder: str | os.PathLike[str], function: str) -> None:
    """Trust `folder` to run `function` from now on; does nothing if the cache folder is not writable."""
    with contextlib.suppress(OSError):
        _place().mkdir(parents=True, exist_ok=True)
        (_place() / _key(folder, function)).touch()


def check_trust(folder: str | os.PathLike[str], function: str, trust: bool) -> None:
    """Raise `InputError` if `folder` is not trusted to run `function`; `trust` makes it trusted from now on."""
    if trust:
        remember(folder, function)
    elif not (_place() / _key(folder, function)).is_file():
        raise InputError(
            f"opening {folder} runs the function {function!r} that it names as its network, but the folder was not "
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
    """The files of the current folder that importing `module` by its name runs; runs nothing itself."""
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
