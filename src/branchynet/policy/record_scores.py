"""Compute the scores of a record."""

from typing import TYPE_CHECKING

import numpy as np

from ..argument_checks import described
from ..errors import InputError
from ..extras import needed_by
from .exit_record import ExitRecord
from .fitted_scores import FittedScore, check_fitted
from .score_names import NAMES
from .values import Floats, score_name

if TYPE_CHECKING:
    from .scores import Score


def is_named(score: "str | Score") -> bool:
    """Return whether a score is a named or a fitted one, which read logits."""
    from .scores import SCORES

    return isinstance(score, (str, FittedScore)) or score in SCORES.values()


def score_in_use(record: ExitRecord, score: "str | Score | None") -> "str | Score":
    """Return `score`, or if it is None, the score that `record` holds, or entropy.

    Raises:
        InputError: `record` holds the values of another score.
    """
    held = record.score
    if score is None:
        return "entropy" if held is None else held
    if held is not None and not _same(held, score):
        raise InputError(
            f"the record holds the score {score_name(held)!r}, not {score_name(score)!r}; leave score= out, or record "
            "again with that one"
        )
    return score if held is None or callable(score) or score in NAMES else held


def _same(a: "str | Score", b: "str | Score") -> bool:
    if not all(isinstance(s, (str, FittedScore)) for s in (a, b)):
        from .scores import SCORES

        a, b = (SCORES.get(s, s) if isinstance(s, str) else s for s in (a, b))
    # A file keeps only the name of a callable.
    return score_name(a) == score_name(b) if isinstance(a, str) or isinstance(b, str) else a == b


def scores_of_record(record: ExitRecord, score: "str | Score" = "entropy") -> Floats:
    """Return the scores `(S, N)` float32 of every exit for every sample of `record`: its own if it holds scores.

    Raises:
        InputError: the record holds another score, or `score` does not return one number per sample.
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
