"""Write files atomically, and read them with checks: damaged or unreadable files raise `FileError`."""

import contextlib
import glob
import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .argument_checks import instance
from .errors import FileError, InputError, printable

try:
    import fcntl
except ImportError:  # on Windows, temporary files of killed processes are not removed
    fcntl = None

AnyPath = str | os.PathLike[str]
WEIGHTS = ".weights"  # ends the name of a file of weights beside a model
MOST_JSON = 1 << 28  # bytes; the JSON files of this library are far smaller


@contextlib.contextmanager
def replacing(path: AnyPath) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, and rename it to `path` if the block succeeds.

    If the process is killed or the power fails, the previous file does not change: the content reaches the disk before
    it gets its name. The temporary name has the suffix of `path`, because some writers look at it. Temporary files that
    killed processes left for `path` are removed. For a symbolic link, the target is replaced.

    Raises:
        FileError: the folder cannot be created, the file cannot be written (disk full, no permission), or `path` is a
            folder, pipe, socket or device.
    """
    final = writable(path)
    with partial(final, path) as temporary:
        yield temporary
        finish(temporary)
        temporary.replace(final)


@contextlib.contextmanager
def partial(final: Path, path: AnyPath, *, folder: bool = False) -> Iterator[Path]:
    """Yield a temporary file or folder beside `final`, locked meanwhile, and remove it if it is still there afterwards.

    Those that killed processes left for `final` are removed first. An error of the system becomes a `FileError` that
    names `path`.
    """
    temporary = handle = None
    try:
        remove_partial(final)
        temporary, handle = _claimed(final, folder)
        yield temporary
        with contextlib.suppress(OSError):  # not every system can sync a folder
            _sync(final.parent, os.O_RDONLY)
    except FileError:
        raise
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        if temporary is not None:
            _discard(temporary)
        if handle is not None:
            os.close(handle)


def finish(temporary: Path) -> None:
    """Write a file, or all files of a folder, to the disk, and give them the permissions of ordinary ones."""
    os.umask(mask := os.umask(0))
    folder = temporary.is_dir()
    for file in temporary.iterdir() if folder else [temporary]:
        _sync(file, os.O_RDWR)
        file.chmod(0o666 & ~mask)
    if folder:
        temporary.chmod(0o777 & ~mask)


def writable(path: AnyPath) -> Path:
    """Return the regular file that `path` names, which need not exist, and create its folder. Raises `FileError`."""
    check_path(path, "write")
    final = Path(path)
    try:
        if final.is_symlink():
            final = Path(os.path.realpath(final))
        make_folder(final.parent, path)
        with contextlib.suppress(FileNotFoundError):
            if what := _no_file(final.stat().st_mode):
                raise FileError(f"cannot write {path}: it is {what}; give the path of a regular file")
    except FileError:
        raise
    except OSError as error:
        raise _unwritable(path, error) from error
    return final


def check_path(path: AnyPath, use: str = "use") -> None:
    """Raise `InputError` unless `path` is a path of text, and `FileError` if no file or folder can be there."""
    instance("path", path, (str, os.PathLike), "give the name of a file or folder")
    if not isinstance(text := os.fspath(path), str):
        raise InputError(f"path must be text; got {text!r}: give os.fsdecode(path)")
    if not text:  # Python's current folder
        raise FileError("an empty path names no file or folder; give its name, or . for the current folder")
    try:
        Path(path).lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # too long, no permission; with a null byte, or characters of no file
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"cannot {use} {printable(text)}: {reason}; give another path") from error


def check_utf8(path: AnyPath) -> None:
    """Raise `FileError` unless `path` is valid UTF-8, which runtimes need to open a file."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise FileError(
            f"the path {printable(os.fspath(path))} is not valid UTF-8, so no runtime can open it; rename it"
        ) from error


def check_folder(path: AnyPath) -> None:
    """Raise `FileError` if `path` is empty, or exists and is not a folder."""
    check_path(path)
    if Path(path).exists() and not Path(path).is_dir():
        raise FileError(f"{path} is a file, not a folder; give the path of a run's folder")


def make_folder(folder: AnyPath, path: AnyPath | None = None) -> None:
    """Create a folder and its parents, to write `path` in it. Raises `FileError`."""
    path = folder if path is None else path
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        above = (Path(folder), *Path(folder).parents)
        file = next((p for p in above if os.path.lexists(p) and not p.is_dir()), folder)
        raise FileError(f"cannot write {path}: {file} is a file, not a folder; choose another folder") from error
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: AnyPath, error: Exception) -> FileError:
    reason, shown = getattr(error, "strerror", None) or error, printable(os.fspath(path))
    return FileError(f"cannot write {shown}: {reason}; free some space or choose another folder")


def _no_file(mode: int) -> str:
    """Say what a path with this mode is; empty for a regular file."""
    if stat.S_ISREG(mode):
        return ""
    return "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"


def remove_partial(path: AnyPath) -> None:
    """Remove the temporary files and folders of `path` that no running process is writing."""
    if fcntl is None:
        return
    final = Path(path)
    for found in final.parent.glob(f".{glob.escape(final.stem)}-*.partial{glob.escape(final.suffix)}"):
        with contextlib.suppress(OSError):  # locked by its writer, removed meanwhile, or owned by another user
            handle = os.open(found, os.O_RDONLY | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _discard(found)
            finally:
                os.close(handle)


def _discard(temporary: Path) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        temporary.unlink(missing_ok=True)


def new_partial(final: Path, *, folder: bool) -> Path:
    """Create a temporary file or folder for `final`, beside it."""
    names: Any = {"prefix": f".{final.stem}-", "suffix": f".partial{final.suffix}", "dir": final.parent}
    if folder:
        return Path(tempfile.mkdtemp(**names))
    handle, name = tempfile.mkstemp(**names)
    os.close(handle)
    return Path(name)


def _claimed(final: Path, folder: bool) -> tuple[Path, int | None]:
    """Create a temporary file or folder, locked until its handle is closed or the process ends."""
    while True:
        place = new_partial(final, folder=folder)
        if fcntl is None:
            return place, None  # Windows cannot rename an open file
        with contextlib.suppress(FileNotFoundError):  # another process removed it before it was locked
            handle = os.open(place, os.O_RDONLY if folder else os.O_RDWR)
            with contextlib.suppress(OSError):  # a file system without locks: `remove_partial` then removes nothing
                fcntl.flock(handle, fcntl.LOCK_EX)
            if os.fstat(handle).st_nlink:
                return place, handle
            os.close(handle)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(folder: AnyPath) -> Iterator[None]:
    """Hold the lock of `folder`, a file ``.lock`` in it, so that two processes cannot write the same run.

    The same thread may lock a folder again. When a process ends for any reason, its locks are released.

    Raises:
        FileError: another process or thread holds the lock, or the folder cannot be written.
    """
    import filelock

    check_path(folder)
    path = Path(folder).resolve() / ".lock"
    try:
        make_folder(path.parent, path)
        lock = filelock.FileLock(path, timeout=0, is_singleton=True)
        lock.acquire()
    except filelock.Timeout as error:
        what = "another process or thread is training in it"
        raise FileError(f"{folder} is in use: {what}; wait until it ends, or use another folder") from error
    except FileError:
        raise
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        yield
    finally:
        lock.release()


def regular(path: AnyPath) -> Path:
    """Return `path` as a `Path`. Raises `FileError` unless it is a regular file: reading a pipe could block forever."""
    check_path(path, "read")
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    if what := _no_file(mode):
        raise FileError(f"cannot read {path}: it is {what}; give the path of a regular file")
    return Path(path)


def copy_file(source: AnyPath, path: AnyPath) -> None:
    """Copy a file, whole or not at all. Raises `FileError`."""
    with replacing(path) as temporary:
        shutil.copyfile(regular(source), temporary)


def write_json(path: AnyPath, value: Any) -> None:
    """Write `value` atomically as indented JSON. Raises `FileError`."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: AnyPath) -> Any:
    """Read a JSON file. Raises `FileError` if it is missing, is not JSON, or is larger than `MOST_JSON` bytes."""
    try:
        size = regular(path).stat().st_size
        if size > MOST_JSON:
            raise ValueError(f"{size} bytes, more than {MOST_JSON}")
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise FileError(f"{path} is not valid JSON ({error}); it may be truncated: make it again") from error


def parse_json(text: str, *, finite: bool = True) -> Any:
    """Parse JSON. Raises `ValueError` if `text` is not JSON, or contains NaN or infinity while `finite` is true."""
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite) if finite else json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"it contains {text}, which is not a finite number")
    return value


def checksum(parts: Iterable[tuple[str, Any]]) -> str:
    """Return the SHA-256 of named contents in the given order; each is text or contiguous bytes (an array)."""
    digest = hashlib.sha256()
    for name, content in parts:
        content = memoryview(content.encode() if isinstance(content, str) else content)
        digest.update(f"{len(name)}:{name}={content.nbytes}:".encode())
        digest.update(content)
    return digest.hexdigest()


def check_checksum(
    path: AnyPath, stored: Any, parts: Iterable[tuple[str, Any]], remedy: str = "copy it again, or make it again"
) -> None:
    """Raise `FileError` if the checksum of `parts` is not `stored`."""
    if checksum(parts) != stored:
        raise FileError(f"{path} is damaged or was edited: its content does not have its stored SHA-256; {remedy}")


def write_sealed(path: AnyPath, kind: str, content: dict[str, Any]) -> None:
    """Write an object as JSON, with the checksum of its content. Raises `FileError`."""
    write_json(path, {**content, "sha256": checksum([(kind, json.dumps(content, sort_keys=True))])})


def read_sealed(path: AnyPath, kind: str, remedy: str) -> Any:
    """Read a file that `write_sealed` wrote, and check its checksum if it has one. Raises `FileError`."""
    stored = read_json(path)
    if isinstance(stored, dict) and "sha256" in stored:  # files of earlier versions have no checksum
        known = stored.pop("sha256")
        check_checksum(path, known, [(kind, json.dumps(stored, sort_keys=True))], remedy)
    return stored
