"""Scores: how sure an exit is, as one number a sample; smaller = surer.

A score is a function ``score(outputs: tuple[Tensor, ...]) -> Tensor`` of the outputs of the exits passed so far,
earliest first, each `(B, C)` or `(B, C, ...)`; it returns `(B,)`. Wherever a score is asked for, one of the names below
or such a callable will do. The same torch code scores records and is exported into the graph.

The named ones are for classes that exclude each other, and need two or more; of dense outputs `(B, C, ...)`, such as
segmentations, they are the mean over all positions. For several labels a sample and for regression bring a callable.
`fit_temperature` and `fit_score` make callables of a record, which policies store whole.
"""

from typing import TYPE_CHECKING

import numpy as np

from ..arguments import described
from ..errors import InputError
from ..extras import needed_by
from .exit_record import ExitRecord
from .fitted_scores import FittedScore, check_fitted
from .values import Floats, score_name

if TYPE_CHECKING:
    from .scores import Score


def is_named(score: "str | Score") -> bool:
    """Whether a score is one of ours, which read logits: a name, or fitted."""
    from .scores import SCORES

    return isinstance(score, (str, FittedScore)) or score in SCORES.values()


def score_in_use(record: ExitRecord, score: "str | Score | None") -> "str | Score":
    """`score`, or where that is None the one that `record` was made with, or else entropy.

    Raises:
        InputError: `record` holds the values of another score.
    """
    own = record.score
    if score is None:
        return "entropy" if own is None else own
    if own is not None and not _same(own, score):
        raise InputError(
            f"the record holds the score {score_name(own)!r}, not {score_name(score)!r}; leave score= out, or record "
            "again with that one"
        )
    return score


def _same(a: "str | Score", b: "str | Score") -> bool:
    if not all(isinstance(s, (str, FittedScore)) for s in (a, b)):
        from .scores import SCORES

        a, b = (SCORES.get(s, s) if isinstance(s, str) else s for s in (a, b))
    # A callable that a file names can be told by its name alone.
    return score_name(a) == score_name(b) if isinstance(a, str) or isinstance(b, str) else a == b


def scores_of_record(record: ExitRecord, score: "str | Score" = "entropy") -> Floats:
    """The scores `(S, N)` float32 of every exit for every sample of `record`.

    A record of scores and losses carries its own, and they are returned.

    Raises:
        InputError: the record holds another score, or `score` does not give one number a sample.
    """
    score = score_in_use(record, score)
    if record.outputs is None:
        assert record.scores is not None
        return record.scores
    check_fitted(score, record.num_exits)
    with needed_by(f"the score {score_name(score)!r} of a record of outputs"):
        import torch

        from .scores import resolve
    function = resolve(score)
    outputs = tuple(torch.from_numpy(np.ascontiguousarray(record.outputs[:, n])) for n in range(record.num_exits))
    with torch.no_grad():
        scores = [function(outputs[: n + 1]) for n in range(record.num_exits)]
    for n, values in enumerate(scores, 1):
        if not isinstance(values, torch.Tensor) or tuple(values.shape) != (record.samples,):
            raise InputError(
                f"score {score!r} gave {described(values)} at exit {n}; it must be a tensor ({record.samples},)"
            )
    return torch.stack(scores, dim=1).float().numpy()
