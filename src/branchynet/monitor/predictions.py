"""Read exits, scores and labels from a record and from the predictions of an engine."""

import threading
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import InputError
from ..policy.exit_record import ExitRecord
from ..policy.exit_rule import as_deployed, exit_positions
from ..policy.prediction import Prediction
from ..policy.record_scores import scores_of_record
from ..policy.values import Floats, Ints, Policy


class PicklableLock:
    """A lock whose copies and pickles are new, unlocked locks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: Any) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return PicklableLock, ()


def check_early(policy: Policy) -> None:
    """Raise `InputError` if the policy uses no early exit."""
    if not any(policy.enabled[:-1]):
        raise InputError(
            "the policy uses no early exit (every threshold is never), so nothing can be watched or moved: choose one "
            "with at least one threshold"
        )


def predicted(record: ExitRecord, policy: Policy) -> tuple[Ints, Floats, Ints | None]:
    """Return the exit of each recorded sample, and its score and label there, each `(S,)`.

    Labels are None for a record of scores and losses.

    Raises:
        InputError: the record holds another score than that of the policy, or a score is NaN.
    """
    scores = scores_of_record(record, policy.score)
    position = exit_positions(scores, as_deployed(policy.thresholds))
    rows = np.arange(record.samples)
    left = scores[rows, position]
    if np.isnan(left).any():
        n = int(np.isnan(left).argmax())
        raise InputError(
            f"the record holds a score of NaN at sample {n}, exit {position[n] + 1}: leave that sample out"
        )
    labels = None if record.outputs is None else record.outputs[rows, position].argmax(axis=1)
    return position + 1, left, labels


def answered(prediction: Any, policy: Policy) -> Ints:
    """Return the exits `(B,)` of a `Prediction`, or an array of exits.

    Raises:
        InputError: no samples, no integers, or an exit that the policy does not use.
    """
    exits = np.asarray(prediction.exit if isinstance(prediction, Prediction) else prediction)
    if exits.ndim != 1 or not len(exits) or exits.dtype.kind not in "iu":
        raise InputError(
            f"exits must be integers of shape (B,) with at least one sample; got {exits.dtype} of shape {exits.shape}"
        )
    known = np.array([False, *policy.enabled, False])[np.clip(exits, 0, policy.num_exits + 1)]
    if not known.all():
        used = [n for n, enabled in enumerate(policy.enabled, 1) if enabled]
        raise InputError(
            f"a sample left at exit {exits[~known][0]}, but the policy of {policy.num_exits} exits uses {used}: give "
            "predictions of the network with the thresholds of the policy"
        )
    return exits.astype(np.int64)


def answered_batch(
    prediction: Any, scores: ArrayLike | None, labels: ArrayLike | None, policy: Policy, classes: int
) -> tuple[Ints, Floats, Ints | None]:
    """Return the exits, scores and labels `(B,)` of a `Prediction`, or the given ones; labels None without any.

    Raises:
        InputError: as `answered`; a Prediction and other values; no scores, or not one number per sample; labels that
            are not one integer in 0..C-1 per sample. Labels are not checked if `classes` is 0.
    """
    exits = answered(prediction, policy)
    if isinstance(prediction, Prediction):
        if scores is not None or labels is not None:
            raise InputError("scores or labels were given twice: pass either a Prediction, or exits, scores and labels")
        scores, labels = prediction.score, prediction.label
    if scores is None:
        raise InputError("exits were given without scores: give the engine's Prediction, or update(exits, scores)")
    try:
        values = np.asarray(scores, np.float64)
    except (TypeError, ValueError):
        raise InputError(f"scores must be numbers, one per sample; got {type(scores).__name__}") from None
    if values.shape != exits.shape:
        raise InputError(f"scores must have shape {exits.shape}, one per entry of exits; got {values.shape}")
    if np.isnan(values).any():
        raise InputError(
            f"the score of sample {int(np.isnan(values).argmax())} of the batch is NaN: the network returned NaN, or "
            "the file was exported with policy=None; leave such samples out"
        )
    if labels is None or not classes:
        return exits, values, None
    labels = np.asarray(labels)
    if labels.shape != exits.shape or labels.dtype.kind not in "iu":
        raise InputError(
            f"labels must be integers of shape {exits.shape}, one per entry of exits; got {labels.dtype} of shape "
            f"{labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(
            f"labels lie in {labels.min()}..{labels.max()}, but the record has {classes} classes (0..{classes - 1}): "
            "give predictions of the recorded network"
        )
    return exits, values, labels.astype(np.int64)
