"""Adding branches to a network and taking them off again."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import GraphError, InputError
from .branches import DenseBranch, default_branch, named_branches
from .calls import (
    INPUT,
    Reader,
    arguments,
    evaluating,
    find_tensor,
    first_input,
    first_rows,
    read_tensor,
    single_output,
)
from .checks import calling, check_network
from .network import BranchyNet, never_ran, runs_twice
from .placement import spread_exits
from .readable import check_weights
from .trace import Trace, tracing


def attach(
    backbone: nn.Module,
    at: Sequence[str] | Literal["auto"],
    *,
    example: Any,
    num_exits: int | None = None,
    num_classes: int | None = None,
    branch: "Callable[[Tensor, int], nn.Module] | BranchFactory | None" = None,
    output: Reader | None = None,
    tap: Mapping[str, Reader] | None = None,
) -> BranchyNet:
    """Add a branch at each of the named taps, sized from an example.

    Args:
        backbone: the network; it is not changed.
        at: names of submodules (as in ``named_modules()``) or ``"input"``, in any order: exits are numbered as they
            run. ``"auto"`` spreads `exits` exits evenly by multiply-accumulates, at ends of blocks.
        example: one batch of inputs: a tensor, a tuple of arguments, or a dict of keyword arguments; its first two rows
            are looked at.
        num_exits: with ``at="auto"``, how many exits there shall be, the backbone's own included; 3 by default.
        num_classes: outputs of every exit; by default as many as the backbone's own output has. Where that is not
            `(B, num_classes, ...)`, as on a backbone without a head, the last exit gets a branch as well.
        branch: ``branch(features, num_classes) -> nn.Module``, told the features at the tap, or a `Maker`; by default
            one is made by `default_branch`, or by `DenseBranch` where the backbone gives a map `(B, C, H, W)`.
        output: as `BranchyNet` takes it.
        tap: as `BranchyNet` takes it.

    Raises:
        InputError: no taps, a name twice, an unknown submodule (the nearest is suggested), a number of exits below 2,
            or no way to tell the number of classes.
        GraphError: a tap that never runs, runs twice, or runs when the output is already there; with ``"auto"``, fewer
            places for exits than asked for.
    """
    check_network(backbone)
    if at == "auto":
        num_exits = 3 if num_exits is None else num_exits
        if num_exits < 2:
            raise InputError(f"num_exits must be at least 2, the backbone's own included; got {num_exits}")
    elif isinstance(at, str) or not at or len(set(at)) != len(at):
        raise InputError(f"at must be 'auto', or a list of one or more different tap names; got {at!r}")
    elif num_exits is not None:
        raise InputError(
            f"num_exits={num_exits} is for at='auto'; with taps given by name there is one exit a tap and the last"
        )
    names = () if at == "auto" else tuple(at)
    BranchyNet(backbone, dict.fromkeys(names, nn.Identity()), output=output, tap=tap)  # refuses unknown names
    check_weights(backbone)
    args, kwargs = arguments(first_rows(example))

    def tensor(name: str, value: Any) -> Tensor | None:
        if name in names:
            return read_tensor((tap or {}).get(name), value, name)
        return find_tensor(value)

    if any(is_lazy(p) for p in backbone.parameters()):
        with torch.no_grad(), evaluating(backbone), calling(backbone, example):
            backbone(*args, **kwargs)  # gives them their sizes
    with torch.no_grad(), evaluating(backbone), tracing(backbone, (args, kwargs), tensor) as survey:
        with calling(backbone, example):
            returned = backbone(*args, **kwargs)
        last = read_tensor(output or single_output, returned, "the backbone's output")
    if at == "auto":
        assert num_exits is not None
        names = spread_exits(survey, last, num_exits)
        if len(names) < num_exits - 1:
            raise GraphError(
                f"only {len(names)} places for exits were found, {names}, and {num_exits} exits need {num_exits - 1}; "
                "ask for fewer, or give names: an exit may also stand inside a block, or where skip connections pass by"
            )
    features: dict[str, tuple[Tensor, int | None]] = {}
    if INPUT in names:
        features[INPUT] = first_input(args, kwargs), None
    features.update(_features(survey, names, last))
    classes = _classes(last, num_classes)
    headless = num_classes is not None and last.shape[1] != num_classes
    make = branch or _DefaultBranches(None if headless else last)
    if headless:
        output = LastExit(output, _typed(make(last, classes), last))
    branches = {}
    for name, (value, dim) in features.items():
        made = make(value, classes, dim) if isinstance(make, BranchFactory) else make(value, classes)
        branches[name] = _typed(made, value if value.is_floating_point() else last)
    return BranchyNet(backbone, branches, output=output, tap=tap)


def attach_branches(backbone: nn.Module, taps: Sequence[str], names: Sequence[str], example: Any) -> BranchyNet:
    """Add untrained branches, identified by name, at the given taps, as `advise` reports them.

    Args:
        backbone: becomes part of the network.
        taps: where the early exits stand, in running order.
        names: one branch per tap, by its name in `branchynet.nn.branches.named_branches`.
        example: one batch of inputs.

    Raises:
        InputError: no branch of that name fits its tap (the message lists those that do), or an unknown tap.
        GraphError: as `attach`.
    """
    if len(taps) != len(names):
        raise InputError(f"{len(taps)} taps need as many branches; got {', '.join(names) or 'none'}")
    return attach(backbone, taps, example=example, branch=_NamedBranches(names)) if taps else BranchyNet(backbone, {})


def detach(net: BranchyNet) -> nn.Module:
    """The backbone of a `BranchyNet`, without branches and as it was but for its training.

    Raises:
        InputError: `net` is no `BranchyNet`.
    """
    if not isinstance(net, BranchyNet):
        raise InputError(f"only a BranchyNet has a backbone to give back; got {type(net).__name__}")
    return net.backbone


class LastExit(nn.Module):
    """The last exit of a backbone without a head: what the backbone returns, read, through a branch of its own."""

    def __init__(self, read: Reader | None, head: nn.Module) -> None:
        super().__init__()
        self.read = read
        self.head = head

    def forward(self, returned: Any) -> Tensor:
        """Logits `(B, num_classes)`."""
        return self.head(read_tensor(self.read or single_output, returned, "the backbone's output"))


class BranchFactory(ABC):
    """Makes branches as `attach` asks for them, told also where the network itself has the features' channels."""

    @abstractmethod
    def __call__(self, features: Tensor, num_classes: int, feature_dim: int | None = None) -> nn.Module:
        """A branch to `(B, num_classes, ...)`.

        Args:
            features: at the tap.
            num_classes: outputs.
            feature_dim: which of their dimensions holds channels or features, where that is known.
        """


class _NamedBranches(BranchFactory):
    """Branches by name, one after the other."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def __call__(self, features: Tensor, num_classes: int, feature_dim: int | None = None) -> nn.Module:
        """The next branch."""
        name, made = self.names.pop(0), named_branches(features, num_classes, feature_dim)
        if name not in made:
            raise InputError(
                f"no branch {name!r} for features of shape {tuple(features.shape)}; there are "
                f"{', '.join(made) or 'none'}"
            )
        return made[name]


class _DefaultBranches(BranchFactory):
    """Branches by the shapes of the features and of the backbone's output, None where exits are not to follow that."""

    def __init__(self, last: Tensor | None) -> None:
        self.size = None if last is None or last.dim() != 4 else (last.shape[2], last.shape[3])

    def __call__(self, features: Tensor, num_classes: int, feature_dim: int | None = None) -> nn.Module:
        if self.size and features.is_floating_point() and features.dim() == 4 and feature_dim in (None, 1):
            return DenseBranch(features.shape[1], num_classes, self.size)
        return default_branch(features, num_classes, feature_dim)


def _features(survey: Trace, names: Sequence[str], last: Tensor) -> dict[str, tuple[Tensor, int | None]]:
    """What each named submodule gave, in running order, and which of its dimensions holds features where that is known.

    Raises:
        GraphError: one never ran, ran twice, ran when the output was there, or gave no leading batch.
    """
    found: dict[str, tuple[Tensor, int | None]] = {}
    for moment in survey.moments:
        if moment.name in found:
            raise GraphError(runs_twice(moment.name))
        if moment.name in names:
            assert moment.features is not None
            if survey.node(last) in survey.needed_until(moment.node):
                raise GraphError(
                    f"the tap {moment.name!r} runs when the backbone's output is already there, so an exit could save "
                    "nothing; tap an earlier submodule"
                )
            if moment.features.dim() == 0 or moment.features.shape[0] != last.shape[0]:
                raise GraphError(
                    f"the output of {moment.name!r} has shape {tuple(moment.features.shape)}, whose first dimension is "
                    f"not the batch of {last.shape[0]}; tap another submodule, or move the batch to the front with "
                    f"tap={{{moment.name!r}: lambda output: ...}}"
                )
            found[moment.name] = moment.features, survey.feature_dim(moment)
    missing = [name for name in names if name != INPUT and name not in found]
    if missing:
        raise GraphError(never_ran(missing[0]))
    return found


def _typed(branch: nn.Module, features: Tensor) -> nn.Module:
    """The branch, its floating-point parameters in the type of the features: float64, or half precision."""
    return branch.to(features.dtype) if features.is_floating_point() else branch


def _classes(last: Tensor, num_classes: int | None) -> int:
    if last.dim() < 2:
        raise InputError(
            f"the backbone's output has shape {tuple(last.shape)}, but exits give (B, C, ...); for one number a sample "
            "make it (B, 1): output=lambda y: y.unsqueeze(1)"
        )
    if last.dim() == 3 and num_classes is None:
        raise InputError(
            f"the backbone's output has shape {tuple(last.shape)}, which does not say how many classes there are; give "
            "num_classes=, or output= to make it (B, C) or (B, C, ...)"
        )
    return last.shape[1] if num_classes is None else num_classes
