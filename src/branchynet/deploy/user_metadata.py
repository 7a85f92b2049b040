"""Turn class names and preprocessing into plain JSON values for a file's metadata."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..argument_checks import ordered
from ..errors import InputError


def class_names(labels: Sequence[str] | None) -> list[str]:
    """Return the names as a list, empty for None. Raise `InputError` for a string or an unordered collection."""
    if labels is None:
        return []
    return [str(label) for label in ordered("labels", labels, "give a list of class names in the order of the classes")]


def plain_values(preprocessing: Mapping[str, Any] | None) -> Any:
    """Return a copy with Python numbers and lists instead of numpy's and torch's.

    Raises:
        InputError: it holds a value that JSON cannot store.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
            return value.tolist()
        raise TypeError(f"it holds {value!r} of type {type(value).__name__}")

    try:
        return json.loads(json.dumps(preprocessing, default=plain, allow_nan=False))
    except (TypeError, ValueError) as error:  # also for other types of keys, and circular references
        raise InputError(
            f"preprocessing= cannot be kept in a file: {error}; give numbers, strings, lists and dicts"
        ) from error
