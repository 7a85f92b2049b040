"""The reference for files and engines: a network's outputs for each row alone."""

from typing import Any

import torch
from torch import Tensor, nn

from ..nn.calls import arguments, evaluating
from ..nn.network import exit_outputs


@torch.no_grad()
def answers_alone(net: nn.Module, example: Any, rows: int) -> tuple[Tensor, ...]:
    """Return every exit's output `(R, C, ...)`, float32 on the CPU, for the first R <= `rows` rows of the example."""
    args, kwargs = arguments(example)
    answers = []
    with evaluating(net):
        for i in range(min(len(next(iter((*args, *kwargs.values())))), rows)):
            returned = net(*(t[i : i + 1] for t in args), **{k: t[i : i + 1] for k, t in kwargs.items()})
            answers.append(exit_outputs(net, returned))
    return tuple(torch.cat(exit).float().cpu() for exit in zip(*answers, strict=True))
