"""A network whose exits are independent networks: each sample is answered by the first one that is sure."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..argument_checks import described, function, instance
from ..errors import BranchyNetError, GraphError, InputError, first_line
from .calls import INPUT, Reader, read_tensor, single_output, slow_path
from .checks import MISFITS, changed, written
from .network import BranchyNet


def cascade(*networks: nn.Module, output: Reader | Sequence[Reader | None] | None = None) -> BranchyNet:
    """Return a network whose exits are the given networks, from the cheapest to the most accurate.

    All networks read the same inputs, positional ones by position and others by keyword. The result works with
    `record`, `choose`, `measure`, `averaged`, `export` and engines like any network with early exits. Its plain network
    is the last one alone; the other networks count as branches.

    Args:
        networks: two or more networks in eval mode, which stay as they are. The exits of a `BranchyNet` among them take
            its place, unless `output` selects one.
        output: ``output(network_output) -> Tensor``, if the rule for the backbone of a `BranchyNet` does not find a
            network's logits; or a list with one such function per network, None where the rule finds them.

    Raises:
        InputError: fewer than two networks, one that is not an `nn.Module`, comes twice or is in training mode, or an
            `output` that does not fit. `forward` raises it if a network cannot process the inputs, or if the outputs of
            the networks differ in their shapes.
        GraphError: `forward` raises it if a network changes its inputs in place, or has several outputs.

    Example:
        >>> import torch
        >>> from branchynet import cascade
        >>> from torch import nn
        >>> small, big = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> [tuple(logits.shape) for logits in cascade(small.eval(), big.eval())(torch.randn(5, 4))]
        [(5, 3), (5, 3)]

    Source: Wang et al. 2022, "Wisdom of Committees", arXiv 2012.01988; Kolawole et al. 2025, "Agreement-Based
    Cascading", arXiv 2407.02348. For their rules, see the score ``"agreement"`` and `averaged`.
    """
    for n, network in enumerate(networks, 1):
        remedy = "give the networks one by one, cascade(small, big)"
        if isinstance(network, (str, os.PathLike)):
            remedy = "for an ONNX file, give from_onnx(path).eval()"
        instance(f"network {n} of the cascade", network, nn.Module, remedy)
        if any(network is earlier for earlier in networks[: n - 1]):
            raise InputError(
                f"network {n} of the cascade is the same {type(network).__name__} as an earlier one, so its exit adds "
                "nothing: give each network once"
            )
        if any(module.training for module in network.modules()):
            raise InputError(
                f"network {n} of the cascade ({type(network).__name__}) is in training mode, in which it may answer "
                "otherwise: give network.eval()"
            )
    if len(networks) < 2:
        raise InputError(f"a cascade needs two networks or more; got {len(networks)}: cascade(small, big)")
    return Cascade(networks, _readers(output, len(networks)))


class Cascade(BranchyNet):
    """A `BranchyNet` whose branches are networks that read the inputs; the backbone is the last network."""

    def __init__(self, networks: Sequence[nn.Module], outputs: Sequence[Reader | None]) -> None:
        super().__init__(networks[-1], {}, output=outputs[-1])
        self.taps = (INPUT,) * (len(networks) - 1)
        self.branches = nn.ModuleList(networks[:-1])
        self.outputs = tuple(outputs)
        selected = (sketch for network in networks for sketch in getattr(network, "selected_on", ()))
        self.selected_on = tuple(dict.fromkeys(selected))
        self.training = self.branches.training = False

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The networks, in order."""
        return (*self.branches, self.backbone)

    @property
    def num_exits(self) -> int:
        """N, the number of exits of all networks."""
        read = zip(self.networks, self.outputs, strict=True)
        return sum(net.num_exits if isinstance(net, BranchyNet) and reader is None else 1 for net, reader in read)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Return the output of every network: a tuple of N tensors."""
        named = [*((str(n), value) for n, value in enumerate(args, 1)), *kwargs.items()]
        given = [(name, value) for name, value in named if isinstance(value, Tensor)]
        exits: list[Tensor] = []
        for n, (network, reader) in enumerate(zip(self.networks, self.outputs, strict=True), 1):
            where = f"network {n} of the cascade ({type(network).__name__})"
            before = {} if torch.compiler.is_compiling() else written(given)
            with slow_path:
                returned = _called(network, args, kwargs, where)
            if before and (name := changed(before, written(given))) is not None:
                raise GraphError(
                    f"{where} changes the input {name!r} in place, so other networks would read something else: make "
                    "that operation not in-place"
                )
            if reader is not None:
                exits.append(read_tensor(reader, returned, where))
            else:
                exits.extend(returned if isinstance(network, BranchyNet) else [single_output(returned, where)])
            if exits[-1].dim() < 2 or exits[-1].shape[1:] != exits[0].shape[1:]:
                raise InputError(
                    f"{where} gives outputs {_shape(exits[-1])} and network 1 gives {_shape(exits[0])}; all networks "
                    "of a cascade must give (B, C, ...) of one shape, with the same classes in the same order: give "
                    "one that was trained for the same task, or select the logits with output="
                )
        return tuple(exits)


def _called(network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], where: str) -> Any:
    try:
        return network(*args, **kwargs)
    except MISFITS as error:
        if torch.compiler.is_compiling() or isinstance(error, (BranchyNetError, torch.OutOfMemoryError)):
            raise
        inputs = [described(value) for value in args] + [f"{name}={described(v)}" for name, v in kwargs.items()]
        raise InputError(
            f"{where} cannot process {', '.join(inputs) or 'nothing'} ({first_line(error)}): all networks of a cascade "
            "read the same inputs; give such inputs, or wrap the network in a module that takes them"
        ) from error


def _readers(output: Any, count: int) -> tuple[Reader | None, ...]:
    """Return one reader per network. Raises `InputError` for a wrong number or type."""
    readers = tuple(output) if isinstance(output, (tuple, list)) else (output,) * count
    if len(readers) != count:
        raise InputError(f"output= has {len(readers)} functions for {count} networks; give one per network, or None")
    for reader in readers:
        if isinstance(reader, nn.Module):
            raise InputError(f"output= is a {type(reader).__name__}, a module: give nn.Sequential(network, module)")
        if reader is not None:
            function("output", reader, "(network_output) -> Tensor")
    return readers


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(['B', *map(str, tensor.shape[1:])])})"
