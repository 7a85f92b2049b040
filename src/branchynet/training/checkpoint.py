"""Weights and the state of a training on disk: safetensors and JSON, never pickle.

A run folder holds ``training.safetensors`` (weights, optimizer and progress: the one truth for resuming) and, derived
from it, ``checkpoint.safetensors`` (the weights alone, for users) and ``train.csv``.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import FileError, InputError
from ..files import check_checksum, checksum, parse_json, regular, remove_partial, replacing
from ..stored import from_stored
from .history import EpochRow, History

_KEY = "branchynet"  # the metadata entry that marks a training.safetensors
_CHECKSUM = "sha256"


@dataclass(frozen=True)
class _Header:
    """What ``training.safetensors`` holds besides tensors."""

    settings: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    groups: list[dict[str, Any]]
    numbers: dict[str, dict[str, Any]]
    progress: dict[str, Any]


def save_weights(net: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a network's parameters and buffers as safetensors, whole or not at all, with a checksum.

    The checksum is the metadata entry ``sha256``; other readers of safetensors ignore it.

    Raises:
        FileError: the file cannot be written.
    """
    _write(path, net.state_dict(), {"format": "pt"})


def load_weights(net: nn.Module, path: str | os.PathLike[str]) -> None:
    """Read what `save_weights` wrote into `net`, in place.

    A backbone's own file loads into ``net.backbone``.

    Raises:
        FileError: the file is missing, damaged or foreign, or holds another architecture's weights: the first tensor
            that differs is named with both shapes, and `net` stays as it was.
    """
    _load_into(net, _read(path)[0], path)


class RunFolder:
    """The three files of a training: see the module's page.

    Args:
        path: the folder; made where missing.
        settings: what makes a training the same training, as JSON values.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.settings = json.loads(json.dumps(settings))  # as it will read back: tuples become lists

    @property
    def training(self) -> Path:
        """Where the state for resuming is."""
        return self.path / "training.safetensors"

    def save(self, net: nn.Module, optimizer: Optimizer, rows: list[EpochRow], progress: Mapping[str, Any]) -> None:
        """Write the state after the last of `rows`; a kill at any moment leaves this state or the one before.

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
                f"the state of {type(optimizer).__name__} cannot be kept without pickle ({error}); "
                "use another optimizer, or train without run="
            ) from error
        _write(self.training, tensors, metadata)
        self._derive(net, rows)

    def load(self, net: nn.Module, optimizer: Optimizer) -> tuple[list[EpochRow], dict[str, Any]] | None:
        """Put the stored state into `net` and `optimizer`; the rows so far and the progress, or None for a new folder.

        A folder of no epoch yet is new where it was meant for another training. More epochs may be asked for: the
        progress then has ``grown``.

        Raises:
            FileError: the file is truncated or foreign, or of another architecture.
            InputError: the run was made with other settings.
        """
        for path in (self.training, self.path / "checkpoint.safetensors", self.path / "train.csv"):
            remove_partial(path)
        if not self.training.exists():
            return None
        remedy = "choose another run folder, or resume=False to start it anew"
        tensors, metadata = _read(self.training)
        try:
            stored = parse_json(metadata[_KEY], finite=False)  # an optimizer may keep an infinite number
            header = from_stored(_Header, stored, self.training, "fit(..., run=...)")
            rows = [EpochRow.from_flat(row) for row in header.rows]
        except (KeyError, ValueError, TypeError, OverflowError, FileError) as error:
            raise FileError(
                f"{self.training} is not the state of a BranchyNet training ({error!r}); {remedy}"
            ) from error
        weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
        made = header.settings
        grown = made.get("epochs", 0) < self.settings.get("epochs", 0)
        other = [
            f"{name}={made[name]!r}, but this call has {name}={self.settings.get(name)!r}"
            for name in sorted(made)  # earlier versions kept fewer settings
            if made[name] != self.settings.get(name) and not (name == "epochs" and grown)
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
            raise FileError(f"{self.training} holds no state of this optimizer ({error!r}); {remedy}") from error
        net.load_state_dict(weights)
        self._derive(net, rows)
        return rows, {**header.progress, "grown": grown}

    def _derive(self, net: nn.Module, rows: list[EpochRow]) -> None:
        save_weights(net, self.path / "checkpoint.safetensors")
        History(tuple(rows)).save(self.path / "train.csv")


def _restored(optimizer: Optimizer, header: _Header, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The optimizer's stored state, as it takes it."""
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in header.numbers.items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        if part == "optimizer":
            index, _, entry = rest.partition(".")
            parameter = parameters[int(index)]
            if value.shape == parameter.shape:
                # In the weights' own memory order: a fused optimizer takes for granted that the two agree.
                value = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
            state.setdefault(int(index), {})[entry] = value
    return {"state": state, "param_groups": header.groups}


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata sorted: as they are written, their order is another each time."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[start:]


def _write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    # Copies, because safetensors refuses tied weights, which share memory, and strides other than the default ones.
    plain = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    content = _in_order(safetensors.torch.save(plain, {**metadata, _CHECKSUM: checksum(_parts(plain, metadata))}))
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(regular(path), framework="pt") as stored:
            tensors, metadata = {n: stored.get_tensor(n).clone() for n in stored.keys()}, stored.metadata() or {}
    except FileError:
        raise
    except Exception as error:  # damage can raise nearly anything, such as a dtype that torch does not have
        raise FileError(
            f"cannot read {path}: {error}; it is truncated, damaged or no safetensors file: train or fetch it again"
        ) from error
    known = metadata.pop(_CHECKSUM, None)
    if known is not None:  # files of earlier versions, and of other writers, have none
        check_checksum(path, known, _parts(tensors, metadata))
    return tensors, metadata


def _parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """What the checksum of a file is of."""
    yield from sorted(metadata.items())
    for name, tensor in sorted(tensors.items()):
        yield name, f"{tensor.dtype} {tuple(tensor.shape)}"
        yield name, tensor.reshape(-1).view(torch.uint8).numpy()


def _load_into(net: nn.Module, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    problem = _mismatch(net, tensors)
    if problem:
        raise FileError(f"{path} holds the weights of another network: {problem}")
    net.load_state_dict(tensors)


def _mismatch(net: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """What is wrong with `tensors` as the weights of `net`, in words; empty where they fit."""
    own = net.state_dict()
    for name in [*own, *tensors]:
        here, there = own.get(name), tensors.get(name)
        if here is not None and there is not None and here.shape == there.shape:
            if here.is_floating_point() == there.is_floating_point():
                continue
            return f"the tensor {name!r} is {there.dtype} in the file and {here.dtype} in the network"
        shown = [f"of shape {tuple(t.shape)}" if t is not None else "missing" for t in (there, here)]
        hint = ""
        if there is None and f"backbone.{name}" in tensors:
            hint = "; the file is of a BranchyNet around this network: load it into that"
        elif there is None and name.removeprefix("backbone.") in tensors:
            hint = "; the file is of the backbone alone: load it into net.backbone"
        return f"the tensor {name!r} is {shown[0]} in the file and {shown[1]} in the network{hint}"
    return ""
