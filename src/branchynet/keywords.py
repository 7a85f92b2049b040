"""Inputs by the names that a network's forward gives them, in the order of an exported graph."""

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import InputError


def in_order(keywords: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    """The entries of a batch by keyword, in the order of an exported graph's inputs.

    Args:
        keywords: inputs by the names that forward gives them.
        names: of the graph's inputs, which may have underscores behind those (see `branchynet.graph.flat.input_names`).

    Raises:
        InputError: other names than the graph's.
    """
    left = dict(keywords)
    found = []
    for name in names:
        key = name
        while key not in left and key.endswith("_"):
            key = key[:-1]
        if key not in left:
            raise InputError(f"the batch has no input {name!r}, only {sorted(keywords)}; it needs {list(names)}")
        found.append(left.pop(key))
    if left:
        raise InputError(f"the batch has inputs {sorted(left)} that the network does not read; it reads {list(names)}")
    return found
