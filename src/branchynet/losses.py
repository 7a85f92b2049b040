"""Losses to judge dense answers by, in [0, 1] and one a sample: ``record(net, loader, loss=pixel_error)``.

Shape letters: B samples, C classes. Outputs are `(B, C, ...)` logits and targets `(B, ...)` integer class indices, such
as images' `(B, C, H, W)` and `(B, H, W)`. Positions whose target is `ignore_index` count nowhere; a sample of nothing
else has the loss 0. These judge trained networks; they have no gradient.
"""

import torch
from torch import Tensor

from .errors import InputError

IGNORE = -100
"""The target that `torch.nn.functional.cross_entropy` ignores by default; many data sets use 255."""


def pixel_error(output: Tensor, target: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """1 - pixel accuracy: the share of each sample's positions that are wrong.

    Returns:
        `(B,)` float32 in [0, 1].

    Raises:
        InputError: output and target do not fit.
    """
    counted = _counted(output, target, ignore_index)
    wrong = ((output.argmax(dim=1) != target) & counted).flatten(1).sum(dim=1)
    return wrong / counted.flatten(1).sum(dim=1).clamp_min(1)


def iou_error(output: Tensor, target: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """1 - mean intersection over union, each sample by itself, over the classes in its target or its answer.

    The mean over samples of this is not the data set's mean IoU, which adds up all samples' intersections and unions
    before it divides and so is no mean over samples.

    Returns:
        `(B,)` float32 in [0, 1].

    Raises:
        InputError: output and target do not fit, or a target outside 0..C-1.
    """
    counted = _counted(output, target, ignore_index)
    classes = output.shape[1]
    if ((target < 0) | (target >= classes))[counted].any():
        raise InputError(
            f"targets must lie in 0..{classes - 1} for outputs {tuple(output.shape)}, or be ignore_index={ignore_index}"
        )
    pairs = torch.where(counted, target.long() * classes + output.argmax(dim=1), classes**2).flatten(1)
    table = torch.zeros(len(output), classes**2 + 1, dtype=torch.int64, device=output.device)
    table = table.scatter_add(1, pairs, torch.ones_like(pairs))[:, :-1].unflatten(1, (classes, classes))
    both = table.diagonal(dim1=1, dim2=2)
    either = table.sum(dim=1) + table.sum(dim=2) - both
    present = (either > 0).sum(dim=1)
    return 1 - torch.where(present > 0, (both / either.clamp_min(1)).sum(dim=1) / present.clamp_min(1), 1.0)


def _counted(output: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    if target.is_floating_point() or output.dim() < 2 or target.shape != output.shape[:1] + output.shape[2:]:
        raise InputError(
            f"outputs {tuple(output.shape)} need integer targets of that shape without dimension 1; got {target.dtype} "
            f"{tuple(target.shape)}"
        )
    return target != ignore_index
