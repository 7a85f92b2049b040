"""Policies that requests name: ``policies.json`` in the folder of a model."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..argument_checks import instance
from ..deploy.call_thresholds import check_thresholds
from ..deploy.engine import Engine
from ..errors import FileError, InputError
from ..files import read_sealed, write_sealed
from ..policy.exit_record import check_same_network
from ..policy.values import Choice, Policy
from ..stored_values import from_fields

FILE = "policies.json"


@dataclass(frozen=True)
class Preset:
    """A named policy.

    Attributes:
        policy: score and thresholds.
        choice: what `choose` found, with its promise and outcome; None for a policy of your own.
    """

    policy: Policy
    choice: Choice | None = None

    @property
    def promise(self) -> str | None:
        """The promise in one sentence, or None without one."""
        return None if self.choice is None or self.choice.promise is None else str(self.choice.promise)


def write_presets(path: str | os.PathLike[str], presets: Mapping[str, Policy | Choice]) -> None:
    """Write named policies to a file.

    Args:
        path: ``policies.json`` in a run folder or in a folder of stages; for a file ``NAME.onnx`` in a repository,
            ``NAME.policies.json`` beside it.
        presets: results of `choose`, or policies, by name.

    Raises:
        InputError: a value is neither, or a name is empty.
        FileError: the file cannot be written.

    Example:
        >>> write_presets("policies.json", {"fast": Policy("entropy", (0.5,)), "careful": Policy("entropy", (0.1,))})
    """
    stored: dict[str, Any] = {}
    for name, value in presets.items():
        instance(f"the policy {name!r}", value, (Policy, Choice), "give what choose(...) returns")
        if not isinstance(name, str) or not name:
            raise InputError(f"the name of a policy must be text; got {name!r}")
        own = value.policy if isinstance(value, Choice) else value
        stored[name] = {**asdict(value), "policy": own.to_json()} if isinstance(value, Choice) else own.to_json()
    write_sealed(path, "policies", stored)


def presets_beside(path: Path) -> Path:
    """Return the file of presets of a model at `path`."""
    return path / FILE if path.is_dir() else path.with_name(f"{path.stem}.{FILE}")


def read_presets(path: Path, engine: Engine | None) -> dict[str, Preset]:
    """Return the presets in a file, none if it does not exist.

    Raises:
        FileError: it is damaged or malformed, or a policy does not fit the engine.
    """
    if not path.exists():
        return {}
    stored = read_sealed(path, "policies", "write it again with write_presets(...)")
    if not isinstance(stored, dict):
        raise FileError(f"{path} holds no named policies; write it with write_presets(...)")
    found = {}
    for name, entry in stored.items():
        try:
            found[name] = _preset(entry, engine)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise FileError(f"the policy {name!r} in {path} cannot be used ({error}); write it again") from error
    return found


def _preset(entry: Any, engine: Engine | None) -> Preset:
    if not isinstance(entry, dict):
        raise InputError(f"it is {type(entry).__name__}, not an object")
    choice = from_fields(Choice, entry) if "policy" in entry else None
    policy = Policy.from_json(entry) if choice is None else choice.policy
    own = None if engine is None else engine.policy
    if engine is None or own is None:
        raise InputError("the file of the model has no thresholds")
    if policy.to_json()["score"] != own.to_json()["score"]:
        raise InputError(
            f"its score is {policy.to_json()['score']!r}, but the score of the model is {own.to_json()['score']!r}"
        )
    if choice is not None:
        check_same_network("the policy and the model", choice.network, engine.metadata.get("network"))
    check_thresholds(policy.thresholds, own, where="the model", remedy="export the model again")
    if engine.fixed:
        raise InputError("the thresholds of the model are constants")
    return Preset(policy, choice)
