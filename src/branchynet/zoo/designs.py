"""Designed exits for the paper's networks, found with `branchynet.advise` (``benchmarks/experiments/design.py``)."""

from collections.abc import Collection, Mapping

import torch
from torch import nn

from ..errors import InputError, nearest
from ..nn.attaching import attach_branches
from ..nn.network import BranchyNet

Places = Mapping[str, str]  # branch names, as in `branchynet.nn.branches.named_branches`, by tap, in running order


def designed(
    backbone: nn.Module, designs: Mapping[str, Places], target: str, shape: tuple[int, int, int]
) -> BranchyNet:
    """Attach the exits designed for a target to a plain network for inputs of a shape. Raises `InputError`."""
    check_known("target", target, designs)
    places = designs[target]
    return attach_branches(backbone, list(places), list(places.values()), torch.zeros(2, *shape))


def check_known(name: str, value: str, known: Collection[str]) -> None:
    """Raise `InputError` unless `value` is one of the known names."""
    if value not in known:
        raise InputError(f"{name}={value!r} is none of {', '.join(known)}{nearest(value, known)}")
