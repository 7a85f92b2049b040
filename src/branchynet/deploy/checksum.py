"""A checksum at the end of an exported file, to detect damage when the file is opened.

It is a metadata entry of the model, appended to the finished file. Consecutive protobuf messages are merged, so every
ONNX reader still reads the file. The entry also holds the length of the file before it: if a tool rewrites the model,
the length changes, and the checksum no longer applies. The checksum of weights in a second file is in the metadata.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FileError

KEY = "branchynet_sha256"


def seal(path: str | os.PathLike[str]) -> None:
    """Append a file's checksum to the file."""
    size = Path(path).stat().st_size
    entry = _entry(size, sha256(path, size))
    with Path(path).open("ab") as stream:
        stream.write(entry)


def check_seal(path: str | os.PathLike[str]) -> str | None:
    """Compare a file with its checksum and return the checksum; None if the file has none.

    Raises:
        FileError: they disagree, or the file cannot be read.
    """
    try:
        size = Path(path).stat().st_size - _LENGTH
        if size < 0:
            return None
        with Path(path).open("rb") as stream:
            stream.seek(size)
            entry = stream.read()
        head = _entry(size, "")[-21:]  # the length of the file, and a space
        if KEY.encode() not in entry or head not in entry:
            return None
        if entry == _entry(size, digest := sha256(path, size)):
            return digest
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    raise FileError(
        f"{path} is damaged, or was changed in place: its content does not have the SHA-256 stored in it; copy or "
        f"export it again (a tool that changes a file on purpose must remove the metadata entry {KEY!r})"
    )


def check_weights(path: str | os.PathLike[str], metadata: Mapping[str, Any]) -> None:
    """Compare the file of weights beside a model with the model's metadata, if it has one.

    Raises:
        FileError: it is missing or damaged, or the metadata do not describe it.
    """
    if (about := metadata.get("weights")) is None:
        return
    try:
        name, size, digest = str(about["file"]), int(about["bytes"]), about["sha256"]
        if Path(name).name != name:
            raise ValueError(f"{name!r} is not the name of a file")
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"the metadata of {path} describe its weights wrongly ({error}); export it again") from error
    weights = Path(path).parent / name
    try:
        right = weights.stat().st_size == size and sha256(weights) == digest
    except OSError as error:
        raise FileError(
            f"{path} keeps its weights in {name}, which cannot be read ({error.strerror or error}); put that file "
            "next to it"
        ) from error
    if not right:
        raise FileError(f"{weights}, which holds the weights of {path}, is damaged; copy both again, or export again")


def _entry(size: int, digest: str) -> bytes:
    """Return the entry in protobuf, with all lengths below 128: field 14 of a ModelProto, with a key and a value."""
    key, value = KEY.encode(), f"{size:020d} {digest}".encode()
    pair = b"\x0a%c%b\x12%c%b" % (len(key), key, len(value), value)
    return b"\x72%c%b" % (len(pair), pair)


_LENGTH = len(_entry(0, hashlib.sha256().hexdigest()))


def sha256(path: str | os.PathLike[str], size: int | None = None) -> str:
    """Return the SHA-256 of a file, or of its first `size` bytes."""
    digest, left = hashlib.sha256(), Path(path).stat().st_size if size is None else size
    with Path(path).open("rb") as stream:
        while left > 0 and (chunk := stream.read(min(left, 1 << 20))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()
