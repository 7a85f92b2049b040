"""Checks of arguments. Every message names the argument, what was given, and what to give instead."""

import contextlib
import math
import operator
from collections.abc import Mapping, Sequence, Set
from typing import Any

from .errors import InputError


def instance(name: str, value: Any, kinds: type[Any] | tuple[type[Any], ...], remedy: str) -> None:
    """Raise `InputError` unless `value` is of one of the `kinds`."""
    if not isinstance(value, kinds):
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        wanted = " or ".join("None" if kind is type(None) else _with_article(kind.__name__) for kind in kinds)
        raise InputError(f"{name} must be {wanted}; got {described(value)}: {remedy}")


MOST_SEED = 2**32 - 1  # the limit of numpy's legacy generator


def check_seed(seed: Any) -> int:
    """Return `seed` as an int. Raises `InputError` unless it is a whole number from 0 to 2^32 - 1."""
    return whole("seed", seed, 0, MOST_SEED)


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return `value` as an int. Raises `InputError` unless it is a whole number from `least` to `most`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be a whole number; got {described(value)}") from None
    if number < least:
        few = "must not be negative" if least == 0 else f"must be at least {least}"
        raise InputError(f"{name} {few}; got {number}")
    if most is not None and number > most:
        raise InputError(f"{name} must be at most {most}; got {number}")
    return number


def real(name: str, value: Any) -> float:
    """Return `value` as a float. Raises `InputError` unless it is one finite real number."""
    if not isinstance(value, (str, bytes, bool)) and not getattr(value, "ndim", 0):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            if math.isfinite(number := float(value)):
                return number
    raise InputError(f"{name} must be a finite number; got {described(value)}")


def above_zero(name: str, value: Any) -> float:
    """Return `value` as a float. Raises `InputError` unless it is one finite number above 0."""
    number = real(name, value)
    if number <= 0:
        raise InputError(f"{name} must be above 0; got {number:g}")
    return number


def ordered(name: str, value: Any, remedy: str) -> tuple[Any, ...]:
    """Return the entries of `value` as a tuple. Raises `InputError` unless it is ordered, such as a list."""
    with contextlib.suppress(TypeError):  # not iterable, such as a 0-dimensional array
        if not isinstance(value, (str, bytes, Set, Mapping)):
            return tuple(value)
    raise InputError(f"{name} must be a list; got {described(value)}: {remedy}")


def threshold_list(thresholds: Any) -> tuple[float | None, ...]:
    """Return thresholds as floats, with None for never. Raises `InputError` for anything else; NaN is valid."""
    given = ordered("thresholds", thresholds, "give a number for each exit except the last, or None for never")
    try:
        if any(isinstance(t, (str, bytes, bool)) for t in given):
            raise TypeError
        return tuple(None if t is None else float(t) for t in given)
    except (TypeError, ValueError, OverflowError):
        wrong = next((t for t in given if t is not None and type(t) not in (int, float)), given)
        raise InputError(f"thresholds must be numbers, or None for never; got {described(wrong)}") from None


def function(name: str, value: Any, signature: str) -> None:
    """Raise `InputError` unless `value` is callable; a class is refused, because an object of it is meant."""
    if isinstance(value, type) or not callable(value):
        remedy = f": give {value.__name__}()" if isinstance(value, type) else ""
        raise InputError(f"{name} must be a function {signature}; got {described(value)}{remedy}")


def check_fraction(name: str, limit: float) -> None:
    """Raise `InputError` for a limit on a loss of accuracy that nothing can exceed."""
    if limit >= 1:
        raise InputError(
            f"{name}={limit:g} limits nothing: it is a fraction; give {min(limit, 100.0) / 100:g} for {limit:g}%"
        )


def described(value: Any) -> str:
    """Describe a value for a message, such as ``float32 (8, 3, 32, 32)`` or ``an ExitCost``."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        array = "" if type(value).__module__.startswith("torch") else "a numpy array, "
        return f"{array}{dtype_name(value.dtype)} {tuple(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = repr(value) if value is None or isinstance(value, (str, int, float, tuple, list)) else ""
    return text if 0 < len(text) < 60 else _with_article(type(value).__name__)


def has_sizes(shape: Sequence[int], wanted: Sequence[Any]) -> bool:
    """Whether a shape has the wanted sizes. None and symbols match any size."""
    return len(shape) == len(wanted) and all(
        not isinstance(want, int) or have == want for have, want in zip(shape, wanted, strict=True)
    )


def dtype_name(dtype: Any) -> str:
    """Return the name of a numpy or PyTorch dtype, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def _with_article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def in_order(keywords: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    """Return inputs, by their names in the network's forward, in the order of the inputs `names` of its graph.

    `branchynet.graph.onnx_flat.input_names` may have appended underscores to `names`.

    Raises:
        InputError: an input is missing or unknown.
    """
    left, found = dict(keywords), []
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
