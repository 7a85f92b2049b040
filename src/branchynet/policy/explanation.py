"""Explain why no sample leaves early: compare what each branch costs with what it saves.

Shape letters: S samples, N exits.
"""

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .exit_cost import ExitCost
from .exit_record import ExitRecord
from .limits import SLACK, Limit
from .record_scores import scores_of_record
from .values import PROMISED, Choice, Ints

_GAIN = 0.05  # an exit with less of the last exit's gain over chance is of no use
_TRAINED = 0.3  # the last exit's gain, relative to the largest possible, from which the network counts as trained


@dataclass(frozen=True)
class LoneExit:
    """The balance of an early exit if it is the only one.

    Attributes:
        exit: its number, from 1.
        added_us: microseconds that its branch adds per sample that continues.
        saved_us: microseconds saved per sample that leaves there; below 0 if leaving takes longer than continuing.
        needed: the share of samples that must leave there for the branch to save time; infinite if it never can.
        possible: the share that may leave there under the limit, on the record; None for a limit on cost.
    """

    exit: int
    added_us: float
    saved_us: float
    needed: float
    possible: float | None

    def __str__(self) -> str:
        """One sentence."""
        text = f"exit {self.exit} adds {self.added_us:.1f} us to a sample that continues"
        if self.saved_us <= 0:
            return f"{text} and saves nothing on one that leaves"
        text += f" and saves {self.saved_us:.1f} us on one that leaves, so it pays if {self.needed:.1%} leave"
        return text if self.possible is None else f"{text}; this limit allows {self.possible:.1%}"


def lone_exits(record: ExitRecord, cost: ExitCost, choice: Choice) -> tuple[LoneExit, ...]:
    """Return what each early exit alone would cost and save, for a `choice` of `choose(record, cost, ...)`."""
    scores, losses = scores_of_record(record, choice.policy.score), record.losses.astype(np.float64)
    ((name, value),) = choice.constraint.items()
    limit = Limit(name, value)
    if limit.without_labels and record.outputs is not None:
        answers = record.outputs.argmax(axis=2)
        losses = (answers != answers[:, -1:]).astype(np.float64)
    plain = float(cost.latency_us([False] * (cost.num_exits - 1) + [True])[-1])
    found = []
    for n in range(cost.num_exits - 1):
        each = cost.latency_us([k in (n, cost.num_exits - 1) for k in range(cost.num_exits)])
        added, saved = float(each[-1]) - plain, plain - float(each[n])
        needed = added / (added + saved) if saved > 0 else math.inf
        possible = None
        if name in PROMISED:
            allowed = value if not limit.absolute else limit.risk - float(losses[:, -1].mean())
            possible = _most(scores[:, n], losses[:, n] - losses[:, -1], allowed)
        found.append(LoneExit(n + 1, added, saved, needed, possible))
    return tuple(found)


def _most(scores: np.ndarray, gain: np.ndarray, allowed: float) -> float:
    """Return the largest share of samples below a threshold with a mean `gain` in loss `(S,)` that a limit allows."""
    order = np.argsort(scores, kind="stable")
    order = order[np.isfinite(scores[order])]
    ordered = scores[order]
    total = np.cumsum(gain[order]) / len(scores)
    edge = np.append(ordered[:-1] < ordered[1:], True)[: len(order)]  # equal scores leave together
    fit = np.flatnonzero(edge & (total <= allowed + SLACK))
    return float(fit[-1] + 1) / len(scores) if len(fit) else 0.0


def warn_of_chance(record: ExitRecord) -> None:
    """Warn if an exit is hardly more accurate than always predicting the most common class, but the last exit is."""
    if record.labels is None:
        return
    most, accuracy = chance(record.labels), 1 - record.losses.mean(axis=0, dtype=np.float64)
    gain = accuracy - most.share
    near = [n for n in range(record.num_exits - 1) if gain[n] <= _GAIN * gain[-1]]
    if near and accuracy[-1] > max(most.limit, most.share + _TRAINED * (1 - most.share)):
        warnings.warn(
            f"exit {near[0] + 1} has {accuracy[near[0]]:.1%} accuracy, hardly more than always predicting the most "
            f"common class ({most.share:.1%}); the last exit has {accuracy[-1]:.1%}: attach a larger branch there, or "
            "exits at other places, which advise(...) finds",
            stacklevel=3,
        )


class Chance(NamedTuple):
    """The `share` of the most common class, and the largest accuracy that chance explains (3 standard deviations)."""

    share: float
    limit: float


def chance(labels: Ints) -> Chance:
    """Return the accuracy of always predicting the most common class of labels `(S,)`."""
    share = float(np.bincount(labels).max()) / len(labels)
    return Chance(share, share + 3 * math.sqrt(share * (1 - share) / len(labels)))


def why_never(record: ExitRecord, cost: ExitCost | None, choice: Choice) -> str:
    """Return why no sample leaves early under a choice; empty if some do. Without a cost, branches cost nothing."""
    if any(choice.policy.enabled[:-1]) or choice.policy.num_exits == 1:
        return ""
    if not choice.constraint.keys() & set(PROMISED):
        return "the last exit meets this limit and no early exit is more accurate: lower the limit to save time."
    free = ExitCost((1.0,) * choice.policy.num_exits, (0.0,) * choice.policy.num_exits)
    exits = lone_exits(record, cost or free, choice)
    balance = "" if cost is None else f": {'. '.join(map(str, exits))}"
    if any(e.possible is not None and e.possible > e.needed for e in exits):
        # On the record, an exit would pay. A promise holds for other samples too, so it allows fewer to leave.
        return (
            f"no early exit passes the test of the promise{balance}. One would pay on these {record.samples:,} "
            "samples, but they are too few for a promise about others: choose with a looser limit, with more "
            "validation samples, or without a promise."
        )
    if cost is not None and all(e.saved_us <= 0 for e in exits):
        plain = float(cost.latency_us([False] * (cost.num_exits - 1) + [True])[-1])
        return (
            f"do not bother with exits at {cost.where}: the network takes {plain:.1f} us per sample, and leaving at "
            f"the fastest exit takes {plain - max(e.saved_us for e in exits):.1f} us{balance}. Measure with another "
            "batch size or runtime, or attach smaller branches."
        )
    return f"no early exit {'is sure enough for' if cost is None else 'pays at'} this limit{balance}."
