"""Watching a deployed network: do exits, scores and answers still look as calibration predicts?"""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..arguments import check_seed, real
from ..errors import InputError
from ..policy.evaluation import policy_for
from ..policy.exit_record import ExitRecord, check_cost
from ..policy.prediction import Prediction
from ..policy.values import Choice, Floats, Ints, Policy
from .answers import PicklableLock, answered, answered_labels, answered_scores, predicted
from .martingale import CHUNK, ConformalRanks, TestMartingale, suspect

RESOLUTION = 1e-5
"""Scores are read in steps of this size: engines may differ by less, which must not pass for drift."""

RECALL = 1024
"""So many of the latest values of each statistic are kept, to say since when it has been off."""


@dataclass(frozen=True)
class DriftState:
    """What a `Monitor` knows after a batch. Once alarmed, it stays as it was at the first alarm but for `samples`.

    Attributes:
        alarmed: whether exits, scores or labels have left what calibration predicts.
        samples: how many samples were seen in all.
        capital: of the statistic that stands out most, as a share of what it must reach for an alarm; at least 1 once
            alarmed.
        statistic: that statistic: ``"exits"``, ``"labels"``, or ``"scores of exit 2"``.
        at: the sample at which the alarm was raised, from 1; None without alarm, and so are all that follow.
        since: the sample since which that statistic has been off, as far as can be told.
        cut: for scores, where they were divided to tell the difference; None otherwise.
        expected: what calibration predicts: `(N,)` the share of every exit; `(C,)` that of every label; for scores
            `(2,)` the shares below and not below `cut`, of those that leave at that exit.
        seen: the same shares, from `since` to `at`.
    """

    alarmed: bool
    samples: int
    capital: float
    statistic: str
    at: int | None = None
    since: int | None = None
    cut: float | None = None
    expected: tuple[float, ...] | None = None
    seen: tuple[float, ...] | None = None

    def __str__(self) -> str:
        """One sentence for a log."""
        if self.expected is None or self.seen is None:
            return f"no alarm after {self.samples} samples"
        if self.cut is None:
            n = int(np.abs(np.subtract(self.seen, self.expected)).argmax())
            what = f"leave at exit {n + 1}" if self.statistic == "exits" else f"are answered label {n}"
            told = f"{self.seen[n]:.1%} {what}, where calibration predicts {self.expected[n]:.1%}"
        else:
            told = (
                f"{self.seen[1]:.1%} of the {self.statistic} are {self.cut:.4g} or more, where calibration predicts "
                f"{self.expected[1]:.1%}"
            )
        return f"alarm at sample {self.at}: since about sample {self.since} {told}"


class Monitor:
    """Alarms when the exits, scores or labels that an engine answers leave what calibration predicts.

    **What is promised.** Let calibration samples and stream be exchangeable (say, drawn independently from one
    distribution) and the policy not chosen on these calibration samples. Then the probability that the monitor *ever*
    alarms, however long the stream and whatever the number of calibration samples, is at most `false_alarm`. It is over
    the draw of both, calibration and stream. Neighbours that resemble each other, as frames of a video do, break the
    assumption, and so do thresholds that a `BudgetController` moves meanwhile: an alarm then is no news.

    **How.** Watched are which exit answers, the scores at each exit where calibration samples leave and, where the
    record holds outputs, the label answered: classes may come in other shares without being harder. Each of the three
    has an equal part of `false_alarm`, which the exits' scores share. Each such statistic is turned into conformal
    p-values (`ConformalRanks`), which allow for the calibration sample being finite, and a test martingale
    (`TestMartingale`) bets against their uniformity. By Ville's inequality and the union bound the promise follows.
    Values after a change join the ranks as well, so drift so slow that the stream itself becomes the reference may
    pass unseen.

    Threads may share a monitor: their batches are taken in one after the other.

    Args:
        record: the calibration samples, best some thousands that neither trained the network nor chose the policy.
        policy: the thresholds that the engine runs with. Given a `Choice`, its policy, with a warning where `record` is
            the data that chose it.
        false_alarm: the probability of ever alarming on an unchanged stream, between 0 and 1.
        seed: of the random order that equal values are put in.

    Raises:
        InputError: record and policy are of different exits or scores, no early exit is in use, a recorded score is
            NaN, or `false_alarm` is out of range.

    Sources: those of `conformal`; Vovk, Nouretdinov and Gammerman 2003 (testing exchangeability on-line).
    """

    def __init__(
        self, record: ExitRecord, policy: Policy | Choice, *, false_alarm: float = 0.01, seed: int = 0
    ) -> None:
        check_cost(record, None)
        policy, chose = policy_for(record, policy)
        if chose:
            warnings.warn(
                "this record chose these thresholds, so that false alarms may be more frequent: give other samples",
                stacklevel=2,
            )
        if not 0 < real("false_alarm", false_alarm) < 1:
            raise InputError(f"false_alarm={false_alarm!r} must lie between 0 and 1, such as 0.01")
        exits, scores, labels = predicted(record, policy)
        self.policy = policy
        self.false_alarm = float(false_alarm)
        self._rng = np.random.default_rng(check_seed(seed))
        self._lock = PicklableLock()
        self._classes = 0 if record.outputs is None else record.outputs.shape[2]
        part = (2 if labels is None else 3) / self.false_alarm  # the capital that a kind of statistics must reach
        self._watched = [_WatchedStatistic("exits", "exits", 0, exits.astype(np.float64), part, self._rng)]
        if labels is not None:
            self._watched.append(_WatchedStatistic("labels", "labels", 0, labels.astype(np.float64), part, self._rng))
        used = np.unique(exits).tolist()  # nothing is known of scores elsewhere: `exits` tells when samples come there
        for n in used:
            own = _steps(scores[exits == n])
            self._watched.append(
                _WatchedStatistic(f"scores of exit {n}", "scores", n, own, part * len(used), self._rng)
            )
        self._state = DriftState(False, 0, self._watched[0].capital, self._watched[0].name)

    @property
    def state(self) -> DriftState:
        """What the last `update` returned."""
        return self._state

    def update(
        self, prediction: Prediction | ArrayLike, scores: ArrayLike | None = None, labels: ArrayLike | None = None
    ) -> DriftState:
        """Look at the next batch, of any size; batches of 1 and one of 64 lead to the same alarm at the same sample.

        Args:
            prediction: what an engine answered, or the exits alone, `(B,)` integers from 1.
            scores: with exits, the scores `(B,)` there.
            labels: with exits, the class indices `(B,)` answered; where left out, labels are not watched.

        Returns:
            The state after the batch.

        Raises:
            InputError: an empty batch, an exit that the policy does not use, a NaN score, a label that the record does
                not have, or not one score and label a sample; the batch is then not counted.
        """
        exits = answered(prediction, self.policy)
        batch = {"exits": exits, "scores": _steps(answered_scores(prediction, scores, len(exits)))}
        if self._classes:
            batch["labels"] = answered_labels(prediction, labels, len(exits), self._classes)
        batch = {name: values.astype(np.float64) for name, values in batch.items() if values is not None}
        with self._lock:  # the state depends on the order of batches, so one is taken in after the other
            seen = self._state.samples
            for start in range(0, len(exits), CHUNK):
                if self._state.alarmed:
                    break
                part = slice(start, start + CHUNK)
                self._look({name: values[part] for name, values in batch.items()}, seen + start)
            self._state = replace(self._state, samples=seen + len(exits))
            return self._state

    def _look(self, batch: dict[str, Floats], seen: int) -> None:
        exits = batch["exits"]
        chance = self._rng.random((len(exits), 6))
        columns = {"exits": chance[:, :2], "scores": chance[:, 2:4], "labels": chance[:, 4:]}
        raised: list[tuple[int, _WatchedStatistic]] = []
        for s in self._watched:
            if s.kind not in batch:
                continue
            here = np.flatnonzero(exits == s.exit) if s.exit else np.arange(len(exits))
            if len(here):
                first = s.update(batch[s.kind][here], columns[s.kind][here], seen + 1 + here)
                raised += [] if first is None else [(first, s)]
        if raised:
            at, s = min(raised, key=lambda r: r[0])
            self._state = self._alarm(s, at)
        else:
            top = max(self._watched, key=lambda s: s.capital)
            self._state = DriftState(False, seen, top.capital, top.name)

    def _alarm(self, s: "_WatchedStatistic", at: int) -> DriftState:
        since, quantile, values = s.suspect(at)
        if s.kind == "scores":
            cut = float(s.sorted[min(int(quantile * len(s.sorted)), len(s.sorted) - 1)])
            told = [(float((v < cut).mean()), float((v >= cut).mean())) for v in (s.sorted, values)]
            return DriftState(True, 0, s.peak, s.name, at, since, cut * RESOLUTION, *told)
        every = range(1, self.policy.num_exits + 1) if s.kind == "exits" else range(self._classes)
        told = [tuple(float((v == n).mean()) for n in every) for v in (s.sorted, values)]
        return DriftState(True, 0, s.peak, s.name, at, since, None, *told)


class _WatchedStatistic:
    """One number a sample, for all samples (`exit` 0) or those that leave at one exit, and the bets against it."""

    def __init__(
        self, name: str, kind: str, exit: int, values: Floats, needed: float, rng: np.random.Generator
    ) -> None:
        self.name, self.kind, self.exit, self.needed = name, kind, exit, needed
        self.sorted = np.sort(values)
        self.capital = self.peak = 1 / needed
        self._ranks, self._bets = ConformalRanks(values, rng), TestMartingale()
        self._p, self._at, self._values = np.empty(0), np.empty(0, np.int64), np.empty(0)

    def update(self, values: Floats, chance: Floats, at: Ints) -> int | None:
        """Bet on the next values `(B,)`, which are those of the samples `at` `(B,)`; the first sample that alarms."""
        p = self._ranks.p_values(values, chance)
        path = self._bets.update(p) / self.needed
        kept = RECALL + CHUNK
        self._p, self._at = _last(self._p, p, kept), _last(self._at, at, kept)
        self._values = _last(self._values, values, kept)
        self.capital = float(path[-1])
        over = np.flatnonzero(path >= 1)
        if not len(over):
            return None
        self.peak = float(path[over[0]])
        return int(at[over[0]])

    def suspect(self, at: int) -> tuple[int, float, Floats]:
        """Since which sample the values up to sample `at` are off, from which quantile on, and these values."""
        upto = int(np.searchsorted(self._at, at, side="right"))
        recalled = slice(max(0, upto - RECALL), upto)
        start, quantile = suspect(self._p[recalled])
        return int(self._at[recalled][start]), quantile, self._values[recalled][start:]


def _last(kept: Any, new: Any, most: int) -> Any:
    """The latest `most` of `kept` followed by `new`."""
    return np.concatenate([kept, new])[-most:]


def _steps(scores: Floats) -> Floats:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.rint(np.asarray(scores, np.float64) / RESOLUTION)
