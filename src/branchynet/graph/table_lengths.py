"""Limit free lengths by the tables that a network looks its positions up in.

Where a network slices a table, torch.export assumes a guard. Where it computes positions and looks them up, as RoBERTa
does, only the size of the table limits the length.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..nn.calls import arguments, evaluating, first_rows
from .lengths import Length

_ROWS = 64  # of the example; the row with the least padding looks up the largest position
Lookup = tuple[int, int]  # the largest index, and the number of rows of the table


def resized(example: Any, names: Sequence[str], sizes: Mapping[Length, int]) -> Any:
    """Return an example, cut or repeated to other lengths."""
    args, kwargs = arguments(example)
    tensors = [*args, *kwargs.values()]
    for length, size in sizes.items():
        for name, axis in length.at:
            tensor = tensors[names.index(name)]
            places = torch.arange(size, device=tensor.device) % length.example
            tensors[names.index(name)] = tensor.index_select(axis, places)
    return dict(zip(kwargs, tensors, strict=True)) if kwargs else tuple(tensors)


def within_tables(net: nn.Module, example: Any, names: Sequence[str], lengths: Sequence[Length]) -> tuple[Length, ...]:
    """Return the lengths, each limited to the sizes at which no lookup leaves its table.

    A lookup whose largest index grows with the length is assumed to grow further at this rate. A limit is set only if
    the lookup then leaves the table, so an index that saturates, such as a clamped distance, sets none.

    Args:
        net: the network.
        example: one batch of inputs.
        names: the names of the inputs.
        lengths: the lengths that the guards allow.
    """
    example = first_rows(example, _ROWS)
    before = _lookups(net, example)
    return tuple(_within(net, example, names, length, before) for length in lengths) if before else tuple(lengths)


def _within(net: nn.Module, example: Any, names: Sequence[str], length: Length, before: Sequence[Lookup]) -> Length:
    one_step = _lookups(net, resized(example, names, {length: length.example + length.step}))
    for which, ((index, rows), (later, _)) in enumerate(zip(before, one_step, strict=False)):
        if later > index:
            most = length.example + (rows - 1 - index) // (later - index) * length.step
            if length.fits(most + length.step):
                beyond = _lookups(net, resized(example, names, {length: most + length.step}), which)
                if len(beyond) <= which or beyond[which][0] >= rows:  # or it fails before that lookup
                    length = replace(length, most=most)
    return length


class _Done(Exception):
    """Stops the network."""


class _Lookups(TorchDispatchMode):
    """Record lookups, and stop the network after the one of number `last`, or before one that leaves its table."""

    def __init__(self, last: int | None) -> None:
        super().__init__()
        self.last, self.found = last, list[Lookup]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default:
            table, indices = args[:2]
            self.found.append((int(indices.max()) if indices.numel() else 0, len(table)))
            if len(self.found) - 1 == self.last or self.found[-1][0] >= len(table):
                raise _Done
        return func(*args, **(kwargs or {}))


def _lookups(net: nn.Module, example: Any, last: int | None = None) -> list[Lookup]:
    """Return the lookups of the network in order, up to the one of number `last` or the first that leaves its table."""
    args, kwargs = arguments(example)
    mode = _Lookups(last)
    with evaluating(net), torch.no_grad(), mode, contextlib.suppress(Exception):  # it may not take this length at all
        net(*args, **kwargs)
    return mode.found
