"""Warn of outputs that work, but that are probably not what the user intends."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_SUM = 1e-2  # tolerance for the sum of half-precision probabilities


def warn_of_probabilities(outputs: Sequence[Tensor], level: int = 3) -> None:
    """Warn if exits return probabilities `(B, C, ...)`: loss and score would take the softmax of a softmax.

    Args:
        outputs: one per exit, for some samples.
        level: ``stacklevel`` of the warning, to point at the user's line.
    """
    if found := [str(n) for n, output in enumerate(outputs, 1) if are_probabilities(output)]:
        exits = f"exit {found[0]} gives" if len(found) == 1 else f"exits {', '.join(found)} give"
        warnings.warn(
            f"{exits} probabilities (every row sums to 1), but exits should give logits: the loss and the named scores "
            "apply the softmax themselves, so training is slow and no score comes near 0. Remove the Softmax at the "
            "end of the head, or take its logarithm (for the last exit output=torch.log)",
            stacklevel=level,
        )


@torch.no_grad()
def are_probabilities(output: Tensor) -> bool:
    """Whether outputs `(B, C, ...)` of two or more classes are not negative and sum to 1 over the classes."""
    if output.dim() < 2 or output.shape[1] < 2 or not output.is_floating_point() or not output.numel():
        return False
    off = (output.float().sum(dim=1) - 1).abs()
    return bool((output >= 0).all() and (off <= _SUM).all())


def warn_of_further(returned: Any, answer: Tensor, where: str, remedy: str) -> None:
    """Warn if a network returns further tensors with one row per sample besides the one used as its answer."""
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
    """The shape without the batch size, so that Python shows the warning once for all batch sizes."""
    sizes = ["B", *(str(size) for size in tensor.shape[1:])]
    return f"({', '.join(sizes)})"
