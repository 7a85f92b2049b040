"""The joint loss for training, and losses that evaluate dense outputs: ``record(net, loader, loss=pixel_error)``.

Losses for evaluation are in [0, 1], one per sample, without a gradient. Outputs are logits `(B, C, ...)` and targets
integer class indices `(B, ...)`, such as `(B, C, H, W)` and `(B, H, W)` for images. Positions with the target
`ignore_index` do not count; a sample with no other position has the loss 0. Shape letters: B samples, C classes.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import InputError

IGNORE = -100
"""The target that `torch.nn.functional.cross_entropy` ignores by default; many data sets use 255."""


def pixel_error(output: Tensor, target: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """Return 1 - pixel accuracy: the share of wrong positions per sample.

    Returns:
        `(B,)` float32 in [0, 1].

    Raises:
        InputError: output and target do not fit.
    """
    counted = _counted(output, target, ignore_index)
    wrong = ((output.argmax(dim=1) != target) & counted).flatten(1).sum(dim=1)
    return wrong / counted.flatten(1).sum(dim=1).clamp_min(1)


def iou_error(output: Tensor, target: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """Return 1 - mean intersection over union per sample, over the classes in its target or its prediction.

    The mean over samples is not the mean IoU of the data set, which sums the intersections and unions of all samples
    before it divides.

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


Loss = Callable[[Tensor, Tensor], Tensor]


def joint_loss(
    outputs: Sequence[Tensor],
    target: Tensor,
    loss_weights: Sequence[float] | None = None,
    loss: Loss = F.cross_entropy,
    distill: float = 0.0,
) -> Tensor:
    """Compute the weighted sum of the losses of all exits, for any training loop (paper, section III-B).

    Args:
        outputs: one tensor per exit, all of one shape: for classification logits `(B, C)`, or `(B, C, ...)`.
        target: for classification `(B,)` or `(B, ...)` int64 class indices, otherwise what `loss` takes.
        loss_weights: one factor per exit, not negative; by default all 1.
        loss: ``loss(output, target) -> scalar``.
        distill: the factor of a term for each earlier exit: the Kullback-Leibler divergence, in nats, from the softmax
            of the last exit over axis 1, which gets no gradient from it (self-distillation, arXiv:1905.08094).

    Returns:
        A scalar tensor.

    Raises:
        InputError: `loss_weights` of another length or with a negative entry, outputs of different shapes, or a target
            that `loss` refuses.

    Example:
        >>> import torch
        >>> outputs = [torch.zeros(8, 10, requires_grad=True), torch.zeros(8, 10)]  # 2 exits, 8 samples, 10 classes
        >>> loss = joint_loss(outputs, torch.zeros(8, dtype=torch.int64), loss_weights=[0.5, 1.0])
        >>> round(loss.item(), 3)  # 1.5 x log(10)
        3.454
        >>> loss.backward()
    """
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    factors = (1.0,) * len(outputs) if loss_weights is None else check_loss_weights(loss_weights)
    if len(factors) != len(outputs):
        raise InputError(
            f"loss_weights {factors} are {len(factors)} for {len(outputs)} exits; give one weight per exit"
        )
    last = outputs[-1]
    if loss is F.cross_entropy:
        _check_classes(last, target)
    teacher = last.detach().softmax(dim=1) if distill else None
    total = last.new_zeros(())
    for n, (factor, output) in enumerate(zip(factors, outputs, strict=True), start=1):
        if output.shape != last.shape:
            raise InputError(
                f"exit {n} gives outputs of shape {tuple(output.shape)}, but the last exit {tuple(last.shape)}; "
                "give every branch the shape of the backbone's output"
            )
        try:
            part = loss(output, target)
        except (IndexError, ValueError, RuntimeError) as error:
            raise InputError(
                f"the loss of exit {n} cannot compare outputs {tuple(output.shape)} {output.dtype} with a target "
                f"{tuple(target.shape)} {target.dtype}: {error}{_hint_at_target(output, target)}"
            ) from error
        if teacher is not None and output is not last:
            log_p = output.log_softmax(dim=1)
            log_p = log_p.masked_fill(log_p == -math.inf, 0.0)  # no gradient for a class that is ruled out
            divergence = F.kl_div(log_p, teacher, reduction="none").sum(dim=1).mean()
            part = part + distill * divergence
        total = total + factor * part
    return total


def _check_classes(output: Tensor, target: Tensor) -> None:
    """Raise `InputError` for targets and outputs that cross-entropy accepts but cannot learn from."""
    remedy = "for regression or several labels per sample give loss="
    if output.dim() > 1 and output.shape[1] == 1:
        raise InputError(
            f"cross-entropy is 0 for outputs of one class, {tuple(output.shape)}, for any target: {remedy}"
        )
    if target.is_floating_point() and target.shape == output.shape and target.numel():
        sums = target.detach().sum(dim=1)
        # The tolerance is for half precision over many classes.
        if not (bool((target >= 0).all()) and bool(((sums - 1).abs() <= 1e-2).all())):
            raise InputError(
                f"float targets of cross-entropy must be distributions over the classes, not negative and with sum 1 "
                f"along dimension 1; got {target.dtype} {tuple(target.shape)} with other values: {remedy}"
            )


def _hint_at_target(output: Tensor, target: Tensor) -> str:
    """Return a hint at the most likely mistake in the labels of a classification, or an empty text."""
    classes = output.shape[1] if output.dim() > 1 else 0
    if output.dim() > 2 and target.shape == (len(output), 1, *output.shape[2:]):
        return "; give one class index per position, without dimension 1: target.squeeze(1)"
    if output.dim() > 2 and target.is_floating_point():
        return "; class indices are integers: target.long()"
    if not target.is_floating_point() and target.numel() and output.dim() > 1:
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= classes:
            return f"; labels lie in {low}..{high}, but outputs have {classes} classes (0..{classes - 1}): count from 0"
    if output.dim() != 2:
        return ""
    if target.shape == (len(output), 1):
        return "; give one label per sample: target.squeeze(1)"
    if target.shape == output.shape and not target.is_floating_point():
        return "; give class indices: target.argmax(1)"
    if target.dim() == 1 and target.is_floating_point():
        return "; class indices are integers: target.long()"
    return ""


def check_loss_weights(loss_weights: Sequence[float]) -> tuple[float, ...]:
    """Return the loss weights as floats. Raises `InputError` if one is negative or not finite, or all are 0."""
    try:
        factors = tuple(float(w) for w in loss_weights)
    except TypeError:
        raise InputError(f"loss_weights must be numbers, one per exit; got {loss_weights!r}") from None
    if not all(math.isfinite(w) and w >= 0 for w in factors) or not any(factors):
        raise InputError(f"loss_weights must be finite, not negative, and not all 0; got {factors}")
    return factors
