"""Feed batches to a network, in training and recording."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from .checks import calling
from .network import exit_outputs


def batches(loader: Any, device: torch.device, channels_last: bool = False) -> Iterator[tuple[Any, Tensor]]:
    """Yield the `(inputs, target)` pairs of a loader on `device`; with `channels_last`, 4-d inputs in that layout.

    Batches without samples are left out.

    Raises:
        InputError: a batch is not an `(inputs, target)` pair, or a target is not a tensor.
    """

    def place(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if isinstance(value, Tensor):
            value = value.to(device, non_blocking=True)
            return value.contiguous(memory_format=torch.channels_last) if channels_last and value.dim() == 4 else value
        if isinstance(value, Mapping):
            return {key: place(entry) for key, entry in value.items()}
        if isinstance(value, (tuple, list)):
            return tuple(place(entry) for entry in value)
        return value

    for batch in loader:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], (Tensor, np.ndarray))):
            several = isinstance(batch, (tuple, list))
            entries = f" {[type(entry).__name__ for entry in batch]}" if several else ""
            raise InputError(
                "every batch must be (inputs, target) with a tensor as target; got a "
                f"{type(batch).__name__}{entries}: wrap the loader, or give the data set a collate_fn, so that it "
                "yields such pairs"
            )
        target = place(batch[1])
        if not target.dim():
            raise InputError(
                "the loader gives single samples, not batches: wrap it, such as torch.utils.data.DataLoader(data, "
                "batch_size=64, shuffle=True)"
            )
        if len(target):
            yield place(batch[0]), target


def tensors_in(inputs: Any) -> Iterator[Tensor]:
    """Yield the tensors in a batch's inputs in a fixed order; dicts are sorted by key."""
    if isinstance(inputs, Mapping):
        inputs = [inputs[key] for key in sorted(inputs)]
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, (tuple, list)):
        for entry in inputs:
            yield from tensors_in(entry)


def batch_exits(net: nn.Module, inputs: Any) -> tuple[Tensor, ...]:
    """Return every exit's output for one batch, earliest first; a network with a single output has one exit.

    Args:
        net: a `BranchyNet`, or any module; see `branchynet.nn.network.exit_outputs` for which outputs are exits.
        inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.

    Raises:
        InputError: the network fails on these inputs; the message says what may be wrong with them.
    """
    with calling(net, inputs):
        if isinstance(inputs, Mapping):
            value = net(**inputs)
        else:
            value = net(*inputs) if isinstance(inputs, tuple) else net(inputs)
    return exit_outputs(net, value)
