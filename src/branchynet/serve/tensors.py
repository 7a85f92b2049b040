"""Tensors of the Open Inference Protocol, as bytes and in JSON."""

import math
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

_NUMPY = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}
DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(kind) for name, kind in _NUMPY.items()}
"""numpy's dtype of each datatype of the protocol, except BYTES."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_DIMENSIONS = 32


def from_bytes(name: str, datatype: Any, shape: Any, data: bytes | memoryview) -> NDArray[Any]:
    """Return a tensor from its bytes, little-endian and in row-major order. Raises `InputError`."""
    dtype, sizes = _dtype(name, datatype), _shape(name, shape)
    count = math.prod(sizes)
    if len(data) != count * dtype.itemsize:
        raise InputError(
            f"input {name!r} has {len(data)} bytes, but {datatype} {list(sizes)} needs {count * dtype.itemsize}"
        )
    if dtype == np.bool_ and count and np.frombuffer(data, np.uint8).max() > 1:
        raise InputError(f"input {name!r} has bytes other than 0 and 1, which are not BOOL")
    return check_numbers(name, np.frombuffer(data, dtype).reshape(sizes))


def check_numbers(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Return an array. Raises `InputError` if it holds NaN, for which a network has no meaningful answer."""
    if array.dtype.kind == "f" and array.size and math.isnan(np.minimum.reduce(array, axis=None)):
        row = int(np.isnan(array.reshape(len(array), -1)).any(axis=1).argmax())
        raise InputError(f"input {name!r} holds NaN at sample {row}; leave that sample out, or give numbers")
    return array


def from_json(entry: Mapping[str, Any], name: str) -> NDArray[Any]:
    """Return a tensor from an object with ``datatype``, ``shape`` and ``data``, flat or nested. Raises `InputError`."""
    dtype, sizes = _dtype(name, entry.get("datatype")), _shape(name, entry.get("shape"))
    data = entry.get("data")
    if not isinstance(data, list):
        raise InputError(f"input {name!r} needs data, a list of numbers, or binary_data_size; got {shown(data)}")
    try:
        found = np.array(data) if data else np.empty(0)
        if found.dtype.kind == "f" and dtype == np.uint64:  # numpy's choice if some are above int64
            found = _whole(data, found)
    except (ValueError, OverflowError):
        raise InputError(f"the data of input {name!r} are ragged: the lists in them have different lengths") from None
    allowed = {"b": "b", "f": "fiu"}.get(dtype.kind, "iu")
    if data and found.dtype.kind not in allowed:
        held = {"O": "null, text or objects", "U": "text", "b": "booleans", "f": "fractions"}.get(found.dtype.kind)
        raise InputError(f"the data of input {name!r} hold {held or found.dtype}, not {entry['datatype']}")
    if found.size != math.prod(sizes) or (found.ndim > 1 and found.shape != sizes):
        got = list(found.shape) if found.ndim > 1 else f"{found.size} numbers"
        raise InputError(f"input {name!r} has the shape {list(sizes)}, but its data are {got}")
    with np.errstate(over="ignore"):
        array = found.astype(dtype).reshape(sizes)
    if dtype.kind in "iu" and not (array == found.reshape(sizes)).all():
        raise InputError(f"the data of input {name!r} hold numbers outside the range of {entry['datatype']}")
    if dtype.kind == "f" and not np.isfinite(check_numbers(name, array)).all():
        raise InputError(f"the data of input {name!r} hold numbers outside the range of {entry['datatype']}")
    return array


def _whole(data: list[Any], found: NDArray[Any]) -> NDArray[Any]:
    """Return numbers as UINT64 if they are whole and fit, else as they were found."""
    values = np.array(data, object)
    fits = all(type(v) is int and 0 <= v < 1 << 64 for v in values.ravel())
    return values.astype(np.uint64) if fits else found


def _dtype(name: str, datatype: Any) -> np.dtype[Any]:
    if not isinstance(datatype, str) or datatype not in DTYPES:
        raise InputError(f"input {name!r} has the datatype {shown(datatype)}; give one of {', '.join(DTYPES)}")
    return DTYPES[datatype]


def _shape(name: str, shape: Any) -> tuple[int, ...]:
    right = isinstance(shape, list) and 0 < len(shape) <= _MOST_DIMENSIONS
    if not right or any(type(n) is not int or n < 0 for n in shape):
        raise InputError(f"input {name!r} has the shape {shown(shape)}; give a list of sizes, the batch first")
    return tuple(shape)


def text_bytes(array: NDArray[Any]) -> bytes:
    """Return the bytes of an array of text: the length of each in 4 bytes, then its UTF-8."""
    return b"".join(len(data).to_bytes(4, "little") + data for data in (str(text).encode() for text in array.ravel()))


def shown(value: Any) -> str:
    """Show the start of a value of a request."""
    text = reprlib.repr(value)
    return text[:60] + ("…" if len(text) > 60 else "")
