"""Scores: how sure an exit is, as one number a sample; smaller = surer.

A score is a function ``score(outputs: tuple[Tensor, ...]) -> Tensor`` of the outputs of the exits passed so far,
earliest first, each `(B, C)`; it returns `(B,)`. Wherever a score is asked for, one of the names below or such a
callable will do. The same torch code scores records and is exported into the graph.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .errors import InputError, nearest
from .types import ExitRecord, Floats

Score = Callable[[tuple[Tensor, ...]], Tensor]


def entropy(outputs: tuple[Tensor, ...]) -> Tensor:
    """Entropy of the softmax of the latest logits, in nats (Teerapittayanon et al. 2016, section III-C)."""
    log_p = torch.log_softmax(outputs[-1], dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)


def max_probability(outputs: tuple[Tensor, ...]) -> Tensor:
    """1 - the largest softmax probability of the latest logits."""
    return 1 - torch.softmax(outputs[-1], dim=1).amax(dim=1)


def margin(outputs: tuple[Tensor, ...]) -> Tensor:
    """1 - (largest - second largest softmax probability) of the latest logits."""
    top = torch.softmax(outputs[-1], dim=1).topk(2, dim=1).values
    return 1 - (top[:, 0] - top[:, 1])


SCORES: dict[str, Score] = {"entropy": entropy, "max_probability": max_probability, "margin": margin}


def resolve(score: str | Score) -> Score:
    """The function behind a name; a callable is returned as it is. Raises `InputError` for an unknown name."""
    if callable(score):
        return score
    if score not in SCORES:
        raise InputError(f"unknown score {score!r}{nearest(score, SCORES)}; or pass a callable")
    return SCORES[score]


@torch.no_grad()
def of_record(record: ExitRecord, score: str | Score = "entropy") -> Floats:
    """The scores `(S, N)` float32 of every exit for every sample of `record`.

    A record made by `ExitRecord.from_scores` carries its own, and they are returned.
    """
    if record.outputs is None:
        assert record.scores is not None
        return record.scores
    function = resolve(score)
    outputs = tuple(torch.from_numpy(np.ascontiguousarray(record.outputs[:, n])) for n in range(record.exits))
    scores = [function(outputs[: n + 1]) for n in range(record.exits)]
    for n, values in enumerate(scores, 1):
        if tuple(values.shape) != (record.samples,):
            raise InputError(
                f"score {score!r} gave shape {tuple(values.shape)} at exit {n}; it must be ({record.samples},)"
            )
    return torch.stack(scores, dim=1).float().numpy()
