"""What `export` keeps in a file beside the graph: class names and preprocessing, as plain JSON values."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import InputError


def class_names(labels: Sequence[str]) -> list[str]:
    """The names as a list. Raises `InputError` for a single string."""
    if isinstance(labels, str):
        raise InputError(f"labels= takes a list of class names; got the string {labels!r}")
    return [str(label) for label in labels]


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
