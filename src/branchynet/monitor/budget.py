"""Hold a mean cost while inputs get harder or easier, by moving the thresholds."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..argument_checks import above_zero, instance
from ..errors import InfeasibleError, InputError
from ..policy.evaluation import policy_for
from ..policy.exit_cost import ExitCost
from ..policy.exit_record import ExitRecord, check_cost
from ..policy.exit_rule import as_deployed, exit_positions
from ..policy.prediction import Prediction
from ..policy.record_scores import scores_of_record
from ..policy.search import mean_cost
from ..policy.values import Choice, Floats, Policy
from .predictions import PicklableLock, answered, check_early

_MOST_GAIN = 0.5  # largest part of the way to the goal per batch; half is stable even if the slope is wrong
_RETURN = 4.0  # the steps back grow by this factor for each 1 / rate samples that all leave at one end
_LEAST_SPREAD = 0.02  # near the ends of the range of goals; a rare sample then does not move the thresholds far


@dataclass(frozen=True)
class BudgetState:
    """The state of a `BudgetController` after a batch.

    Attributes:
        samples: how many samples were seen.
        goal_us: the mean cost to hold, in microseconds per sample.
        mean_us: the mean cost of all samples seen; None before the first.
        thresholds: `(N-1,)` for the next batch, None for never.
        looseness: how far the thresholds have moved from their start, towards always if positive.
    """

    samples: int
    goal_us: float
    mean_us: float | None
    thresholds: tuple[float | None, ...]
    looseness: float


class BudgetController:
    """Move the thresholds of an engine to hold the mean cost at a goal, for any inputs.

    Call ``engine(images, thresholds=controller.thresholds)`` and then ``controller.update(prediction)`` for each batch.

    One number, the looseness z, sets all thresholds: the threshold of an exit lies at the quantile q of its recorded
    scores, with logit(q) = logit(q of the policy) + z. Outside the recorded scores thresholds continue linearly, so any
    goal between the costs of "all leave at the first exit in use" and "none leaves early" can be held on any inputs.
    Looseness follows the error (mean cost - goal) and the sum of all errors, so the mean since the start approaches the
    goal. While no sample can leave early (for example, every score is NaN), or all do, the thresholds move as far as
    they can; they return within a few batches afterwards. If inputs get harder, holding the cost may lose accuracy. To
    detect that, run a `Monitor` on an engine with fixed thresholds. Threads may share a controller.

    Args:
        record: calibration samples, which give the distribution of the scores of every exit.
        policy: the score, the exits in use, and the relation of their thresholds; or a `Choice`.
        cost: the cost of each exit.
        goal_us: the mean cost to hold, in microseconds per sample.
        goal_share: alternatively, the goal as a share of the cost of a sample that does not leave early.
        rate: the share of an error that is corrected per sample; thresholds settle in about 2 / rate samples.

    Raises:
        InputError: record, policy and cost are of different networks, exits or scores; no early exit is in use; not
            exactly one goal; or a goal or rate that is not a number above 0.
        InfeasibleError: no thresholds reach the goal; the message names the costs that can be reached.

    Example:
        >>> import numpy as np
        >>> scores = np.random.default_rng(0).random((1000, 2))  # 1,000 samples, 2 exits
        >>> record = ExitRecord.from_scores(scores, np.zeros((1000, 2)), "entropy")
        >>> cost = ExitCost(trunk_us=(10.0, 30.0), branch_us=(0.0, 0.0))
        >>> controller = BudgetController(record, Policy("entropy", (0.5,)), cost, goal_us=20)
        >>> state = controller.update([2, 2, 2, 1])  # the exits of a batch: it cost more than the goal
        >>> state.mean_us, state.looseness > 0
        (32.5, True)

    Sources: Teerapittayanon et al. 2016, section V-B (adapting T as future work); Gibbs and Candès 2021, *Adaptive
    conformal inference under distribution shift*, arXiv:2106.00170 (following a quantile by its errors); Angelopoulos,
    Candès and Tibshirani 2023, *Conformal PID control*, arXiv:2307.16895 (the sum of errors as well).
    """

    def __init__(
        self,
        record: ExitRecord,
        policy: Policy | Choice,
        cost: ExitCost,
        *,
        goal_us: float | None = None,
        goal_share: float | None = None,
        rate: float = 0.01,
    ) -> None:
        instance("cost", cost, ExitCost, "give what measure(...) returns, after the policy")
        check_cost(record, cost)
        policy = policy_for(record, policy)
        check_early(policy)
        rate = above_zero("rate", rate)
        if rate > _MOST_GAIN:
            raise InputError(f"rate={rate!r} must lie between 0 and {_MOST_GAIN}, such as 0.01")
        self.policy = policy
        self._us = cost.latency_us(policy.enabled)
        self._cheapest, self._dearest = float(self._us[policy.enabled.index(True)]), float(self._us[-1])
        self.goal_us = self._goal(goal_us, goal_share)
        self._rate = rate
        self._line = _ThresholdCurves(scores_of_record(record, policy.score), policy.thresholds)
        self._base = self._looseness = self._line.reaching(self.goal_us, self._us)
        self._samples, self._excess, self._stuck = 0, 0.0, 0.0
        self._lock = PicklableLock()

    @property
    def thresholds(self) -> tuple[float | None, ...]:
        """`(N-1,)` thresholds for the next batch, None for never."""
        return self._line.thresholds(self._looseness)

    @property
    def state(self) -> BudgetState:
        """The state after the last `update`."""
        mean = self.goal_us + self._excess / self._samples if self._samples else None
        return BudgetState(self._samples, self.goal_us, mean, self.thresholds, self._looseness - self._base)

    def update(self, prediction: Prediction | ArrayLike) -> BudgetState:
        """Count the cost of a batch that ran with `thresholds`, and move them.

        Args:
            prediction: the result of the engine, or its exits alone, `(B,)` integers from 1. B may vary.

        Returns:
            The state after the batch.

        Raises:
            InputError: an empty batch, or an exit that the policy does not use. The batch is not counted.
        """
        exits = answered(prediction, self.policy)
        with self._lock:
            return self._follow(self._us[exits - 1])

    def _follow(self, us: Floats) -> BudgetState:
        """Move the looseness after a batch that cost `us` `(B,)`."""
        error = float((us - self.goal_us).mean())
        self._samples += len(us)
        self._excess += error * len(us)
        span = self._dearest - self._cheapest
        share = (self.goal_us - self._cheapest) / span
        slope = max(share * (1 - share), _LEAST_SPREAD) * span  # us per unit of looseness, for a logistic curve
        gain = min(self._rate * len(us), _MOST_GAIN)
        # With gain / 4 for the sum of errors, the response to unchanged inputs is critically damped. No batch can cost
        # less than the cheapest exit or more than the dearest, which bounds the wanted cost.
        wanted = self.goal_us - gain / 4 * self._excess / len(us)
        move = gain * (float(us.mean()) - min(max(wanted, self._cheapest), self._dearest)) / slope
        # If all samples leave at one end, and the move is back towards the start, the thresholds went too far while
        # none could leave (or stay). They return by growing steps, but not beyond the start.
        end = self._cheapest if self._looseness > self._base else self._dearest
        outside = move * (self._looseness - self._base) < 0 and bool((us == end).all())
        self._stuck = min(self._stuck + gain, 20.0) if outside else 0.0
        back = min(abs(move) * _RETURN**self._stuck, max(abs(self._looseness - self._base), abs(move)))
        self._looseness += math.copysign(back, move)
        return self.state

    def _goal(self, goal_us: float | None, goal_share: float | None) -> float:
        if (goal_us is None) == (goal_share is None):
            raise InputError("give exactly one of goal_us and goal_share")
        name, given = ("goal_us", goal_us) if goal_us is not None else ("goal_share", goal_share)
        unit = 1.0 if name == "goal_us" else self._dearest
        given = above_zero(name, given)
        if not self._cheapest < given * unit < self._dearest:
            share = f" ({self._cheapest / unit:.4g} to 1 of it)" if name == "goal_share" and unit else ""
            raise InfeasibleError(
                f"no thresholds can keep {name}={given:g}: a sample costs from {self._cheapest:.4g} us, if all leave "
                f"at the first exit in use, to {self._dearest:.4g} us, if none leaves early{share}; give a goal "
                "between these"
            )
        return given * unit


class _ThresholdCurves:
    """The thresholds of all exits as increasing functions of the looseness z."""

    def __init__(self, scores: Floats, thresholds: tuple[float | None, ...]) -> None:
        self._scores = scores
        pairs = zip(scores.T, thresholds, strict=False)
        self._curves = [None if t is None else _ThresholdCurve(s, t) for s, t in pairs]

    def thresholds(self, z: float) -> tuple[float | None, ...]:
        """Return the thresholds `(N-1,)` at looseness `z`, None for never."""
        return tuple(None if curve is None else curve.threshold(z) for curve in self._curves)

    def reaching(self, goal_us: float, us: Floats) -> float:
        """Return the looseness at which the recorded samples cost `goal_us` on average, or the smallest below it."""
        tight, loose = -1.0, 1.0
        while self._cost(tight, us) < goal_us and tight > -1e6:
            tight *= 2
        while self._cost(loose, us) > goal_us and loose < 1e6:
            loose *= 2
        for _ in range(50):
            middle = (tight + loose) / 2
            tight, loose = (middle, loose) if self._cost(middle, us) > goal_us else (tight, middle)
        return loose

    def _cost(self, z: float, us: Floats) -> float:
        position = exit_positions(self._scores, as_deployed(self.thresholds(z)))
        counts = np.bincount(position, minlength=len(us)).astype(np.float64)
        return float(mean_cost(counts, us, len(self._scores)))


class _ThresholdCurve:
    """The threshold of one exit, which moves through its recorded scores by the logit of their quantile."""

    def __init__(self, scores: Floats, threshold: float) -> None:
        self._scores = np.sort(scores[np.isfinite(scores)].astype(np.float64))
        count = len(self._scores)
        self._logits = _logit((np.arange(count) + 0.5) / max(count, 1))
        self._spread = max(float(np.ptp(self._scores)), 1e-3) if count else 1.0
        passed = np.clip(np.searchsorted(self._scores, threshold), 0.5, max(count - 0.5, 0.5))
        self._start = float(_logit(passed / max(count, 1))) if count else threshold

    def threshold(self, z: float) -> float:
        """Interpolate between recorded scores; outside them, move one range of the scores per unit of looseness."""
        at = self._start + z
        if not len(self._scores):
            return at
        beyond = max(at - self._logits[-1], 0) + min(at - self._logits[0], 0)
        return float(np.interp(at, self._logits, self._scores) + self._spread * beyond)


def _logit(q: ArrayLike) -> Floats:
    q = np.asarray(q, np.float64)
    return np.log(q) - np.log1p(-q)
