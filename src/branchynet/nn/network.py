"""A network with side branches: one forward gives every exit."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..environment import EXPORTING, require
from ..errors import BranchyNetError, GraphError, InputError, nearest
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
from .outputs import warn_of_further
from .readable import scripted_submodule


class OrderError(GraphError):
    """Branches are listed in another order than their taps run."""


class BranchyNet(nn.Module):
    """A backbone with side branches; `forward` returns every exit's output, earliest first, the backbone's own last.

    The backbone is not changed: it keeps its parameters' names, and its own checkpoints load into ``net.backbone``.

    Args:
        backbone: any module whose output is a tensor (or a tuple, dict or dataclass whose first entry or ``.logits``
            is).
        branches: for each tap, the module fed by it, in the order in which the taps run. A tap is the name of a
            submodule as in ``backbone.named_modules()``, or ``"input"`` for the network's first argument. A branch may
            be a `BranchyNet` itself (the paper's tree): its exits take its place in the tuple. Classifiers give
            *logits*, as the backbone should: no softmax at their end.
        output: ``output(what the backbone returns) -> Tensor`` where the rule above does not find the last exit. A
            module, such as a head on a headless backbone, is trained and saved with the branches.
        tap: for some taps, ``tap[name](what the submodule returns) -> Tensor`` where the rule above does not find the
            features.

    Raises:
        InputError: a tap that is no submodule (the nearest name is suggested), or a branch that is no module.
        GraphError: a tap in TorchScript; from `forward`, where a tap never runs, runs twice, or runs out of order, or
            where the backbone has several exits of its own.

    Attributes:
        selected_on: sketches (see `branchynet.policy.digests`) of the samples that the exits were selected on.
        VersionError: torch, or a package that `export` needs, is installed in a version that is known to be wrong.
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
        require(*EXPORTING)  # now, not when the training is done
        modules = dict(backbone.named_modules())
        for name, branch in branches.items():
            if name != INPUT and (not name or name not in modules):
                raise InputError(f"the backbone has no submodule {name!r}{nearest(name, [INPUT, *modules])}")
            if not isinstance(branch, nn.Module):
                raise InputError(f"the branch at {name!r} must be an nn.Module; got {type(branch).__name__}")
        for name in branches:
            if name != INPUT and (path := scripted_submodule(backbone, name)) is not None:
                raise GraphError(
                    f"the submodule {path or type(backbone).__name__!r} is TorchScript, which does not say what its "
                    f"insides answer, so that {name!r} cannot be tapped; give the nn.Module that it was made of, or "
                    "tap a submodule that is none"
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
        """N, the number of exits, the backbone's own included."""
        return 1 + sum(branch.num_exits if isinstance(branch, BranchyNet) else 1 for branch in self.branches)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Every exit's output: a tuple of N tensors, earliest exit first."""
        by_tap = dict(zip(self.taps, self.branches, strict=True))
        passed: list[str] = []
        exits: list[Tensor] = []
        tapped: list[tuple[str, Tensor, int]] = []

        def leave(tap: str, value: Any) -> None:
            if tap in passed:
                raise GraphError(runs_twice(tap))
            passed.append(tap)
            features = read_tensor(self.readers.get(tap), value, tap)
            if self._modifies_in_place():
                features = features.clone()
            elif torch.is_grad_enabled():
                tapped.append((tap, features, features._version))
            branch = by_tap[tap]
            try:
                output = branch(features)
            except MISFITS as error:
                if (
                    isinstance(error, BranchyNetError)
                    or type(error) is torch.OutOfMemoryError
                    or torch.compiler.is_compiling()
                ):
                    raise
                raise InputError(misfit(f"the branch at {tap!r}", features, error)) from error
            exits.extend(
                output if isinstance(branch, BranchyNet) else (single_output(output, f"the branch at {tap!r}"),)
            )

        with slow_path, _hooks(self.backbone, [tap for tap in self.taps if tap != INPUT], leave):
            if INPUT in by_tap:
                leave(INPUT, first_input(args, kwargs))
            returned = self.backbone(*args, **kwargs)
        if tuple(passed) != self.taps:
            missing = [tap for tap in self.taps if tap not in passed]
            if missing:
                raise GraphError(never_ran(missing[0]))
            raise OrderError(
                f"exits are given as {self.taps} but run in the order {tuple(passed)}; give them in that order"
            )
        last = read_tensor(self.output or single_output, returned, "the backbone's output")
        for tap, features, version in tapped:
            if features._version != version:
                raise GraphError(
                    f"the output of {tap!r} is overwritten in place after the branch has read it, "
                    "which breaks backward; "
                    "tap the submodule that overwrites it, or make that operation not in-place"
                )
        return (*exits, last)

    def _modifies_in_place(self) -> bool:
        return any(getattr(module, "inplace", False) for module in self.backbone.modules())


def plain_network(net: nn.Module) -> nn.Module:
    """The network alone, in the same mode; `net` itself where its last exit is what its backbone answers."""
    if not isinstance(net, BranchyNet) or type(net).forward is BranchyNet.forward:
        return net
    plain = BranchyNet(net.backbone, {}, output=net.output)
    plain.training = net.training
    return plain


def exit_outputs(net: nn.Module, returned: Any) -> tuple[Tensor, ...]:
    """Every exit's output in what `net` returned, earliest first.

    They are a `BranchyNet`'s whole tuple, or from any other network a tuple or list of two or more tensors of one shape
    `(B, C, ...)`: a network with exits of its own. All else is one exit, see `output_tensor`.
    """
    if isinstance(getattr(net, "module", net), BranchyNet):  # DistributedDataParallel keeps the network as its module
        return returned
    if found := several_exits(returned):
        return found
    answer = output_tensor(returned, where := "the network's output")
    warn_of_further(returned, answer, where, "let its forward return the answer alone")
    return (answer,)


def count_exits(net: nn.Module, example: Any) -> int:
    """N, how many exits a network has, from a forward of two rows where its type does not say."""
    if isinstance(net, BranchyNet):
        return net.num_exits
    args, kwargs = arguments(first_rows(example))
    with torch.no_grad(), evaluating(net), calling(net, example):
        return len(exit_outputs(net, net(*args, **kwargs)))


def never_ran(tap: str) -> str:
    """What to say of a tap that `forward` does not reach."""
    return f"the tap {tap!r} never ran before the output; tap a submodule that forward calls"


def runs_twice(tap: str) -> str:
    """What to say of a tap that `forward` reaches more than once."""
    return f"the tap {tap!r} runs twice in one forward; tap a submodule that runs once"


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
