"""A network whose exits return the mean of the exits so far."""

from typing import Any

from torch import Tensor

from ..errors import InputError
from ..policy.averaging import Of, WeightRows, average, exit_weight_rows, known_kind, selected_on
from .cascading import Cascade
from .network import BranchyNet


def averaged(net: BranchyNet, exit_weights: WeightRows | None = None, *, of: Of = "softmax") -> BranchyNet:
    """Return a network whose exit n outputs the mean of exits 1..n of `net`.

    The result shares the modules and parameter names of `net`, and works with `record`, `choose`, `export` and engines.
    A branch with the threshold *never* stays in its graph, because later exits read it. Give `measure` this network, so
    that costs include such branches.

    Args:
        net: a trained network; it is not changed.
        exit_weights: one row per exit, such as `fit_averaging` returns. Row n holds n numbers, not negative and not all
            0, which are scaled to sum to 1. Equal by default.
        of: ``"softmax"`` averages probabilities, and outputs are their logarithms (minus infinity for a probability of
            0); ``"logits"`` averages logits.

    Raises:
        InputError: `net` is not a `BranchyNet` or is averaged already, or `exit_weights` is not one row of n numbers
            for each exit n.

    Example:
        >>> import torch
        >>> from branchynet import BranchyNet, averaged
        >>> from torch import nn
        >>> net = BranchyNet(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), {"1": nn.Linear(8, 3)})
        >>> x = torch.randn(5, 4)
        >>> mean = sum(output.softmax(dim=1) for output in net(x)) / 2
        >>> torch.allclose(averaged(net)(x)[1].exp(), mean)
        True
    """
    if not isinstance(net, BranchyNet) or isinstance(net, _Averaging):
        raise InputError(f"averaged(net) takes a BranchyNet that is not averaged yet; got {type(net).__name__}")
    result = _AveragedCascade(net.networks, net.outputs) if isinstance(net, Cascade) else _Averaged.of(net)
    result._averaging = exit_weight_rows(exit_weights, net.num_exits), known_kind(of)
    result.selected_on = selected_on(net.selected_on, exit_weights)
    result.training = net.training
    return result


class _Averaging(BranchyNet):
    """What averaged networks share."""

    _averaging: tuple[WeightRows, Of]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        exit_weights, of = self._averaging
        return average(super().forward(*args, **kwargs), exit_weights, of=of)


class _Averaged(_Averaging):
    @classmethod
    def of(cls, net: BranchyNet) -> "_Averaged":
        branches = dict(zip(net.taps, net.branches, strict=True))
        return cls(net.backbone, branches, output=net.output, tap=net.readers)


class _AveragedCascade(_Averaging, Cascade):
    pass
