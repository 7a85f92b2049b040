"""Designed exits for the paper's networks, found with `branchynet.advise` (``benchmarks/experiments/design.py``)."""

from collections.abc import Mapping

import torch
from torch import nn

from ..errors import InputError, nearest
from ..nn.attaching import attach_branches
from ..nn.network import BranchyNet

Places = Mapping[str, str]
"""Branch names, as in `branchynet.nn.branches.named_branches`, by tap, in the order of execution."""


def designed(
    backbone: nn.Module, designs: Mapping[str, Places], target: str, shape: tuple[int, int, int]
) -> BranchyNet:
    """Attach the exits designed for a target to a backbone.

    Args:
        backbone: the plain network; becomes part of the result.
        designs: the designs by target.
        target: ``"latency"`` for batches of 1, or ``"batch"`` for batches of 64.
        shape: shape of one input.

    Raises:
        InputError: unknown target.
    """
    if target not in designs:
        raise InputError(f"target={target!r} is none of {', '.join(designs)}{nearest(target, designs)}")
    places = designs[target]
    return attach_branches(backbone, list(places), list(places.values()), torch.zeros(2, *shape))


def check_branches(branches: str, known: tuple[str, ...]) -> None:
    """Raise `InputError` for unknown branches."""
    if branches not in known:
        raise InputError(f"branches={branches!r} is none of {', '.join(known)}{nearest(branches, known)}")
