"""What `export` keeps in a file beside the graph: class names and preprocessing, as plain JSON values."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..arguments import ordered
from ..errors import InputError


def class_names(labels: Sequence[str] | None) -> list[str]:
    """The names as a list; none for None. Raises `InputError` for a single string, or what has no order."""
    if labels is None:
        return []
    return [str(label) for label in ordered("labels", labels, "give a list of class names in the order of the classes")]


def plain_values(preprocessing: Mapping[str, Any] | None) -> Any:
    """A copy in which numbers and arrays of numpy and torch are Python's.

    Raises:
        InputError: it holds what JSON cannot keep.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
            return value.tolist()
        raise TypeError(f"it holds {value!r} of type {type(value).__name__}")

    try:
        return json.loads(json.dumps(preprocessing, default=plain))
    except (TypeError, ValueError) as error:  # keys of other types too, and what holds itself
        raise InputError(
            f"preprocessing= cannot be kept in a file: {error}; give numbers, strings, lists and dicts"
        ) from error
