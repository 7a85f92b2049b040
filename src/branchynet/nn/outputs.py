"""Outputs that are not what exits should give: they work, but not as their owner expects, so there is a warning."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_SUM = 1e-2  # so far from 1 may the sum of half-precision probabilities lie


def warn_of_probabilities(outputs: Sequence[Tensor], level: int = 3) -> None:
    """Warn where exits give probabilities `(B, C, ...)`: loss and score would take the softmax of a softmax.

    Args:
        outputs: one an exit, for some samples.
        level: how many calls up the user's line stands.
    """
    found = [str(n) for n, output in enumerate(outputs, 1) if are_probabilities(output)]
    if found:
        exits = f"exit {found[0]} gives" if len(found) == 1 else f"exits {', '.join(found)} give"
        warnings.warn(
            f"{exits} probabilities (every row sums to 1), but exits should give logits: the loss and the named scores "
            "take the softmax themselves, so that training is slow and no score comes near 0. Leave the Softmax at the "
            "end of the head out, or take its logarithm (for the last exit output=torch.log)",
            stacklevel=level,
        )


@torch.no_grad()
def are_probabilities(output: Tensor) -> bool:
    """Whether outputs `(B, C, ...)` of two or more classes lie in [0, 1] and sum to 1 over the classes."""
    if output.dim() < 2 or output.shape[1] < 2 or not output.is_floating_point() or not output.numel():
        return False
    off = (output.float().sum(dim=1) - 1).abs()
    return bool((output >= 0).all() and (off <= _SUM).all())


def warn_of_further(returned: Any, answer: Tensor, where: str, remedy: str) -> None:
    """Warn where a network returns more tensors, with a row a sample, than the one that is taken for its answer."""
    if isinstance(returned, Tensor) or torch.compiler.is_compiling():
        return
    if not isinstance(returned, (Mapping, tuple, list)):
        returned = vars(returned)
    named = returned.items() if isinstance(returned, Mapping) else enumerate(returned, 1)
    further = [
        f"{name!r} {_shape(value)}" if isinstance(name, str) else f"entry {name} {_shape(value)}"
        for name, value in named
        if isinstance(value, Tensor) and value is not answer and value.dim() and len(value) == len(answer)
    ]
    if further:
        more = ", …" if len(further) > 3 else ""
        warnings.warn(
            f"{where} holds more than the answer {_shape(answer)}: {', '.join(further[:3])}{more}, which exits "
            f"and files leave out; {remedy}",
            stacklevel=3,
        )


def _shape(tensor: Tensor) -> str:
    """Without the batch size, so that Python shows the warning once, whatever the batches of a call."""
    sizes = ["B", *(str(size) for size in tensor.shape[1:])]
    return f"({', '.join(sizes)})"
