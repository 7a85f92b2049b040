"""The paper's networks with exits where `branchynet.advise` put them, found by ``benchmarks/experiments/design.py``."""

from collections.abc import Mapping

import torch
from torch import nn

from ..errors import InputError, nearest
from ..nn.attaching import attach_branches
from ..nn.network import BranchyNet

Places = Mapping[str, str]
"""Names of branches, as in `branchynet.nn.branches.named_branches`, by tap, in running order."""


def designed(
    backbone: nn.Module, designs: Mapping[str, Places], target: str, shape: tuple[int, int, int]
) -> BranchyNet:
    """The backbone with the exits designed for a target.

    Args:
        backbone: becomes part of the network.
        designs: by target.
        target: ``"latency"``, one sample a call, or ``"batch"``, 64.
        shape: of one input.

    Raises:
        InputError: another target.
    """
    if target not in designs:
        raise InputError(f"target={target!r} is none of {', '.join(designs)}{nearest(target, designs)}")
    places = designs[target]
    return attach_branches(backbone, list(places), list(places.values()), torch.zeros(2, *shape))


def check_branches(branches: str, known: tuple[str, ...]) -> None:
    """Raises `InputError` for branches that are not known."""
    if branches not in known:
        raise InputError(f"branches={branches!r} is none of {', '.join(known)}{nearest(branches, known)}")
