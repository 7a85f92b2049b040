"""Write and read archives of arrays (``.npz``), without pickle and with a limit on what they unpack to."""

import os
import struct
import zipfile
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

_ANY = 1 << 28  # bytes that any archive may unpack to
_RATIO = 100  # or so many times its own size; deflate reaches 1,032 for zeros, and about 1 for logits
_END = struct.Struct("<4s6xH10x")  # the end of a ZIP archive: its mark and its number of files


def most_unpacked(size: int) -> int:
    """Return how many bytes an archive of `size` bytes may unpack to."""
    return max(_ANY, _RATIO * size)


def write_arrays(stream: IO[bytes], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays that `read_arrays` reads: compressed, unless they would unpack to far more than the file."""
    np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    if sum(array.nbytes for array in arrays.values()) > most_unpacked(stream.tell()) // 2:
        stream.seek(0)
        stream.truncate()
        np.savez(stream, **arrays)  # type: ignore[arg-type]


def read_arrays(stream: IO[bytes], most: int) -> dict[str, NDArray[Any]]:
    """Return the arrays of an archive by name.

    Raises:
        ValueError: it is no archive of arrays, or would unpack to more than `most` bytes; it is then not unpacked.
        Exception: numpy and zipfile raise many kinds for a damaged archive.
    """
    if not zipfile.is_zipfile(stream):
        raise ValueError("it is not an .npz file")
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
    stream.seek(-_END.size, os.SEEK_END)
    if _END.unpack(stream.read(_END.size)) != (b"PK\5\6", len(entries)):  # zipfile does not compare the number
        raise ValueError("its table of contents is damaged")
    size = sum(entry.file_size for entry in entries)  # zipfile reads no more than that, if it unpacks in pieces
    if size > most:
        raise ValueError(f"it would unpack to {size} bytes, more than {most}")
    if {entry.compress_type for entry in entries} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise ValueError("it is compressed by another method than deflate")
    stream.seek(0)
    with np.load(stream, allow_pickle=False) as stored:
        return dict(stored)
