"""A checksum at the end of an exported file, to detect damage when the file is opened.

It is a metadata entry of the model, appended to the finished file. Consecutive protobuf messages are merged, so every
ONNX reader still reads the file. The entry also holds the length of the file before it: if a tool rewrites the model,
the length changes, and the checksum no longer applies.
"""

import hashlib
import os
from pathlib import Path

from ..errors import FileError

KEY = "branchynet_sha256"


def seal(path: str | os.PathLike[str]) -> None:
    """Append a file's checksum to the file."""
    size = Path(path).stat().st_size
    entry = _entry(size, _sha256(path, size))
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
        if entry == _entry(size, digest := _sha256(path, size)):
            return digest
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    raise FileError(
        f"{path} is damaged, or was changed in place: its content does not have the SHA-256 stored in it; copy or "
        f"export it again (a tool that changes a file on purpose must remove the metadata entry {KEY!r})"
    )


def _entry(size: int, digest: str) -> bytes:
    """Return the entry in protobuf, with all lengths below 128: field 14 of a ModelProto, with a key and a value."""
    key, value = KEY.encode(), f"{size:020d} {digest}".encode()
    pair = b"\x0a%c%b\x12%c%b" % (len(key), key, len(value), value)
    return b"\x72%c%b" % (len(pair), pair)


_LENGTH = len(_entry(0, hashlib.sha256().hexdigest()))


def _sha256(path: str | os.PathLike[str], size: int) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while size > 0 and (chunk := stream.read(min(size, 1 << 20))):
            digest.update(chunk)
            size -= len(chunk)
    return digest.hexdigest()
