"""Save and load weights as safetensors with a checksum, never pickle."""

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
    """Write a network's parameters and buffers atomically as safetensors with a checksum.

    The checksum is the metadata entry ``sha256``, which other readers of safetensors ignore.

    Raises:
        FileError: the file cannot be written.
    """
    write_tensors(path, net.state_dict(), {"format": "pt"})


def load_weights(net: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a file of `save_weights` into `net`, in place. Files of a backbone load into ``net.backbone``.

    Raises:
        FileError: the file is missing, damaged or foreign, or holds weights of another architecture. The message names
            the first tensor that differs with both shapes, and `net` does not change.
    """
    load_tensors(net, read_tensors(path)[0], path)


def _in_order(content: bytes) -> bytes:
    """Sort the metadata of a safetensors file, because safetensors writes them in random order."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[start:]


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors atomically as safetensors, with a checksum in the metadata."""
    # Copies, because safetensors refuses shared memory (tied weights) and non-default strides.
    plain = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    content = _in_order(safetensors.torch.save(plain, {**metadata, _CHECKSUM: checksum(_parts(plain, metadata))}))
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata. Raises `FileError` if the file is damaged or foreign."""
    try:
        with safetensors.safe_open(regular(path), framework="pt") as stored:
            tensors, metadata = {n: stored.get_tensor(n).clone() for n in stored.keys()}, stored.metadata() or {}
    except FileError:
        raise
    except Exception as error:  # damage can cause almost any error, such as an unknown dtype
        raise FileError(
            f"cannot read {path}: {error}; it is truncated, damaged or no safetensors file: train or fetch it again"
        ) from error
    known = metadata.pop(_CHECKSUM, None)
    if known is not None:  # older files, and files of other writers, have none
        check_checksum(path, known, _parts(tensors, metadata))
    return tensors, metadata


def _parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Yield the contents that the checksum covers."""
    yield from sorted(metadata.items())
    for name, tensor in sorted(tensors.items()):
        yield name, f"{tensor.dtype} {tuple(tensor.shape)}"
        yield name, tensor.reshape(-1).view(torch.uint8).numpy()


def load_tensors(net: nn.Module, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Load tensors into `net`. Raises `FileError`, and does not change `net`, if they do not fit."""
    if problem := _mismatch(net, tensors):
        raise FileError(f"{path} holds the weights of another network: {problem}")
    net.load_state_dict(tensors)


def _mismatch(net: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """Say why `tensors` do not fit `net`; empty if they fit."""
    state = net.state_dict()
    for name in [*state, *tensors]:
        wanted, stored = state.get(name), tensors.get(name)
        if wanted is not None and stored is not None and wanted.shape == stored.shape:
            if wanted.is_floating_point() == stored.is_floating_point():
                continue
            return f"the tensor {name!r} is {stored.dtype} in the file and {wanted.dtype} in the network"
        shown = [f"of shape {tuple(t.shape)}" if t is not None else "missing" for t in (stored, wanted)]
        hint = ""
        if stored is None and f"backbone.{name}" in tensors:
            hint = "; the file is of a BranchyNet around this network: load it into that"
        elif stored is None and name.removeprefix("backbone.") in tensors:
            hint = "; the file is of the backbone alone: load it into net.backbone"
        return f"the tensor {name!r} is {shown[0]} in the file and {shown[1]} in the network{hint}"
    return ""
