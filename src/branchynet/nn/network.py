"""A network with side branches: one forward pass computes every exit."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..environment import EXPORTING, require
from ..errors import BranchyNetError, GraphError, InputError, nearest
from ..policy.values import Policy
from .calls import (
    INPUT,
    Reader,
    arguments,
    evaluating,
    first_input,
    first_rows,
    output_tensor,
    read_tensor,
    several_exits,
    single_output,
    slow_path,
)
from .checks import MISFITS, calling, misfit
from .output_warnings import warn_of_further
from .unsupported import scripted_submodule


class OrderError(GraphError):
    """The branches are not listed in the order in which their taps run."""


class BranchyNet(nn.Module):
    """A backbone with side branches. `forward` returns every exit's output, earliest first, the backbone's last.

    The backbone is not changed: its parameters keep their names, and its checkpoints load into ``net.backbone``.

    Args:
        backbone: any module that returns a tensor, or an object with a tensor ``.logits``, or a tuple, list or dict
            with a tensor as its first entry.
        branches: for each tap, the module that reads it, in the order in which the taps run. A tap is the name of a
            submodule as in ``backbone.named_modules()``, or ``"input"`` for the network's first argument. A branch may
            be a `BranchyNet` itself (the paper's tree): its exits take its place in the tuple. Branches and backbone
            should return *logits*, without a softmax at the end.
        output: ``output(backbone_output) -> Tensor``, if the rule for `backbone` does not find the last exit. If it is
            a module, such as a head for a headless backbone, it is trained and saved with the branches.
        tap: for some taps, ``tap[name](submodule_output) -> Tensor``, if the rule for `backbone` does not find the
            features.

    Attributes:
        selected_on: sketches (see `branchynet.policy.sample_digests`) of the samples that the exits were selected on.

    Raises:
        InputError: a tap is not a submodule (the nearest name is suggested), or a branch is not a module.
        GraphError: a tap is in TorchScript. `forward` raises it if a tap never runs, runs twice or runs out of order,
            or if the backbone has several exits of its own.
        VersionError: BranchyNet does not work with the installed version of torch or of a package for `export`.

    Example:
        >>> import torch
        >>> from branchynet import BranchyNet
        >>> from torch import nn
        >>> backbone = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> net = BranchyNet(backbone, {"1": nn.Linear(8, 3)})
        >>> [tuple(logits.shape) for logits in net(torch.randn(5, 4))]
        [(5, 3), (5, 3)]
    """

    selected_on: tuple[str, ...] = ()

    def __init__(
        self,
        backbone: nn.Module,
        branches: Mapping[str, nn.Module],
        *,
        output: Reader | None = None,
        tap: Mapping[str, Reader] | None = None,
    ) -> None:
        super().__init__()
        require(*EXPORTING)  # now, and not only after the training
        modules = dict(backbone.named_modules())
        for name, branch in branches.items():
            if name != INPUT and (not name or name not in modules):
                raise InputError(f"the backbone has no submodule {name!r}{nearest(name, [INPUT, *modules])}")
            if not isinstance(branch, nn.Module):
                raise InputError(f"the branch at {name!r} must be an nn.Module; got {type(branch).__name__}")
            if name != INPUT and (path := scripted_submodule(backbone, name)) is not None:
                raise GraphError(
                    f"the submodule {path or type(backbone).__name__!r} is TorchScript, which runs no hooks, so "
                    f"{name!r} cannot be tapped; give the nn.Module that it was made of, or tap a submodule outside it"
                )
        for name in tap or ():
            if name not in branches:
                raise InputError(f"tap= reads {name!r}, where there is no branch{nearest(name, branches)}")
        self.backbone = backbone
        self.taps = tuple(branches)
        self.branches = nn.ModuleList(branches.values())  # ModuleDict refuses the dots in submodule names
        self.output = output
        self.readers = dict(tap or {})

    @property
    def num_exits(self) -> int:
        """N, the number of exits, including the backbone's own."""
        return 1 + sum(branch.num_exits if isinstance(branch, BranchyNet) else 1 for branch in self.branches)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Return every exit's output: a tuple of N tensors, earliest exit first."""
        by_tap = dict(zip(self.taps, self.branches, strict=True))
        passed: list[str] = []
        exits: list[Tensor] = []
        tapped: list[tuple[str, Tensor, int]] = []

        def leave(tap: str, value: Any) -> None:
            if tap in passed:
                raise GraphError(runs_twice(tap))
            passed.append(tap)
            features = read_tensor(self.readers.get(tap), value, tap)
            if any(getattr(module, "inplace", False) for module in self.backbone.modules()):
                features = features.clone()
            elif torch.is_grad_enabled():
                tapped.append((tap, features, features._version))
            branch = by_tap[tap]
            try:
                output = branch(features)
            except MISFITS as error:
                if torch.compiler.is_compiling() or isinstance(error, (BranchyNetError, torch.OutOfMemoryError)):
                    raise
                raise InputError(misfit(f"the branch at {tap!r}", features, error)) from error
            several = isinstance(branch, BranchyNet)
            exits.extend(output if several else (single_output(output, f"the branch at {tap!r}"),))

        with slow_path, _hooks(self.backbone, [tap for tap in self.taps if tap != INPUT], leave):
            if INPUT in by_tap:
                leave(INPUT, first_input(args, kwargs))
            returned = self.backbone(*args, **kwargs)
        if tuple(passed) != self.taps:
            if missing := [tap for tap in self.taps if tap not in passed]:
                raise GraphError(never_ran(missing[0]))
            raise OrderError(
                f"exits are given as {self.taps} but run in the order {tuple(passed)}; give them in that order"
            )
        last = read_tensor(self.output or single_output, returned, "the backbone's output")
        for tap, features, version in tapped:
            if features._version != version:
                raise GraphError(
                    f"the output of {tap!r} is overwritten in place after the branch has read it, which breaks "
                    "backward; tap the submodule that overwrites it, or make that operation not in-place"
                )
        return (*exits, last)


def plain_network(net: nn.Module) -> nn.Module:
    """Return `net`, or for an averaged network, its backbone as a `BranchyNet` without branches in the same mode."""
    if not isinstance(net, BranchyNet) or not hasattr(net, "_averaging"):
        return net
    if isinstance(net.backbone, BranchyNet):  # the last network of a cascade
        return net.backbone
    plain = BranchyNet(net.backbone, {}, output=net.output)
    plain.training = net.training
    return plain


def exit_outputs(net: nn.Module, returned: Any) -> tuple[Tensor, ...]:
    """Return every exit's output in the value that `net` returned, earliest first.

    For a `BranchyNet`, this is the whole tuple. For another network with exits of its own, it is a tuple or list of two
    or more tensors of one shape `(B, C, ...)`. Any other value has one exit, see `output_tensor`.
    """
    if isinstance(getattr(net, "module", net), BranchyNet):  # DistributedDataParallel keeps the network as its module
        return returned
    if found := several_exits(returned):
        return found
    answer = output_tensor(returned, where := "the network's output")
    warn_of_further(returned, answer, where, "let its forward return that tensor alone")
    return (answer,)


def count_exits(net: nn.Module, example: Any) -> int:
    """Return N, the number of exits; unless `net` is a `BranchyNet`, from a forward pass of two rows."""
    if isinstance(net, BranchyNet):
        return net.num_exits
    args, kwargs = arguments(first_rows(example))
    with torch.no_grad(), evaluating(net), calling(net, example):
        return len(exit_outputs(net, net(*args, **kwargs)))


def check_policy(policy: Policy, net: nn.Module, example: Any) -> None:
    """Raise `InputError` if a policy has thresholds for another number of exits than the network has."""
    exits = count_exits(net, example)
    if exits == 1 and policy.num_exits > 1:
        raise InputError(
            f"the network has no branches, but the policy is for {policy.num_exits} exits: give the network with its "
            "branches, as from attach(net, at=[...]), not its backbone; or policy=None for a file without early exits"
        )
    if policy.num_exits != exits:
        raise InputError(f"the policy has {len(policy.thresholds)} thresholds; {exits} exits need {exits - 1}")


def never_ran(tap: str) -> str:
    """The error message for a tap that `forward` does not reach."""
    return f"the tap {tap!r} never ran before the output; tap a submodule that forward calls"


def runs_twice(tap: str) -> str:
    """The error message for a tap that `forward` reaches more than once."""
    return f"the tap {tap!r} runs twice in one forward pass; tap a submodule that runs once"


@contextlib.contextmanager
def _hooks(backbone: nn.Module, taps: Sequence[str], leave: Callable[[str, Any], None]) -> Iterator[None]:
    """Call `leave(tap, output)` after each tapped submodule that this thread runs within the block."""
    thread = threading.get_ident()
    handles = []
    for tap in taps:

        def hook(_module: nn.Module, _args: Any, output: Any, tap: str = tap) -> None:
            if threading.get_ident() == thread:
                leave(tap, output)

        handles.append(backbone.get_submodule(tap).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
