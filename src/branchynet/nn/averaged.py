"""A network whose exits answer with the mean of the exits passed so far."""

from typing import Any

from torch import Tensor

from ..errors import InputError
from ..policy.averaging import Of, Weights, average, known_kind, selected_on, weight_rows
from .network import BranchyNet


def averaged(net: BranchyNet, weights: Weights | None = None, *, of: Of = "softmax") -> BranchyNet:
    """The network whose exit n answers with the mean of exits 1..n of `net`.

    It shares `net`'s modules and names of parameters; record, choose, export and engines take it like any other. A
    branch whose threshold is *never* stays in its graph, since later answers read it: give `measure` this network, so
    that costs know.

    Args:
        net: trained; it is not changed.
        weights: `(N, n)` a row an exit, as `fit_weights` gives them; row n holds n weights, not negative and not all 0,
            which are scaled to sum to 1. By default all equal.
        of: ``"softmax"``: probabilities are averaged, and an exit's outputs are their logarithms (minus infinity where
            the probability is 0); ``"logits"``.

    Raises:
        InputError: no `BranchyNet`, or weights that are not one row of n weights for each exit n.
    """
    if not isinstance(net, BranchyNet) or isinstance(net, _Averaged):
        raise InputError(f"averaged(net) takes a BranchyNet that is not averaged yet; got {type(net).__name__}")
    return _Averaged(net, weight_rows(weights, net.num_exits), known_kind(of), selected_on(net.selected_on, weights))


class _Averaged(BranchyNet):
    def __init__(self, net: BranchyNet, weights: Weights, of: Of, selected_on: tuple[str, ...]) -> None:
        branches = dict(zip(net.taps, net.branches, strict=True))
        super().__init__(net.backbone, branches, output=net.output, tap=net.readers)
        self._averaging: tuple[Weights, Of] = weights, of
        self.selected_on = selected_on
        self.training = net.training

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        weights, of = self._averaging
        return average(super().forward(*args, **kwargs), weights, of=of)
