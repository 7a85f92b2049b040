"""Weights on disk: safetensors with a checksum, never pickle."""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import FileError
from ..files import check_checksum, checksum, regular, replacing

_CHECKSUM = "sha256"


def save_weights(net: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a network's parameters and buffers as safetensors, whole or not at all, with a checksum.

    The checksum is the metadata entry ``sha256``; other readers of safetensors ignore it.

    Raises:
        FileError: the file cannot be written.
    """
    write_tensors(path, net.state_dict(), {"format": "pt"})


def load_weights(net: nn.Module, path: str | os.PathLike[str]) -> None:
    """Read what `save_weights` wrote into `net`, in place.

    A backbone's own file loads into ``net.backbone``.

    Raises:
        FileError: the file is missing, damaged or foreign, or holds another architecture's weights: the first tensor
            that differs is named with both shapes, and `net` stays as it was.
    """
    load_tensors(net, read_tensors(path)[0], path)


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata sorted: as they are written, their order is another each time."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[start:]


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors as safetensors, whole or not at all, with a checksum among the metadata."""
    # Copies, because safetensors refuses tied weights, which share memory, and strides other than the default ones.
    plain = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    content = _in_order(safetensors.torch.save(plain, {**metadata, _CHECKSUM: checksum(_parts(plain, metadata))}))
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata. Raises `FileError` where the file is damaged or foreign."""
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


def load_tensors(net: nn.Module, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Put tensors into `net`. Raises `FileError`, and leaves `net` alone, where they do not fit."""
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
