"""Write several files, in a folder or as a model with its weights, whole or not at all."""

import contextlib
import ctypes
import glob
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from .errors import FileError
from .files import WEIGHTS, check_path, fcntl, finish, make_folder, new_partial, partial, writable


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike[str], known_by: str, others: str) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, and rename it to `path` if the block succeeds.

    An earlier folder of the same kind is replaced. Folders that killed processes left for `path` are removed.

    Args:
        path: the folder to write.
        known_by: the name of a file that such a folder holds.
        others: a regular expression for the names of its other files. A folder that lacks the file `known_by`, or holds
            anything else, is not replaced, unless it is empty.

    Raises:
        FileError: the folder cannot be written, or `path` is something else.
    """
    check_path(path, "write")
    final = Path(os.path.realpath(path))
    if final in (here := Path.cwd(), *here.parents):
        raise FileError(f"cannot write {path}: it is the current folder, or holds it; give the path of a new folder")
    make_folder(final.parent, path)
    with partial(final, path, folder=True) as temporary:
        _check_replaceable(final, path, known_by, others)
        yield temporary
        finish(temporary)
        _exchange(temporary, final)


@contextlib.contextmanager
def replacing_with_weights(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path for a model, and move it and the weights beside it to `path` if the block succeeds.

    The weights, in files named after the model and their content, move first; the model moves last. An earlier model
    and its weights are valid until then; its weights are removed afterwards.

    Raises:
        FileError: the files cannot be written, or `path` is a folder, pipe, socket or device.
    """
    final = writable(path)
    moved: list[Path] = []
    with partial(final, path, folder=True) as temporary:
        model = temporary / final.name
        yield model
        finish(temporary)
        weights = [file for file in temporary.iterdir() if file != model]
        with contextlib.ExitStack() as held:
            try:
                for file in weights:
                    _hold(file, held)
                    place = final.with_name(file.name)
                    if not place.exists():
                        moved.append(place)
                    file.replace(place)
                model.replace(final)
            except OSError:
                for place in moved:
                    place.unlink(missing_ok=True)
                raise
        remove_weights(final, {file.name for file in weights})


def remove_weights(path: str | os.PathLike[str], keep: Collection[str] = ()) -> None:
    """Remove the weights of earlier models at `path`, except files named in `keep` or held by a running export."""
    final = Path(os.path.realpath(path))
    pattern = re.compile(rf"{re.escape(final.name)}\.[0-9a-f]{{16}}{re.escape(WEIGHTS)}")
    for file in final.parent.glob(f"{glob.escape(final.name)}.*{WEIGHTS}"):
        if pattern.fullmatch(file.name) and file.name not in keep:
            with contextlib.suppress(OSError), contextlib.ExitStack() as held:  # held, or removed meanwhile
                _hold(file, held)
                file.unlink()


def _hold(file: Path, until: contextlib.ExitStack) -> None:
    """Lock a file until the stack is closed. Raise `OSError` if another process holds it."""
    if fcntl is not None:
        handle = os.open(file, os.O_RDONLY)
        until.callback(os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _check_replaceable(final: Path, path: str | os.PathLike[str], known_by: str, others: str) -> None:
    """Raise `FileError` if something that is not a folder of this kind is at `final`."""
    if final.exists():
        names = {entry.name for entry in final.iterdir()} if final.is_dir() else {""}
        if names and known_by not in names:
            raise FileError(f"cannot write {path}: it exists and holds no {known_by}; give the path of a new folder")
        if foreign := sorted(name for name in names - {known_by} if not re.fullmatch(others, name)):
            raise FileError(
                f"cannot replace {path}: it also holds {foreign[0]!r}; remove that, or give the path of a new folder"
            )


def _exchange(new: Path, final: Path) -> None:
    """Rename `new` to `final`. An earlier `final` gets the name of `new`, in one step where the system can do that."""
    with contextlib.suppress(OSError):  # `final` is there, or another process has just written it
        new.rename(final)
        return
    if _swapped(new, final):
        return
    old = new_partial(final, folder=True)
    final.replace(old)
    try:
        new.rename(final)
    except OSError:
        old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _swapped(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step. Return whether this system can do that."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
