"""Read dataclasses from JSON. Every field is checked against its annotation."""

import os
import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import FileError
from .files import read_json

T = TypeVar("T")


def from_stored(cls: type[T], value: Any, path: str | os.PathLike[str], made_by: str) -> T:
    """Create an instance of the dataclass `cls` from a JSON object: the inverse of `dataclasses.asdict`.

    Fields are numbers, text, tuples, dicts, dataclasses, classes with a method `from_json`, `Any`, or unions of them.

    Fields with a default may be missing. `made_by` is the call that creates the file, such as ``"choose(...)"``.

    Raises:
        FileError: a field is missing, unknown or of another type, or `cls` refuses the values.
    """
    try:
        return from_fields(cls, value)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise FileError(f"{path} is no {cls.__name__} ({error}); make it with {made_by}") from error


def read_entry(path: str | os.PathLike[str], name: str, kind: Any, made_by: str) -> Any:
    """Return one entry of the JSON object in a file, checked against the annotation `kind`. Raises `FileError`."""
    value = read_json(path)
    try:
        if not isinstance(value, dict) or name not in value:
            raise ValueError(f"it has no {name!r}")
        return _as(kind, value[name], name)
    except (ValueError, OverflowError) as error:
        raise FileError(f"{path} cannot be read ({error}); make it with {made_by}") from error


def from_fields(cls: Any, value: Any, where: str = "") -> Any:
    """Create an instance of a dataclass, as `from_stored`. Raises `ValueError` or what `cls` raises."""
    where = where or cls.__name__
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {_shown(value)}, not an object")
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(cls) if f.init}
    if missing := [name for name, required in known.items() if required and name not in value]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    if unknown := [name for name in value if name not in known]:
        raise ValueError(f"{where} has {', '.join(map(repr, unknown))}, which is unknown")
    hints = get_type_hints(cls)
    return cls(**{name: _as(hints[name], entry, f"{where}.{name}") for name, entry in value.items()})


def _as(kind: Any, value: Any, where: str) -> Any:
    """Convert `value` to the annotated type `kind`. Raises `ValueError` if it does not match."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        problems = []
        for each in args:
            try:
                return _as(each, value, where)
            except ValueError as error:
                problems.append(str(error))
        raise ValueError(" and ".join(problems))
    if hasattr(kind, "from_json"):
        return kind.from_json(value)
    if is_dataclass(kind):
        return from_fields(kind, value, where)
    if origin is Literal and value in args:
        return value
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} is {_shown(value)}, not a list")
        each = args if origin is tuple and args[-1] is not Ellipsis else (args[0],) * len(value)
        if len(each) != len(value):
            raise ValueError(f"{where} has {len(value)} entries, not {len(each)}")
        return origin(_as(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(each, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {_shown(value)}, not an object")
        return {_as(args[0], k, f"a key of {where}"): _as(args[1], v, f"{where}[{k!r}]") for k, v in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if (kind is type(None) and value is None) or type(value) is kind:
        return value
    raise ValueError(f"{where} is {_shown(value)}, not {getattr(kind, '__name__', str(kind))}")


def _shown(value: Any) -> str:
    return (text := repr(value))[:60] + ("…" if len(text) > 60 else "")
