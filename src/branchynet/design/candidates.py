"""A trained trunk with all candidate branches, as one network with many exits."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GraphError, InputError
from ..nn.attaching import BranchFactory, attach
from ..nn.branches import DEEP_BRANCHES, named_branches
from ..nn.calls import INPUT, arguments, evaluating, find_tensor, first_input, first_rows, single_output
from ..nn.network import BranchyNet
from ..nn.placement import spread_exits
from ..nn.trace import Trace, tracing

_MOST = 0.25  # largest work of a deep branch, relative to the rest of the trunk


@dataclass(frozen=True)
class Candidate:
    """One branch at one tap, a submodule's name or ``"input"``."""

    tap: str
    branch: str
    depth: float  # share of the trunk's multiply-accumulates before the tap


@dataclass(frozen=True, eq=False)
class CandidateNetwork:
    """A trunk with all candidates: one exit of `net` per candidate, in the same order, then the trunk's exit."""

    net: BranchyNet
    candidates: tuple[Candidate, ...]  # in the running order of their taps, the cheapest first at each tap

    def at(self, tap: str) -> list[int]:
        """Return the positions of the candidates at a tap."""
        return [i for i, c in enumerate(self.candidates) if c.tap == tap]

    def network(self, chosen: Sequence[int]) -> BranchyNet:
        """Return a copy of the trunk with the candidates at these positions, in running order, one per tap."""
        return copy.deepcopy(self.of(chosen))

    def of(self, chosen: Sequence[int]) -> BranchyNet:
        """Return the trunk itself with the candidates at these positions, in running order, one or more per tap."""
        every = [one for branch in self.net.branches for one in _apart(branch)]
        picked: dict[str, nn.Module] = {}
        for i in chosen:
            tap = self.candidates[i].tap
            picked[tap] = _together(picked.get(tap), every[i])
        return BranchyNet(self.net.backbone, picked)


def attach_candidates(
    trunk: nn.Module, example: Any, taps: Sequence[str] | None = None, most: int = 8
) -> CandidateNetwork:
    """Attach branches of several sizes at the input and at up to `most` places, evenly spread by multiply-accumulates.

    A place gets its smallest branch in any case. Each further branch needs fewer multiply-accumulates than the rest of
    the trunk after the place, because a larger one cannot save time. A deep branch needs less than a quarter of them,
    because deep branches take most of the training time. If `taps` are given, branches are attached there instead, in
    any order.

    Raises:
        InputError: an unknown tap, or outputs that are not `(B, C)`.
        GraphError: a tap that never runs, runs twice, or runs after the output exists; or no place for an exit.
    """
    args, kwargs = arguments(first_rows(example))
    with torch.no_grad(), evaluating(trunk), tracing(trunk, (args, kwargs), _tensor) as survey:
        last = single_output(trunk(*args, **kwargs), "the network's output")
    if last.dim() != 2:
        raise InputError(f"the network gives outputs of shape {tuple(last.shape)}; advise needs logits (B, C)")
    if taps is None:
        names = list(spread_exits(survey, last, most + 1))
        if named_branches(first_input(args, kwargs), last.shape[1]):
            names.insert(0, INPUT)
        if not names:
            raise GraphError(
                "no place for an exit was found: the network runs its layers several times, or no single submodule "
                "passes on all learned features; name places with taps="
            )
    else:
        names = list(taps)
    ran = {INPUT, *(m.name for m in survey.moments)}
    depths = {tap: _depth(survey, tap) for tap in names if tap in ran}  # `attach` refuses the others
    total = survey.operations[-1].macs
    maker = _EveryCandidate(total * (1 - depth) for depth in sorted(depths.values()))
    net = attach(trunk, names, example=example, branch=maker)
    named = [(tap, name) for tap, made in zip(net.taps, maker.names, strict=True) for name in made]
    return CandidateNetwork(net, tuple(Candidate(tap, name, depths[tap]) for tap, name in named))


class _EveryCandidate(BranchFactory):
    """Makes all branches that may save time at a tap, as one module, and keeps their names per tap."""

    def __init__(self, left: Iterable[float]) -> None:
        self.left = list(left)  # multiply-accumulates after each tap, in running order
        self.names: list[list[str]] = []

    def __call__(self, features: Tensor, num_classes: int, feature_dim: int | None = None) -> nn.Module:
        """Return a module with one exit per branch."""
        made = named_branches(features, num_classes, feature_dim)
        if not made:
            raise InputError(
                f"no classifier reads {features.dtype} features of shape {tuple(features.shape)}; name another tap"
            )
        left = self.left.pop(0)
        (cheapest, first), *others = made.items()
        names = [cheapest]
        for name, branch in others:
            if _work(branch, features) < left * (_MOST if name in DEEP_BRANCHES else 1):
                first = _together(first, branch)
                names.append(name)
        self.names.append(names)
        return first


def _work(branch: nn.Module, features: Tensor) -> float:
    """Return the multiply-accumulates of a branch."""
    with torch.no_grad(), evaluating(branch), tracing(branch, ((features,), {}), _tensor) as survey:
        branch(features)
    return survey.operations[-1].macs


def _tensor(_: str, value: Any) -> Tensor | None:
    return find_tensor(value)


def _together(branches: nn.Module | None, branch: nn.Module) -> nn.Module:
    """Add a branch to the module at a tap, as its last exit."""
    return branch if branches is None else BranchyNet(branch, {INPUT: branches})


def _apart(branches: nn.Module) -> list[nn.Module]:
    """Return the branches in a module that `_together` made."""
    if isinstance(branches, BranchyNet):
        return [*_apart(branches.branches[0]), branches.backbone]
    return [branches]


def _depth(survey: Trace, tap: str) -> float:
    """Return the share of the multiply-accumulates before a tap."""
    total = survey.operations[-1].macs
    time = next((m.time for m in survey.moments if m.name == tap), 0)  # 0 for the input
    return survey.operations[time - 1].macs / total if time and total else 0.0
