"""Attach branches to a network and detach them."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import GraphError, InputError
from ..onnx_import.comparing import check_answers
from ..onnx_import.example import drawn_example
from ..onnx_import.fixed_batch import check_batch
from ..onnx_import.loading import from_onnx
from ..onnx_import.network import OnnxNetwork
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
from .trace import Trace, tracing
from .unsupported import check_weights


def attach(
    backbone: nn.Module | str | os.PathLike[str],
    at: Sequence[str] | Literal["auto"],
    *,
    example: Any = None,
    num_exits: int | None = None,
    num_classes: int | None = None,
    branch: "Callable[[Tensor, int], nn.Module] | BranchFactory | None" = None,
    output: Reader | None = None,
    tap: Mapping[str, Reader] | None = None,
) -> BranchyNet:
    """Attach a branch at each named tap. Branches get their sizes from an example.

    Args:
        backbone: the network; it is not changed. Or an ONNX file, which `from_onnx` reads.
            `attach` compares it with ONNX Runtime on the first rows of the example, and warns if that cannot run it.
        at: names of submodules (as in ``named_modules()``) or ``"input"``, in any order: exits are numbered in running
            order. For an ONNX file, names of its values. ``"auto"`` spreads `num_exits` exits evenly by
            multiply-accumulates, at ends of blocks.
        example: one batch of inputs: a tensor, a tuple of arguments, or a dict of keyword arguments; only the first two
            rows are used. For an ONNX file whose inputs are floats of fixed sizes, it may be left out: `attach` then
            draws random numbers, which also serve for the comparison with ONNX Runtime.
        num_exits: the number of exits for ``at="auto"``, including the backbone's own; 3 by default.
        num_classes: outputs of every exit; by default as many as the backbone has. If the backbone's output is not
            `(B, num_classes, ...)`, as without a head, the last exit gets a branch too.
        branch: ``branch(features, num_classes) -> nn.Module``, called with the features at the tap, or a
            `BranchFactory`; `default_branch` by default, or `DenseBranch` if the backbone returns a map `(B, C, H, W)`.
            `default_branch` averages over positions, which is too little on early maps with few channels: give another
            branch there, or let `advise` find places and branches.
        output: see `BranchyNet`.
        tap: see `BranchyNet`.

    Raises:
        InputError: no taps, a repeated name, an unknown submodule (the nearest is suggested), fewer than 2 exits, an
            unknown number of classes, or no example.
        GraphError: a tap never runs, runs twice, or runs after the output is computed; ``"auto"`` finds fewer places
            for exits than requested; or an ONNX file cannot be imported, fixes the batch size or a length that the
            example does not have, or the imported network differs from ONNX Runtime on the example.
        FileError: see `from_onnx`.

    Example:
        >>> import torch, branchynet
        >>> from torch import nn
        >>> backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(10))
        >>> net = branchynet.attach(backbone, ["1"], example=torch.randn(2, 3, 8, 8))
        >>> [tuple(output.shape) for output in net(torch.randn(5, 3, 8, 8))]
        [(5, 10), (5, 10)]
    """
    if isinstance(backbone, (str, os.PathLike, bytes)) or hasattr(backbone, "SerializeToString"):  # a ModelProto
        backbone = from_onnx(backbone)  # type: ignore[arg-type]  # which refuses the last two
    check_network(backbone)
    if at == "auto":
        num_exits = 3 if num_exits is None else num_exits
        if num_exits < 2:
            raise InputError(f"num_exits must be at least 2, the backbone's own included; got {num_exits}")
    elif isinstance(at, str) or not at or len(set(at)) != len(at):
        raise InputError(f"at must be 'auto', or a list of one or more different tap names; got {at!r}")
    elif num_exits is not None:
        raise InputError(f"num_exits={num_exits} is for at='auto'; named taps give one exit per tap and the last")
    names = () if at == "auto" else tuple(at)
    if isinstance(backbone, OnnxNetwork):
        names = tuple(backbone.submodule_name(name) for name in names)
        if len(set(names)) != len(names):
            raise InputError(f"at must name different values; got {at!r}, of which two are one")
        tap = {backbone.submodule_name(name): read for name, read in (tap or {}).items()}
    BranchyNet(backbone, dict.fromkeys(names, nn.Identity()), output=output, tap=tap)  # refuses unknown names
    check_weights(backbone)
    example = _example(backbone) if example is None else example
    args, kwargs = arguments(first_rows(example))
    if isinstance(backbone, OnnxNetwork):
        with evaluating(backbone):
            check_batch(backbone, args, kwargs)

    def tensor(name: str, value: Any) -> Tensor | None:
        if name in names:
            return read_tensor((tap or {}).get(name), value, name)
        return find_tensor(value)

    if any(is_lazy(p) for p in backbone.parameters()):
        with torch.no_grad(), evaluating(backbone), calling(backbone, example):
            backbone(*args, **kwargs)  # initializes lazy parameters
    with torch.no_grad(), evaluating(backbone), tracing(backbone, (args, kwargs), tensor) as survey:
        with calling(backbone, example):
            returned = backbone(*args, **kwargs)
        last = read_tensor(output or single_output, returned, "the backbone's output")
    if isinstance(backbone, OnnxNetwork):
        with evaluating(backbone):
            check_answers(backbone, args, kwargs)
    if at == "auto":
        assert num_exits is not None
        names = spread_exits(survey, last, num_exits)
        if len(names) < num_exits - 1:
            raise GraphError(
                f"only {len(names)} places for exits were found, {names}, and {num_exits} exits need {num_exits - 1}; "
                "ask for fewer, or give names: named taps may also be inside a block, or parallel to a skip connection"
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
    """Attach untrained branches by name, in the form that `advise` reports.

    Args:
        backbone: becomes part of the network.
        taps: the taps of the early exits, in running order.
        names: one branch name per tap; see `branchynet.nn.branches.named_branches`.
        example: one batch of inputs.

    Raises:
        InputError: no branch of that name fits its tap (the message lists those that do), or a tap is unknown.
        GraphError: see `attach`.
    """
    if len(taps) != len(names):
        raise InputError(f"{len(taps)} taps need {len(taps)} branch names; got {', '.join(names) or 'none'}")
    return attach(backbone, taps, example=example, branch=_NamedBranches(names)) if taps else BranchyNet(backbone, {})


def detach(net: BranchyNet) -> nn.Module:
    """Return the backbone of a `BranchyNet`, without its branches. Training has changed only its weights.

    Raises:
        InputError: `net` is not a `BranchyNet`.

    Example:
        >>> from branchynet import BranchyNet, detach
        >>> from torch import nn
        >>> backbone = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> detach(BranchyNet(backbone, {"1": nn.Linear(8, 3)})) is backbone
        True
    """
    if not isinstance(net, BranchyNet):
        raise InputError(f"only a BranchyNet has a backbone to give back; got {type(net).__name__}")
    return net.backbone


def _example(backbone: nn.Module) -> dict[str, Tensor]:
    """Draw inputs for an ONNX file. Raises `InputError` for other networks, or if the file does not describe them."""
    if isinstance(backbone, OnnxNetwork):
        return drawn_example(backbone)
    raise InputError(
        "attach needs example=, one batch of inputs from which branches get their sizes, such as images[:2]"
    )


class LastExit(nn.Module):
    """The last exit of a backbone without a head: a branch that reads the backbone's output."""

    def __init__(self, read: Reader | None, head: nn.Module) -> None:
        super().__init__()
        self.read = read
        self.head = head

    def forward(self, returned: Any) -> Tensor:
        """Return logits `(B, num_classes)`."""
        return self.head(read_tensor(self.read or single_output, returned, "the backbone's output"))


class BranchFactory(ABC):
    """Base class for callables that create branches for `attach`, and use the feature dimension that it found."""

    @abstractmethod
    def __call__(self, features: Tensor, num_classes: int, feature_dim: int | None = None) -> nn.Module:
        """Return a branch with outputs `(B, num_classes, ...)`.

        Args:
            features: the features at the tap.
            num_classes: number of outputs.
            feature_dim: the dimension of `features` that holds channels or features, if known.
        """


class _NamedBranches(BranchFactory):
    """Create named branches, one per call."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def __call__(self, features: Tensor, num_classes: int, feature_dim: int | None = None) -> nn.Module:
        """Return the next branch."""
        name, made = self.names.pop(0), named_branches(features, num_classes, feature_dim)
        if name not in made:
            raise InputError(
                f"no branch {name!r} for features of shape {tuple(features.shape)}; there are "
                f"{', '.join(made) or 'none'}"
            )
        return made[name]


class _DefaultBranches(BranchFactory):
    """Create default branches. If `last`, the backbone's output, is a map, branches return maps of its size."""

    def __init__(self, last: Tensor | None) -> None:
        self.size = None if last is None or last.dim() != 4 else (last.shape[2], last.shape[3])

    def __call__(self, features: Tensor, num_classes: int, feature_dim: int | None = None) -> nn.Module:
        if self.size and features.is_floating_point() and features.dim() == 4 and feature_dim in (None, 1):
            return DenseBranch(features.shape[1], num_classes, self.size)
        return default_branch(features, num_classes, feature_dim)


def _features(survey: Trace, names: Sequence[str], last: Tensor) -> dict[str, tuple[Tensor, int | None]]:
    """Return each named submodule's output, in running order, and the dimension that holds its features, if known.

    Raises:
        GraphError: a submodule never ran, ran twice, ran after the output was computed, or its output has no leading
            batch dimension.
    """
    found: dict[str, tuple[Tensor, int | None]] = {}
    for moment in survey.moments:
        if moment.name in found:
            raise GraphError(runs_twice(moment.name))
        if moment.name in names:
            assert moment.features is not None
            if survey.node(last) in survey.needed_until(moment.node):
                raise GraphError(
                    f"the tap {moment.name!r} runs after the backbone's output is computed, so an exit could save "
                    "nothing; tap an earlier submodule"
                )
            if moment.features.dim() == 0 or moment.features.shape[0] != last.shape[0]:
                raise GraphError(
                    f"the output of {moment.name!r} has shape {tuple(moment.features.shape)}, whose first dimension is "
                    f"not the batch of {last.shape[0]}; tap another submodule, or move the batch to the front with "
                    f"tap={{{moment.name!r}: lambda output: ...}}"
                )
            found[moment.name] = moment.features, survey.feature_dim(moment)
    if missing := [name for name in names if name != INPUT and name not in found]:
        raise GraphError(never_ran(missing[0]))
    return found


def _typed(branch: nn.Module, like: Tensor) -> nn.Module:
    """Convert the branch's floating-point parameters to the dtype of `like`."""
    return branch.to(like.dtype) if like.is_floating_point() else branch


def _classes(last: Tensor, num_classes: int | None) -> int:
    if last.dim() < 2:
        raise InputError(
            f"the backbone's output has shape {tuple(last.shape)}, but exits give (B, C, ...); for one number per "
            "sample make it (B, 1): output=lambda y: y.unsqueeze(1)"
        )
    if last.dim() == 3 and num_classes is None:
        raise InputError(
            f"the backbone's output has shape {tuple(last.shape)}, which does not say how many classes there are; give "
            "num_classes=, or output= to make it (B, C) or (B, C, ...)"
        )
    return last.shape[1] if num_classes is None else num_classes
