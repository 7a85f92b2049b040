"""A network with side branches: one forward gives every exit."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .branches import default_branch
from .errors import GraphError, InputError, nearest

INPUT = "input"  # the tap name that stands for the network's first argument


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
            be a `BranchyNet` itself (the paper's tree): its exits take its place in the tuple.

    Raises:
        InputError: a tap that is no submodule (the nearest name is suggested), or a branch that is no module.
        GraphError: from `forward`, where a tap never runs, runs twice, or runs out of order.
    """

    def __init__(self, backbone: nn.Module, branches: Mapping[str, nn.Module]) -> None:
        super().__init__()
        modules = dict(backbone.named_modules())
        for tap, branch in branches.items():
            if tap != INPUT and (not tap or tap not in modules):
                raise InputError(f"the backbone has no submodule {tap!r}{nearest(tap, [INPUT, *modules])}")
            if not isinstance(branch, nn.Module):
                raise InputError(f"the branch at {tap!r} must be an nn.Module; got {type(branch).__name__}")
        self.backbone = backbone
        self.taps = tuple(branches)
        self.branches = nn.ModuleList(branches.values())  # ModuleDict refuses the dots in submodule names

    @property
    def exits(self) -> int:
        """N, the number of exits, the backbone's own included."""
        return 1 + sum(branch.exits if isinstance(branch, BranchyNet) else 1 for branch in self.branches)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Every exit's output: a tuple of N tensors, earliest exit first."""
        by_tap = dict(zip(self.taps, self.branches, strict=True))
        passed: list[str] = []
        exits: list[Tensor] = []
        tapped: list[tuple[str, Tensor, int]] = []

        def leave(tap: str, value: Any) -> None:
            if tap in passed:
                raise GraphError(f"the tap {tap!r} runs twice in one forward; tap a submodule that runs once")
            passed.append(tap)
            features = tensor_of(value, tap)
            if self._modifies_in_place():
                features = features.clone()
            elif torch.is_grad_enabled():
                tapped.append((tap, features, features._version))
            output = by_tap[tap](features)
            exits.extend(output if isinstance(output, tuple) else (output,))

        with _hooks(self.backbone, [tap for tap in self.taps if tap != INPUT], leave):
            if INPUT in by_tap:
                leave(INPUT, first_input(args, kwargs))
            last = tensor_of(self.backbone(*args, **kwargs), "the backbone's output")
        if tuple(passed) != self.taps:
            missing = [tap for tap in self.taps if tap not in passed]
            if missing:
                raise GraphError(
                    f"the tap {missing[0]!r} never ran before the output; tap a submodule that forward calls"
                )
            raise OrderError(
                f"exits are given as {self.taps} but run in the order {tuple(passed)}; give them in that order"
            )
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


def attach(
    backbone: nn.Module,
    at: Sequence[str],
    *,
    example: Any,
    num_classes: int | None = None,
    branch: Callable[[Tensor, int], nn.Module] = default_branch,
) -> BranchyNet:
    """Add a branch at each of the named taps, sized from an example.

    Args:
        backbone: the network; it is not changed.
        at: names of submodules (as in ``named_modules()``) or ``"input"``, in any order: exits are numbered as they
            run.
        example: one batch of inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
        num_classes: outputs of every branch; by default as many as the backbone's own output has.
        branch: ``branch(features, num_classes) -> nn.Module``, told the example's features at the tap.

    Raises:
        InputError: no taps, a name twice, or an unknown submodule (the nearest is suggested).
        GraphError: a tap that never runs or runs twice.
    """
    if isinstance(at, str) or not at or len(set(at)) != len(at):
        raise InputError(f"at must be a list of one or more different tap names; got {at!r}")
    args, kwargs = arguments(example)
    features: dict[str, Tensor] = {}

    class Probe(nn.Module):
        def __init__(self, tap: str) -> None:
            super().__init__()
            self.tap = tap

        def forward(self, x: Tensor) -> Tensor:
            features[self.tap] = x
            return x

    probe = BranchyNet(backbone, {tap: Probe(tap) for tap in at})
    with torch.no_grad(), evaluating(probe), contextlib.suppress(OrderError):
        probe(*args, **kwargs)
    with torch.no_grad(), evaluating(backbone):
        output = tensor_of(backbone(*args, **kwargs), "the backbone's output")
    classes = output.shape[1] if num_classes is None else num_classes
    return BranchyNet(backbone, {tap: branch(value, classes) for tap, value in features.items()})


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`(args, kwargs)` of a forward call from a tensor, a tuple of arguments, or a dict of keyword arguments."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Put every module of `net` into eval mode for the block, and each back into its own mode after it."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def tensor_of(value: Any, where: str) -> Tensor:
    """The tensor in a module's output: itself, ``.logits``, or the first entry. Raises `GraphError` for none."""
    if isinstance(value, Tensor):
        return value
    if isinstance(getattr(value, "logits", None), Tensor):
        return value.logits
    entries = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(entries, (tuple, list)) and entries and isinstance(entries[0], Tensor):
        return entries[0]
    raise GraphError(f"{where!r} gives a {type(value).__name__}, which holds no tensor to use; tap another submodule")


def first_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a forward call, positional or by keyword."""
    if args:
        return args[0]
    if kwargs:
        return next(iter(kwargs.values()))
    raise InputError("the network was called without inputs")


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
