"""Telling samples apart, so that a promise stands on samples that nothing before it was fitted to or selected on.

A sample's digest is of its input, or of what the network answered where the input is not known. A set of samples is
known by its sketch, the smallest of its digests: since digests are as good as random, they are a random sample of the
set, and the share of them that lies in another set estimates how much of it that set holds. And all that this set
shares with the known one up to the sketch's largest digest is in the sketch, which estimates how much of this set is
known: of C samples that are all among F known ones, a Poisson number of mean 512 C / F can be seen. Fewer than two seen
are taken for chance, so that one in 10^4 goes unnoticed where C is a fortieth of F, and one in 27 at a hundredth.

Source: Broder 1997, On the resemblance and containment of documents, doi:10.1109/SEQUEN.1997.666900 (bottom-k sketch).
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Digests = NDArray[np.uint64]

_KEPT = 512  # digests a sketch
_KEPT_BEFORE = 32  # in sketches of earlier versions
_WIDTH = 16  # hexadecimal digits a digest
_FEW = 32  # values of a score, such as those of patience
SHARED = 0.125
"""Sets of which so much of either lies in the other share samples: a few equal pictures in a data set do not."""

REPEATED = 0.05
"""So many copies, as a share of all samples, are no chance: the same data were recorded twice."""

COPIED = 0.5
"""So many: each sample stands in the record twice, or there are so few distinct ones that equal ones prove nothing."""


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


def share_samples(known: str, found: Digests) -> bool:
    """Whether much of the set of that sketch lies in `found`, or of `found` in it; an empty one is not known."""
    if not known:
        return False
    kept = np.array([int(known[i : i + _WIDTH], 16) for i in range(0, len(known), _WIDTH)], np.uint64)
    found = np.unique(found)
    both = int(np.isin(kept, found).sum())
    whole = len(kept) not in (_KEPT, _KEPT_BEFORE)  # the sketch is the set
    seen = len(found) if whole else int((found <= kept.max()).sum())
    return both >= SHARED * len(kept) or (both > 1 and both >= SHARED * seen)


def repeated(found: NDArray[Any]) -> float:
    """The share of all `(S,)` that are copies of others."""
    return 1 - len(np.unique(found)) / len(found)


def repeated_rows(scores: NDArray[Any], losses: NDArray[Any]) -> float:
    """The share of distinct rows that occur again; 0 for scores `(S, N)` of few values, which samples share anyway."""
    if max(len(np.unique(column)) for column in scores.T) < _FEW:
        return 0.0
    counts = np.unique(digests(scores, losses), return_counts=True)[1]
    return float((counts > 1).mean())


def averaged_fingerprint(network: str, weights: Sequence[Sequence[float]], of: str) -> str:
    """The fingerprint of a network's averaged answers, from its own: what is averaged is of the structure."""
    structure, _, rest = network.partition("-")
    first, second = (hashlib.sha256(repr(part).encode()) for part in ((structure, of), (rest, of, weights)))
    return f"{first.hexdigest()[:12]}-{second.hexdigest()[:12]}"
