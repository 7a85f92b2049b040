"""Telling samples apart, so that a promise stands on samples that nothing before it was fitted to or selected on.

A sample's digest is of its input, or of what the network answered where the input is not known. A set of samples is
known by its sketch, the smallest of its digests: since digests are as good as random, they are a random sample of the
set, and the share of them that lies in another set estimates how much the two have in common.

Source: Broder 1997, On the resemblance and containment of documents, doi:10.1109/SEQUEN.1997.666900 (bottom-k sketch).
"""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

Digests = NDArray[np.uint64]

_KEPT = 32  # digests a sketch
_WIDTH = 16  # hexadecimal digits a digest
SHARED = 0.125
"""Sets of which one has so much of another's sketch share samples: a few equal pictures in a data set do not."""

REPEATED = 0.05
"""So many distinct samples that occur again, as a share of all, are no chance: the same data were recorded twice."""


def digests(*arrays: NDArray[Any]) -> Digests:
    """`(S,)` of samples whose values are the rows of `arrays`, each `(S, ...)`."""
    rows = [np.ascontiguousarray(a).reshape(len(a), -1).view(np.uint8) for a in arrays]
    joined = rows[0] if len(rows) == 1 else np.hstack(rows)
    return np.frombuffer(b"".join(hashlib.blake2b(row.data, digest_size=8).digest() for row in joined), np.uint64)


def sketch(found: Digests) -> str:
    """The smallest digests of a set, as hexadecimal digits."""
    return "".join(f"{int(digest):0{_WIDTH}x}" for digest in np.unique(found)[:_KEPT])


def is_sketch(value: Any) -> bool:
    """Whether `value` is what `sketch` gives, or empty."""
    return isinstance(value, str) and not len(value) % _WIDTH and not set(value) - set("0123456789abcdef")


def shared(known: str, found: Digests) -> bool:
    """Whether the set of that sketch has many of its samples among `found`; of an empty sketch nothing is known."""
    kept = np.array([int(known[i : i + _WIDTH], 16) for i in range(0, len(known), _WIDTH)], np.uint64)
    return bool(len(kept)) and float(np.isin(kept, found).mean()) >= SHARED


def repeated(found: NDArray[Any]) -> float:
    """Distinct values that occur more than once, as a share of all `(S,)`."""
    return float((np.unique(found, return_counts=True)[1] > 1).sum() / len(found))
