"""A network with side branches: one forward gives every exit."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .checking import calling
from .errors import GraphError, InputError, nearest
from .outputs import warn_of_further
from .readable import scripted
from .versions import EXPORTING, require

INPUT = "input"  # the tap name that stands for the network's first argument

Reader = Callable[[Any], Tensor]


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
        selected_on: sketches (see `branchynet.samples`) of the samples that the exits were selected on.
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
            if name != INPUT and (path := scripted(backbone, name)) is not None:
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
                raise GraphError(runs_twice(tap))
            passed.append(tap)
            features = read_tensor(self.readers.get(tap), value, tap)
            if self._modifies_in_place():
                features = features.clone()
            elif torch.is_grad_enabled():
                tapped.append((tap, features, features._version))
            branch = by_tap[tap]
            output = branch(features)
            exits.extend(output if isinstance(branch, BranchyNet) else (one_output(output, f"the branch at {tap!r}"),))

        with _slow_path, _hooks(self.backbone, [tap for tap in self.taps if tap != INPUT], leave):
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
        last = read_tensor(self.output or one_output, returned, "the backbone's output")
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


def plain_of(net: nn.Module) -> nn.Module:
    """The network alone, in the same mode; `net` itself where its last exit is what its backbone answers."""
    if not isinstance(net, BranchyNet) or type(net).forward is BranchyNet.forward:
        return net
    plain = BranchyNet(net.backbone, {}, output=net.output)
    plain.training = net.training
    return plain


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`(args, kwargs)` of a forward call from a tensor, a tuple of arguments, or a dict of keyword arguments."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}


def few(example: Any, rows: int = 2) -> Any:
    """The first rows of an example whose tensors all have one leading batch dimension; any other as it is."""
    args, kwargs = arguments(example)
    values = (*args, *kwargs.values())
    if not all(isinstance(v, Tensor) and v.dim() for v in values) or len({len(v) for v in values}) != 1:
        return example
    return {k: v[:rows] for k, v in kwargs.items()} if kwargs else tuple(v[:rows] for v in args)


class _SlowPath:
    """Blocks, in any thread, in which torch's fast path for transformers is off.

    The fast path computes `nn.TransformerEncoder` in nested tensors, which branches cannot read and graphs cannot hold.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._before = True

    def __enter__(self) -> None:
        with self._lock:
            if not self._blocks:
                self._before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self._blocks += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._blocks -= 1
            if not self._blocks:
                torch.backends.mha.set_fastpath_enabled(self._before)


_slow_path = _SlowPath()


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Put every module of `net` into eval mode for the block; modes and buffers are put back after it.

    So are parameters that a forward replaces; what it writes into them stays, since they may be too large to copy.
    Within the block torch's fast path for transformers is off.
    """
    modes = [(module, module.training) for module in net.modules()]
    buffers = [
        (module, name, tensor, None if tensor is None else tensor.detach().clone())
        for module in net.modules()
        for name, tensor in module._buffers.items()
        if tensor is None or not is_lazy(tensor)  # a lazy module gives them their sizes
    ]
    parameters = [(module, *named) for module in net.modules() for named in module._parameters.items()]
    net.eval()
    try:
        with _slow_path:
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, name, parameter in parameters:
            module._parameters[name] = parameter
        with torch.no_grad():
            for module, name, tensor, copy in buffers:
                module._buffers[name] = tensor
                if tensor is not None and copy is not None and not tensor.is_meta and not tensor.equal(copy):
                    tensor.copy_(copy)


def exits_in(net: nn.Module, returned: Any) -> tuple[Tensor, ...]:
    """Every exit's output in what `net` returned, earliest first.

    They are a `BranchyNet`'s whole tuple, or from any other network a tuple or list of two or more tensors of one shape
    `(B, C, ...)`: a network with exits of its own. All else is one exit, see `tensor_of`.
    """
    if isinstance(getattr(net, "module", net), BranchyNet):  # DistributedDataParallel keeps the network as its module
        return returned
    if several := _several(returned):
        return several
    answer = tensor_of(returned, where := "the network's output")
    warn_of_further(returned, answer, where, "let its forward return the answer alone")
    return (answer,)


def count_exits(net: nn.Module, example: Any) -> int:
    """N, how many exits a network has, from a forward of two rows where its type does not say."""
    if isinstance(net, BranchyNet):
        return net.exits
    args, kwargs = arguments(few(example))
    with torch.no_grad(), evaluating(net), calling(net, example):
        return len(exits_in(net, net(*args, **kwargs)))


def one_output(returned: Any, where: str = "the backbone's output") -> Tensor:
    """The one tensor of a network with a single exit. Raises `GraphError` where there are several exits, or none."""
    if several := _several(returned):
        raise GraphError(
            f"{where} is {len(several)} tensors of one shape {tuple(several[0].shape)}, which are exits of its own: "
            "use such a network as it is, without attaching branches, or say which tensor is meant with output="
        )
    answer = tensor_of(returned, where)
    warn_of_further(returned, answer, where, "to say which tensor is the answer, or that this one is, give output=")
    return answer


def tensor_of(value: Any, where: str) -> Tensor:
    """The tensor in a module's output: itself, ``.logits``, or the first entry. Raises `GraphError` for none."""
    tensor = tensor_in(value)
    if tensor is None:
        raise GraphError(
            f"{where!r} gives a {type(value).__name__}, which holds no tensor to use; tap another submodule"
        )
    return tensor


def tensor_in(value: Any) -> Tensor | None:
    """As `tensor_of`, or None."""
    if isinstance(value, Tensor):
        return value
    if isinstance(getattr(value, "logits", None), Tensor):
        return value.logits
    entries = list(value.values()) if isinstance(value, Mapping) else value
    return entries[0] if isinstance(entries, (tuple, list)) and entries and isinstance(entries[0], Tensor) else None


def _several(value: Any) -> tuple[Tensor, ...]:
    """The exits of a network that has several, else nothing."""
    if not isinstance(value, (tuple, list)) or isinstance(getattr(value, "logits", None), Tensor) or len(value) < 2:
        return ()
    # Compared one by one: the shapes of an export hold symbols, which cannot be hashed.
    exits = all(isinstance(v, Tensor) and v.dim() > 1 and v.shape == value[0].shape for v in value)
    return tuple(value) if exits else ()


def read_tensor(reader: Reader | None, value: Any, where: str) -> Tensor:
    """The tensor that `reader`, or else `tensor_of`, finds. Raises `GraphError` where it is none."""
    tensor = tensor_of(value, where) if reader is None else reader(value)
    if not isinstance(tensor, Tensor):
        raise GraphError(f"what reads {where!r} gives a {type(tensor).__name__}; output= and tap= must give a tensor")
    return tensor


def first_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a forward call, positional or by keyword."""
    if args:
        return args[0]
    if kwargs:
        return next(iter(kwargs.values()))
    raise InputError("the network was called without inputs")


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
