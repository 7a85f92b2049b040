"""Detect drift: exits, scores or labels of a deployed network that differ from those of a calibration record."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..argument_checks import check_seed, real
from ..errors import InputError
from ..policy.evaluation import policy_for
from ..policy.exit_record import ExitRecord, check_cost
from ..policy.prediction import Prediction
from ..policy.values import Choice, Floats, Ints, Policy
from .martingale import CHUNK, ConformalRanks, TestMartingale, suspect
from .predictions import PicklableLock, answered_batch, check_early, predicted

RESOLUTION = 1e-5
"""Scores are rounded to multiples of this, because smaller differences between engines are not drift."""

RECALL = 1024
"""How many of the latest values of each statistic are kept, to estimate when a drift began."""


@dataclass(frozen=True)
class DriftState:
    """The state of a `Monitor` after a batch. After the first alarm only `samples` changes.

    Attributes:
        alarmed: whether exits, scores or labels differ from what calibration predicts.
        samples: how many samples were seen in total.
        capital: the largest capital of a statistic, as a share of the capital that raises an alarm; at least 1 after an
            alarm.
        statistic: the statistic with that capital: ``"exits"``, ``"labels"``, or ``"scores of exit 2"``.
        at: the sample that raised the alarm, from 1. Without an alarm, this and all following attributes are None.
        since: an estimate of the sample at which the drift began.
        cut: for scores, the value that separates the shares in `expected`; None otherwise.
        expected: what calibration predicts: the share of every exit `(N,)` or label `(C,)`, or for scores `(2,)` the
            shares below and not below `cut` among samples that leave at that exit.
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
            what = f"leave at exit {n + 1}" if self.statistic == "exits" else f"have label {n}"
        else:
            n, what = 1, f"of the {self.statistic} are {self.cut:.4g} or more"
        change = f"{self.seen[n]:.1%} {what}, but calibration predicts {self.expected[n]:.1%}"
        return f"alarm at sample {self.at}: since about sample {self.since} {change}"


class Monitor:
    """Raise an alarm when the exits, scores or labels of an engine differ from what calibration predicts.

    **Guarantee.** Assume that calibration samples and stream are exchangeable (for example, drawn independently from
    one distribution), and that these calibration samples were not used to choose the policy. Then the probability, over
    the draw of both, that the monitor *ever* raises an alarm is at most `false_alarm`, for a stream of any length and
    any number of calibration samples. Consecutive samples that resemble each other, such as frames of a video, violate
    the assumption, and so does a `BudgetController` that moves the thresholds: alarms then mean nothing.

    **Method.** The monitor watches the exits, the scores at each exit where calibration samples leave, and, if the
    record holds outputs, the labels, because the class shares may change while the inputs get no harder. Each of the
    three gets an equal part of `false_alarm`; the scores of all exits share one part. `ConformalRanks` turns each
    statistic into conformal p-values, which account for the finite calibration sample, and a `TestMartingale` bets
    against their uniformity. The guarantee follows from Ville's inequality and the union bound. Values after a change
    join the ranks too, so the monitor may miss a drift that is so slow that the stream itself becomes the reference.

    Threads may share a monitor; it processes their batches one after another.

    Args:
        record: the calibration samples, ideally a few thousand that were used neither to train the network nor to
            choose the policy.
        policy: the thresholds of the engine, or a `Choice`; a warning is issued if `record` was used to choose it.
        false_alarm: the probability of any alarm on an unchanged stream, between 0 and 1.
        seed: of the random order of equal values.

    Raises:
        InputError: record and policy have different exits or scores, no early exit is in use, a recorded score is
            NaN, or `false_alarm` is out of range.

    Example:
        >>> import numpy as np
        >>> scores = np.random.default_rng(0).random((1000, 2))  # 1,000 samples, 2 exits
        >>> record = ExitRecord.from_scores(scores, np.zeros((1000, 2)), "entropy")
        >>> monitor = Monitor(record, Policy("entropy", (0.5,)))
        >>> exits = np.full(500, 2)  # no sample leaves early any more
        >>> monitor.update(exits, np.full(500, 0.3)).alarmed
        True

    Sources: those of `branchynet.monitor.martingale`; Vovk, Nouretdinov and Gammerman 2003 (testing exchangeability
    on-line).
    """

    def __init__(
        self, record: ExitRecord, policy: Policy | Choice, *, false_alarm: float = 0.01, seed: int = 0
    ) -> None:
        check_cost(record, None)
        policy = policy_for(record, policy, "so false alarms may be more frequent: give other samples")
        check_early(policy)
        if not 0 < real("false_alarm", false_alarm) < 1:
            raise InputError(f"false_alarm={false_alarm!r} must lie between 0 and 1, such as 0.01")
        exits, scores, labels = predicted(record, policy)
        self.policy = policy
        self.false_alarm = float(false_alarm)
        self._rng = np.random.default_rng(check_seed(seed))
        self._lock = PicklableLock()
        self._classes = 0 if record.outputs is None else record.outputs.shape[2]
        part = (2 if labels is None else 3) / self.false_alarm  # the capital at which a kind of statistic alarms
        watched: list[tuple[str, int, Any, float]] = [("exits", 0, exits, part)]
        if labels is not None:
            watched.append(("labels", 0, labels, part))
        used = np.unique(exits).tolist()  # scores at other exits are unknown; `exits` notices samples there
        watched += [(f"scores of exit {n}", n, _rounded(scores[exits == n]), part * len(used)) for n in used]
        self._watched = [_WatchedStatistic(*one, self._rng) for one in watched]
        self._state = DriftState(False, 0, self._watched[0].capital, self._watched[0].name)

    @property
    def state(self) -> DriftState:
        """The state after the last `update`."""
        return self._state

    def update(
        self, prediction: Prediction | ArrayLike, scores: ArrayLike | None = None, labels: ArrayLike | None = None
    ) -> DriftState:
        """Process the next batch. The size of batches does not change which sample raises an alarm.

        Args:
            prediction: a `Prediction`, or the exits alone, `(B,)` integers from 1.
            scores: if `prediction` holds exits, the score of each sample at its exit, `(B,)`.
            labels: likewise, the predicted class indices `(B,)`; without them, labels are not monitored.

        Returns:
            The state after the batch.

        Raises:
            InputError: an empty batch, an exit that the policy does not use, a NaN score, a label that the record does
                not have, or not one score and label per sample. The batch is not counted.
        """
        exits, values, classes = answered_batch(prediction, scores, labels, self.policy, self._classes)
        batch = {"exits": exits.astype(np.float64), "scores": _rounded(values)}
        if classes is not None:
            batch["labels"] = classes.astype(np.float64)
        with self._lock:  # the state depends on the order of batches
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
            rows = np.flatnonzero(exits == s.exit) if s.exit else np.arange(len(exits))
            if len(rows):
                first = s.update(batch[s.kind][rows], columns[s.kind][rows], seen + 1 + rows)
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
            shares = [(float((v < cut).mean()), float((v >= cut).mean())) for v in (s.sorted, values)]
            return DriftState(True, 0, s.peak, s.name, at, since, cut * RESOLUTION, *shares)
        every = range(1, self.policy.num_exits + 1) if s.kind == "exits" else range(self._classes)
        shares = [tuple(float((v == n).mean()) for n in every) for v in (s.sorted, values)]
        return DriftState(True, 0, s.peak, s.name, at, since, None, *shares)


class _WatchedStatistic:
    """One number per sample, for all samples (`exit` 0) or those that leave at one exit, and the bets against it."""

    def __init__(self, name: str, exit: int, values: Any, needed: float, rng: np.random.Generator) -> None:
        self.name, self.exit, self.needed = name, exit, needed
        self.kind = name.split()[0]
        self.sorted = np.sort(values.astype(np.float64))
        self.capital = self.peak = 1 / needed
        self._ranks, self._bets = ConformalRanks(values.astype(np.float64), rng), TestMartingale()
        self._recent: list[Any] = [np.empty(0), np.empty(0, np.int64), np.empty(0)]

    def update(self, values: Floats, chance: Floats, at: Ints) -> int | None:
        """Bet on the next values `(B,)`, from the samples `at` `(B,)`. Return the first sample that raises an alarm."""
        p = self._ranks.p_values(values, chance)
        path = self._bets.update(p) / self.needed
        new = zip(self._recent, (p, at, values), strict=True)
        self._recent = [np.concatenate(both)[-RECALL - CHUNK :] for both in new]
        self.capital = float(path[-1])
        over = np.flatnonzero(path >= 1)
        if not len(over):
            return None
        self.peak = float(path[over[0]])
        return int(at[over[0]])

    def suspect(self, at: int) -> tuple[int, float, Floats]:
        """Return the sample since which values up to sample `at` drift, the quantile of the cut, and the values."""
        end = int(np.searchsorted(self._recent[1], at, side="right"))
        p, samples, values = (part[max(0, end - RECALL) : end] for part in self._recent)
        start, quantile = suspect(p)
        return int(samples[start]), quantile, values[start:]


def _rounded(scores: Floats) -> Floats:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.rint(np.asarray(scores, np.float64) / RESOLUTION)
