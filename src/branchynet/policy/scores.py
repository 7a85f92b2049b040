"""Scores: how sure an exit is, as one number per sample; smaller = surer.

A score is a function ``score(outputs: tuple[Tensor, ...]) -> Tensor`` of the outputs of the exits passed so far,
earliest first, each `(B, C)` or `(B, C, ...)`; it returns `(B,)`. Arguments named `score` take a name in `SCORES`, a
score from `fit_temperature` or `fit_score`, or such a callable. The same PyTorch code scores records and is exported.

Named scores are for two or more classes that exclude each other. For dense outputs `(B, C, ...)`, such as
segmentations, they are means over all positions. For several labels per sample and for regression, pass a callable.

A logit of minus infinity rules a class out; the score is that of the other classes. If the latest logits hold NaN or
plus infinity, or rule every class out, the score is NaN (in some runtimes infinite), which is below no threshold.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .score_names import check_score

Score = Callable[[tuple[Tensor, ...]], Tensor]

_NOWHERE = -1e30  # a logit with the exponential 0; runtimes treat infinity differently
_IMPOSSIBLE = -1e4  # a log-probability with the exponential 0; finite, also in float16, so its product with 0 is 0
_FARTHEST = 100.0  # a class this far below the largest logit counts as ruled out


def entropy(outputs: tuple[Tensor, ...]) -> Tensor:
    """Entropy of the softmax of the latest logits, in nats (Teerapittayanon et al. 2016, section III-C).

    For early exits in segmentation, see Gilbert et al. 2025, doi:10.1109/icmlcn64995.2025.11140234.
    """
    log_p = torch.log_softmax(_logits(outputs), dim=1)
    return _mean(-(log_p.exp() * log_p.clamp_min(_IMPOSSIBLE)).sum(dim=1))


def max_probability(outputs: tuple[Tensor, ...]) -> Tensor:
    """1 - the largest softmax probability of the latest logits."""
    p = torch.softmax(_logits(outputs), dim=1)
    return _mean(p.sum(dim=1) - p.amax(dim=1))  # the sum is 1, or NaN; some runtimes ignore NaN in a maximum


def margin(outputs: tuple[Tensor, ...]) -> Tensor:
    """1 - (largest - second largest softmax probability) of the latest logits."""
    p = torch.softmax(_logits(outputs), dim=1)
    top = p.topk(2, dim=1).values
    return _mean(p.sum(dim=1) - (top[:, 0] - top[:, 1]))  # as above


def patience(outputs: tuple[Tensor, ...]) -> Tensor:
    """1 / the number of consecutive exits, including the latest, with the same label (Zhou et al. 2020).

    It is 1 at exit 1. To leave after p agreeing exits (PABEE's patience p - 1), set a threshold between 1/p and
    1/(p - 1). Source: arXiv 2006.04152, section 3.2.
    """
    label = _logits(outputs).argmax(dim=1)
    agrees, count = torch.ones_like(label, dtype=torch.bool), torch.ones_like(label, dtype=outputs[-1].dtype)
    for earlier in reversed(outputs[:-1]):
        agrees = agrees & answers(earlier) & (earlier.argmax(dim=1) == label)
        count = count + agrees.to(count.dtype)
    return _mean(torch.where(answers(outputs[-1]), 1 / count, math.nan))


def agreement(outputs: tuple[Tensor, ...]) -> Tensor:
    """(d + 1 - p) / n for the exits 1..n so far: how little they agree with the label of exit n.

    d is the number of exits with another label, from 0 to n - 1, and p in (0, 1] is the mean over the exits of their
    softmax probability of the label of exit n. The score is in [0, 1), and exit 1 has `max_probability`. A threshold of
    k/n lets a sample leave exit n if fewer than k exits differ, so 1/n asks all of them to agree. A threshold between
    (k - 1)/n and k/n also asks for a mean probability above n * (k/n - threshold) where k - 1 exits differ.

    Earlier exits without a softmax (see `answers`) differ, with the probability 0. Sources: Wang et al. 2022, arXiv
    2012.01988 (mean probability of a committee); Kolawole et al. 2025, arXiv 2407.02348 (agreement of an ensemble).
    """
    label, parts = _logits(outputs).argmax(dim=1), []
    for output in outputs:
        p = torch.softmax(output, dim=1).gather(1, label.unsqueeze(1)).squeeze(1)
        differs = (output.argmax(dim=1) != label).to(p.dtype)
        parts.append(torch.where(answers(output), differs + (1 - p) / len(outputs), 1 + 1 / len(outputs)))
    mean = sum(parts[1:], parts[0]) / len(outputs)
    return _mean(torch.where(answers(outputs[-1]), mean, math.nan))


def answers(output: Tensor) -> Tensor:
    """Return `(B, ...)` whether logits `(B, C, ...)` have a softmax: no NaN or +infinity, not all -infinity."""
    return output.logsumexp(dim=1).abs() < math.inf  # "less" is False for NaN in every runtime; "greater" is not


SCORES: dict[str, Score] = {
    "entropy": entropy,
    "max_probability": max_probability,
    "margin": margin,
    "patience": patience,
    "agreement": agreement,
}


def cooled(outputs: tuple[Tensor, ...], temperatures: Sequence[float]) -> tuple[Tensor, ...]:
    """Divide the logits of each exit by its temperature; labels do not change (Guo et al. 2017, arXiv 1706.04599)."""
    return tuple(output / temperature for output, temperature in zip(outputs, temperatures, strict=False))


def features(outputs: tuple[Tensor, ...], earlier: bool) -> Tensor:
    """Return the features `(B, F)` of a learned score, from outputs `(B, C)`.

    Features of the latest exit are the log-odds, by its softmax, that its label is wrong, and its logits, which show
    for which classes the softmax is unreliable. Logits are clipped at 100 below the largest, so those of ruled-out
    classes are finite. With `earlier`, further features are the probabilities of that label at each earlier exit.
    """
    latest = _logits(outputs)
    label, largest = latest.argmax(dim=1, keepdim=True), latest.amax(dim=1, keepdim=True)
    latest = torch.maximum(latest, largest - _FARTHEST)
    classes = torch.arange(latest.shape[1], device=latest.device)
    others = latest.masked_fill(classes == label, _NOWHERE).logsumexp(dim=1, keepdim=True)
    columns = [others - largest, latest]
    if earlier:
        columns += [torch.softmax(output, dim=1).gather(1, label) for output in outputs[:-1]]
    return torch.cat(columns, dim=1)


def _logits(outputs: tuple[Tensor, ...]) -> Tensor:
    latest = outputs[-1]
    if latest.dim() < 2 or latest.shape[1] < 2:
        raise InputError(
            f"outputs of shape {tuple(latest.shape)} do not have two classes in dimension 1, which the scores "
            f"{', '.join(SCORES)} need; pass a callable: score(outputs_so_far) -> (B,)"
        )
    return latest


def _mean(values: Tensor) -> Tensor:
    """Average over all positions of each sample: `(B, ...)` -> `(B,)`."""
    return values.mean(dim=list(range(1, values.dim()))) if values.dim() > 1 else values


def resolve(score: str | Score) -> Score:
    """Return the function of a name; a callable is returned unchanged. Raises `InputError` for an unknown name."""
    check_score(str(score) if isinstance(score, str) else score)
    return SCORES[score] if isinstance(score, str) else score
