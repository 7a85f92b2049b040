"""The state of a training run on disk: safetensors and JSON, never pickle.

A run folder holds ``training.safetensors`` (weights, optimizer and progress, to resume from) and two files derived from
it: ``checkpoint.safetensors`` (the weights alone, for users) and ``train.csv``.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import FileError, InputError
from ..files import parse_json, remove_partial
from ..nn.weights import _mismatch, read_tensors, save_weights, write_tensors
from ..stored_values import from_stored
from .history import EpochRow, History

_KEY = "branchynet"  # the metadata entry that marks a training.safetensors


@dataclass(frozen=True)
class _Header:
    """The content of ``training.safetensors`` other than tensors."""

    settings: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    groups: list[dict[str, Any]]
    numbers: dict[str, dict[str, Any]]
    progress: dict[str, Any]


class RunFolder:
    """The three files of a training run, and the settings that a resumed run must share, as JSON values."""

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.training = self.path / "training.safetensors"
        self.settings = json.loads(json.dumps(settings))  # as when it is read: tuples become lists

    def save(self, net: nn.Module, optimizer: Optimizer, rows: list[EpochRow], progress: Mapping[str, Any]) -> None:
        """Write the state after the last of `rows`. If the process is killed, the previous state stays on disk.

        Raises:
            FileError: disk full, no permission.
            InputError: the optimizer's state does not fit in tensors and JSON.
        """
        state = optimizer.state_dict()
        tensors = {f"weights.{name}": value for name, value in net.state_dict().items()}
        numbers: dict[str, dict[str, Any]] = {}
        for index, entries in state["state"].items():
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    numbers.setdefault(str(index), {})[name] = value
        header = {
            "settings": self.settings,
            "rows": [row.flat() for row in rows],
            "groups": state["param_groups"],
            "numbers": numbers,
            "progress": dict(progress),
        }
        try:
            metadata = {"format": "pt", _KEY: json.dumps(header)}
        except TypeError as error:
            raise InputError(
                f"the state of {type(optimizer).__name__} cannot be stored without pickle ({error}); "
                "use another optimizer, or train without run="
            ) from error
        write_tensors(self.training, tensors, metadata)
        self._derive(net, rows)

    def load(self, net: nn.Module, optimizer: Optimizer) -> tuple[list[EpochRow], dict[str, Any]] | None:
        """Load the stored state into `net` and `optimizer`.

        Returns:
            The rows so far and the progress, in which ``grown`` says whether `settings` ask for more epochs than the
            stored run. None for a new folder, or for a run without a finished epoch that had other settings or another
            network.

        Raises:
            FileError: the file is truncated, of another format, or of another architecture.
            InputError: the run has other settings.
        """
        for path in (self.training, self.path / "checkpoint.safetensors", self.path / "train.csv"):
            remove_partial(path)
        if not self.training.exists():
            return None
        remedy = "choose another run folder, or FitOptions(resume=False) to start again"
        tensors, metadata = read_tensors(self.training)
        try:
            stored = parse_json(metadata[_KEY], finite=False)  # the state of an optimizer may be infinite
            header = from_stored(_Header, stored, self.training, "fit(..., run=...)")
            rows = [EpochRow.from_flat(row) for row in header.rows]
        except (KeyError, ValueError, TypeError, OverflowError, FileError) as error:
            raise FileError(f"{self.training} is not the state of a training run ({error!r}); {remedy}") from error
        weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
        before = header.settings
        grown = before.get("epochs", 0) < self.settings.get("epochs", 0)
        now = self.settings if not grown else {**self.settings, "epochs": before.get("epochs", 0)}
        other = [
            f"{name}={value!r}, " + (f"but this call has {name}={now[name]!r}" if name in now else "by another version")
            for name, value in sorted(before.items())  # another version may store fewer settings
            if name not in now or value != now[name]
        ]
        misfit = _mismatch(net, weights)
        if not rows and (misfit or other):
            return None
        if misfit:
            raise FileError(f"{self.training} is of another network: {misfit}; {remedy}")
        if other:
            raise InputError(f"{self.path} was trained with {other[0]}; {remedy}")
        try:
            optimizer.load_state_dict(_restored(optimizer, header, tensors))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            raise FileError(f"{self.training} holds the state of another optimizer ({error!r}); {remedy}") from error
        net.load_state_dict(weights)
        self._derive(net, rows)
        return rows, {**header.progress, "grown": grown}

    def _derive(self, net: nn.Module, rows: list[EpochRow]) -> None:
        save_weights(net, self.path / "checkpoint.safetensors")
        History(tuple(rows)).save(self.path / "train.csv")


def _restored(optimizer: Optimizer, header: _Header, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the stored state for `optimizer.load_state_dict`."""
    state = {int(index): dict(entries) for index, entries in header.numbers.items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, entry = name.split(".", 2)
            parameter = parameters[int(index)]
            if value.shape == parameter.shape:
                # A fused optimizer assumes that its state has the memory order of the weights.
                value = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
            state.setdefault(int(index), {})[entry] = value
    return {"state": state, "param_groups": header.groups}
