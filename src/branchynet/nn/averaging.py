"""A network whose exits answer with the mean of the exits passed so far."""

from typing import Any

from torch import Tensor

from ..errors import InputError
from ..policy.averaging import Of, WeightRows, average, exit_weight_rows, known_kind, selected_on
from .network import BranchyNet


def averaged(net: BranchyNet, exit_weights: WeightRows | None = None, *, of: Of = "softmax") -> BranchyNet:
    """The network whose exit n answers with the mean of exits 1..n of `net`.

    It shares the modules and parameter names of `net`; `record`, `choose`, `export` and engines take it like any other
    network. A branch whose threshold is *never* stays in its graph, because later answers read it: give `measure` this
    network, so that costs include it.

    Args:
        net: trained; it is not changed.
        exit_weights: one row per exit, such as `fit_averaging` returns; row n holds n numbers, not negative and not all
            0, which are scaled to sum to 1. Equal by default.
        of: ``"softmax"``: probabilities are averaged, and an exit's outputs are their logarithms (minus infinity where
            the probability is 0); ``"logits"``.

    Raises:
        InputError: no `BranchyNet`, or `exit_weights` that are not one row of n numbers for each exit n.
    """
    if not isinstance(net, BranchyNet) or isinstance(net, _Averaged):
        raise InputError(f"averaged(net) takes a BranchyNet that is not averaged yet; got {type(net).__name__}")
    return _Averaged(
        net, exit_weight_rows(exit_weights, net.num_exits), known_kind(of), selected_on(net.selected_on, exit_weights)
    )


class _Averaged(BranchyNet):
    def __init__(self, net: BranchyNet, exit_weights: WeightRows, of: Of, selected_on: tuple[str, ...]) -> None:
        branches = dict(zip(net.taps, net.branches, strict=True))
        super().__init__(net.backbone, branches, output=net.output, tap=net.readers)
        self._averaging: tuple[WeightRows, Of] = exit_weights, of
        self.selected_on = selected_on
        self.training = net.training

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        exit_weights, of = self._averaging
        return average(super().forward(*args, **kwargs), exit_weights, of=of)
