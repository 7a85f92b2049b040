"""Recognize samples, to refuse a promise on samples that were used before to fit or to select.

The digest of a sample is a hash of its input, or of the outputs of the network if the input is unknown. The sketch of a
set of samples holds its smallest digests. Digests behave like random numbers, so a sketch is a random sample of its
set: the share of the sketch that lies in another set estimates the share of the first set that the other one holds.
Conversely, every digest of the other set up to the largest one in the sketch is in the sketch if both sets share it,
which estimates the share of the other set. If all C samples of a set are among the F samples of a sketch, the sketch
shows a Poisson number of them with mean 512 C / F. Fewer than two are taken for chance. So one case in 10^4 goes
unnoticed if C = F / 40, and one in 27 if C = F / 100.

Source: Broder 1997, On the resemblance and containment of documents, doi:10.1109/SEQUEN.1997.666900 (bottom-k sketch).
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Digests = NDArray[np.uint64]

_KEPT = 512  # digests per sketch
_KEPT_BEFORE = 32  # in sketches of earlier versions
_WIDTH = 16  # hexadecimal digits per digest
_FEW = 32  # distinct values of a score such as patience
SHARED = 0.125
"""Two sets share samples if one holds this share of the other. A few equal images in a data set are fewer."""

REPEATED = 0.05
"""A share of copies that is unlikely by chance: the same data were recorded twice."""

COPIED = 0.5
"""With this share of copies, each sample is recorded twice, or distinct ones are so few that copies say nothing."""


def digests(*arrays: NDArray[Any]) -> Digests:
    """Return the digests `(S,)` of samples, from `arrays` with one row per sample, each `(S, ...)`."""
    rows = [np.ascontiguousarray(a).reshape(len(a), -1).view(np.uint8) for a in arrays]
    joined = rows[0] if len(rows) == 1 else np.hstack(rows)
    return np.frombuffer(b"".join(hashlib.blake2b(row.data, digest_size=8).digest() for row in joined), np.uint64)


def sketch(found: Digests) -> str:
    """Return the smallest digests of a set, as hexadecimal digits."""
    return "".join(f"{int(digest):0{_WIDTH}x}" for digest in np.unique(found)[:_KEPT])


def is_sketch(value: Any) -> bool:
    """Return whether `value` is a result of `sketch`, or empty."""
    return isinstance(value, str) and not len(value) % _WIDTH and not set(value) - set("0123456789abcdef")


def share_samples(known: str, found: Digests) -> bool:
    """Return whether `found` holds much of the set with the sketch `known`, or that set much of `found`."""
    if not known:
        return False
    kept = np.array([int(known[i : i + _WIDTH], 16) for i in range(0, len(known), _WIDTH)], np.uint64)
    found = np.unique(found)
    both = int(np.isin(kept, found).sum())
    whole = len(kept) not in (_KEPT, _KEPT_BEFORE)  # the sketch is the set
    seen = len(found) if whole else int((found <= kept.max()).sum())
    return both >= SHARED * len(kept) or (both > 1 and both >= SHARED * seen)


def repeated(found: NDArray[Any]) -> float:
    """Return the share of the digests `(S,)` that are copies of others."""
    return 1 - len(np.unique(found)) / len(found)


def repeated_rows(scores: NDArray[Any], losses: NDArray[Any]) -> float:
    """Return the share of distinct rows that occur again; 0 for scores `(S, N)` with few distinct values."""
    if max(len(np.unique(column)) for column in scores.T) < _FEW:
        return 0.0
    counts = np.unique(digests(scores, losses), return_counts=True)[1]
    return float((counts > 1).mean())


def averaged_fingerprint(network: str, weights: Sequence[Sequence[float]], of: str) -> str:
    """Return the fingerprint of an averaged network from that of the network; `of` changes the structure's part."""
    structure, _, rest = network.partition("-")
    first, second = (hashlib.sha256(repr(part).encode()) for part in ((structure, of), (rest, of, weights)))
    return f"{first.hexdigest()[:12]}-{second.hexdigest()[:12]}"
