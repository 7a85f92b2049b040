"""How sure an exit is, in torch operations alone: the named scores, and what fitted scores are computed of.

Everything here reads `outputs`, those of the exits passed so far, earliest first, each `(B, C)` or `(B, C, ...)`, and
gives `(B,)` unless it says otherwise. The same code scores records and is exported into the graph.

A logit of minus infinity rules its class out: the score is that of the other classes. Where the latest logits hold NaN
or plus infinity, or rule every class out, the score is NaN (in some runtimes infinite), which is below no threshold.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..arguments import described
from ..errors import InputError, nearest

Score = Callable[[tuple[Tensor, ...]], Tensor]

_NOWHERE = -1e30  # a logit whose exponential is 0, without the infinities that runtimes treat in their own ways
_IMPOSSIBLE = -1e4  # a log-probability whose exponential is 0, and whose product with 0 is too; float16 holds it
_FARTHEST = 100.0  # so far below the largest logit, a class is as good as ruled out


def entropy(outputs: tuple[Tensor, ...]) -> Tensor:
    """Entropy of the softmax of the latest logits, in nats (Teerapittayanon et al. 2016, section III-C).

    An entropy to leave by in segmentation: Gilbert et al. 2025, doi:10.1109/icmlcn64995.2025.11140234.
    """
    log_p = torch.log_softmax(_logits(outputs), dim=1)
    return _mean(-(log_p.exp() * log_p.clamp_min(_IMPOSSIBLE)).sum(dim=1))


def max_probability(outputs: tuple[Tensor, ...]) -> Tensor:
    """1 - the largest softmax probability of the latest logits."""
    p = torch.softmax(_logits(outputs), dim=1)
    return _mean(p.sum(dim=1) - p.amax(dim=1))  # the sum is 1, or NaN, which some runtimes leave out of a maximum


def margin(outputs: tuple[Tensor, ...]) -> Tensor:
    """1 - (largest - second largest softmax probability) of the latest logits."""
    p = torch.softmax(_logits(outputs), dim=1)
    top = p.topk(2, dim=1).values
    return _mean(p.sum(dim=1) - (top[:, 0] - top[:, 1]))  # as above


def patience(outputs: tuple[Tensor, ...]) -> Tensor:
    """1 / the number of consecutive exits, the latest included, that give the latest label (Zhou et al. 2020).

    It is 1 at exit 1, and leaving after p agreeing exits (PABEE's patience p - 1) is a threshold between 1/p and
    1/(p - 1). Source: arXiv 2006.04152, section 3.2.
    """
    label = _logits(outputs).argmax(dim=1)
    agrees, count = torch.ones_like(label, dtype=torch.bool), torch.ones_like(label, dtype=outputs[-1].dtype)
    for earlier in reversed(outputs[:-1]):
        agrees = agrees & answers(earlier) & (earlier.argmax(dim=1) == label)
        count = count + agrees.to(count.dtype)
    return _mean(torch.where(answers(outputs[-1]), 1 / count, math.nan))


def answers(output: Tensor) -> Tensor:
    """`(B, ...)` whether logits `(B, C, ...)` give a softmax: no NaN, no plus infinity, not all minus infinity."""
    return output.logsumexp(dim=1).abs() < math.inf  # "less" is False of NaN in every runtime; "greater" is not


SCORES: dict[str, Score] = {
    "entropy": entropy,
    "max_probability": max_probability,
    "margin": margin,
    "patience": patience,
}


def cooled(outputs: tuple[Tensor, ...], temperatures: Sequence[float]) -> tuple[Tensor, ...]:
    """Every exit's logits divided by its temperature, which no argmax notices (Guo et al. 2017, arXiv 1706.04599)."""
    return tuple(output / temperature for output, temperature in zip(outputs, temperatures, strict=False))


def features(outputs: tuple[Tensor, ...], earlier: bool) -> Tensor:
    """What a learned score looks at, `(B, F)`, of outputs `(B, C)`.

    Of the latest exit: the log-odds that its answer is wrong by its own softmax, and its logits, which tell for which
    classes that is not to be trusted; none counts as more than 100 below the largest, so that classes that are ruled
    out have a finite figure. With `earlier`, also the probability that each earlier exit gave to that answer.
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
            f"outputs of shape {tuple(latest.shape)} have not two classes in dimension 1, so {_names()} "
            "say nothing of how sure they are; pass a callable: score(outputs_so_far) -> (B,)"
        )
    return latest


def _names() -> str:
    *most, last = SCORES
    return f"{', '.join(most)} and {last}"


def _mean(values: Tensor) -> Tensor:
    """Over all positions of every sample: `(B, ...)` -> `(B,)`."""
    return values.mean(dim=list(range(1, values.dim()))) if values.dim() > 1 else values


def resolve(score: str | Score) -> Score:
    """The function behind a name; a callable is returned as it is. Raises `InputError` for an unknown name."""
    if callable(score):
        return score
    if not isinstance(score, str):
        raise InputError(f"score must be a name or a callable; got {described(score)}: take one of {', '.join(SCORES)}")
    if score not in SCORES:
        raise InputError(f"unknown score {score!r}{nearest(score, SCORES)}; or pass a callable")
    return SCORES[score]
