"""Export a network to a torch program that leaves lengths of its inputs free."""

import inspect
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from ..nn.calls import arguments
from ..nn.network import BranchyNet
from ..onnx_import.network import OnnxNetwork
from ..policy.scores import Score
from .free_lengths import Free, allowed_lengths, free_axes
from .lengths import Length
from .onnx_builder import reserved
from .table_lengths import within_tables
from .torch_program import Program, place_of_module, program_of, tensors_of


def free_program(
    net: nn.Module, example: Any, *, score: Score | None, dynamic: bool = True, free: Free | None = None
) -> tuple[Program, list[str], tuple[Length, ...]]:
    """Export a network as `program_of`; return the program, the names of its inputs, and its free lengths.

    Raises:
        InputError: see `free_axes`.
        GraphError: see `allowed_lengths`.
    """
    args, kwargs = arguments(example)
    inputs = input_names(net, len(args), tuple(kwargs))
    if free is None:
        return program_of(net, example, score=score, dynamic=dynamic), inputs, ()
    tensors = tensors_of(example)
    axes = free_axes(free, inputs, tensors)
    program = program_of(net, example, score=score, axes=axes)
    place = partial(place_of_module, program.whole)
    lengths = allowed_lengths(program.watch, inputs, axes, tensors, place)
    return program, inputs, within_tables(net, example, inputs, lengths)


def input_names(net: nn.Module, count: int, keywords: Sequence[str] = ()) -> list[str]:
    """Return the names of the first `count` positional arguments of the network's forward, then `keywords`.

    Underscores are appended to names that the graph itself uses.
    """
    names: list[str] = []
    for name in own_names(net, count, keywords):
        while reserved(name) or re.fullmatch(r"(output|score)_\d+", name) or name in names:
            name += "_"
        names.append(name)
    return names


def own_names(net: nn.Module, count: int, keywords: Sequence[str] = ()) -> list[str]:
    """As `input_names`, without underscores."""
    network = net.backbone if isinstance(net, BranchyNet) else net
    parameters = inspect.signature(network.forward).parameters.values()
    known = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    known = network.input_names if isinstance(network, OnnxNetwork) else known
    return [*(known[i] if i < len(known) else f"input_{i + 1}" for i in range(count)), *keywords]
