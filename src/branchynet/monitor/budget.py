"""Holding a mean cost while inputs get harder or easier, by moving the thresholds."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..arguments import above_zero, instance
from ..errors import InfeasibleError, InputError
from ..policy.evaluation import policy_for
from ..policy.exit_cost import ExitCost
from ..policy.exit_record import ExitRecord, check_cost
from ..policy.exit_rule import exit_positions
from ..policy.prediction import Prediction
from ..policy.record_scores import scores_of_record
from ..policy.search import mean_cost
from ..policy.values import Choice, Floats, Policy
from .answers import PicklableLock, answered, check_exits

_MOST_GAIN = 0.5  # of the way to the goal in one batch, however large: half is stable even if the slope is taken wrong
_RETURN = 4.0  # times larger, the steps back, with each 1 / rate samples that all leave at one end
_LEAST_SPREAD = 0.02  # goals close to an end: a rare sample must not throw the thresholds about


@dataclass(frozen=True)
class BudgetState:
    """What a `BudgetController` knows after a batch.

    Attributes:
        samples: how many samples were seen.
        goal_us: the mean cost to hold, microseconds a sample.
        mean_us: the mean cost of all samples seen; None before the first.
        thresholds: `(N-1,)` for the next batch, None for never.
        looseness: where on their way from never to always the thresholds stand; 0 is where they started.
    """

    samples: int
    goal_us: float
    mean_us: float | None
    thresholds: tuple[float | None, ...]
    looseness: float


class BudgetController:
    """Moves the thresholds of an engine so that the mean cost stays at a goal whatever the inputs are.

    ```python
    controller = BudgetController(record, policy, cost, goal_us=40)
    for images in stream:
        prediction = engine(images, thresholds=controller.thresholds)
        controller.update(prediction)
    ```

    All thresholds move together along one line: at looseness z, that of an exit lies at the quantile q of its recorded
    scores with logit(q) = logit(q of the policy) + z. Beyond the recorded scores it goes on evenly, so that any goal
    between the costs of "all leave at the first exit in use" and "none leave early" can be held on any inputs.
    Looseness follows the error (mean cost - goal) and the sum of all errors so far, which is paid back: the mean since
    the start, and not just the latest cost, comes to the goal. Where none can leave early (say, every score is NaN), or
    all do, the thresholds move as far as they can, and come back in a few batches when that ends. What it answers is
    not looked at: where inputs get harder, holding the cost may lose accuracy; a `Monitor` beside it, on an engine with
    fixed thresholds, tells when. Threads may share a controller.

    Args:
        record: calibration samples: where the scores of every exit lie.
        policy: the score, which exits are in use, and how their thresholds stand to each other; or a `Choice`.
        cost: what each exit costs.
        goal_us: the mean cost to hold, microseconds a sample.
        goal_share: instead, the goal as a share of what a sample costs that never leaves early.
        rate: how much of an error is followed a sample: the thresholds settle in about 2 / rate samples.

    Raises:
        InputError: record, policy and cost are of different networks, exits or scores, no early exit is in use, not
            one goal is given, or a goal or rate that is no number above 0.
        InfeasibleError: no thresholds reach the goal; the message names what can be reached.

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
        policy, _ = policy_for(record, policy)
        check_exits(record, policy)
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
        """`(N-1,)` thresholds for the next batch, None for never: give them to ``engine(x, thresholds=...)``."""
        return self._line.thresholds(self._looseness)

    @property
    def state(self) -> BudgetState:
        """What the last `update` returned."""
        mean = self.goal_us + self._excess / self._samples if self._samples else None
        return BudgetState(self._samples, self.goal_us, mean, self.thresholds, self._looseness - self._base)

    def update(self, prediction: Prediction | ArrayLike) -> BudgetState:
        """Take in what a batch cost that was answered with `thresholds`, and move them.

        Args:
            prediction: what the engine answered, or the exits alone, `(B,)` integers from 1; B need not be the same
                every time.

        Returns:
            The state after the batch.

        Raises:
            InputError: an empty batch, or an exit that the policy does not use; the batch is then not counted.
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
        slope = max(share * (1 - share), _LEAST_SPREAD) * span  # microseconds a unit of looseness, for a logistic curve
        gain = min(self._rate * len(us), _MOST_GAIN)
        # On inputs that stay as they are the error dies out as fast as it can without swinging where what is owed is
        # paid back by gain / 4. No batch can cost less than the cheapest exit, so no more than that is asked for.
        wanted = self.goal_us - gain / 4 * self._excess / len(us)
        move = gain * (float(us.mean()) - min(max(wanted, self._cheapest), self._dearest)) / slope
        # Where all leave at one end however far the thresholds are from where they started, they have gone too far
        # while nothing could leave (or stay): they come back by steps that grow, but not beyond the start.
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
                f"no thresholds hold {name}={given:g}: with these exits a sample costs more than "
                f"{self._cheapest:.4g} us, where all leave at the first exit in use, and less than "
                f"{self._dearest:.4g} us, where none leaves early{share}; give a goal between"
            )
        return given * unit


class _ThresholdCurves:
    """The thresholds of every looseness z, all rising with it."""

    def __init__(self, scores: Floats, thresholds: tuple[float | None, ...]) -> None:
        self._scores = scores
        self._ways = [None if t is None else _ThresholdCurve(s, t) for s, t in zip(scores.T, thresholds, strict=False)]

    def thresholds(self, z: float) -> tuple[float | None, ...]:
        """`(N-1,)` thresholds at looseness `z`, None for never."""
        return tuple(None if way is None else way.threshold(z) for way in self._ways)

    def reaching(self, goal_us: float, us: Floats) -> float:
        """The looseness at which the recorded samples cost `goal_us` in the mean, or the least that costs no more."""
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
        thresholds = np.array([np.nan if t is None else t for t in self.thresholds(z)], np.float32)
        counts = np.bincount(exit_positions(self._scores, thresholds), minlength=len(us)).astype(np.float64)
        return float(mean_cost(counts, us, len(self._scores)))


class _ThresholdCurve:
    """How one exit's threshold goes through its recorded scores, in steps of the logit of their quantile."""

    def __init__(self, scores: Floats, threshold: float) -> None:
        self._scores = np.sort(scores[np.isfinite(scores)].astype(np.float64))
        count = len(self._scores)
        self._logits = _logit((np.arange(count) + 0.5) / max(count, 1))
        self._spread = max(float(np.ptp(self._scores)), 1e-3) if count else 1.0
        passed = np.clip(np.searchsorted(self._scores, threshold), 0.5, max(count - 0.5, 0.5))
        self._start = float(_logit(passed / max(count, 1))) if count else threshold

    def threshold(self, z: float) -> float:
        """Interpolated between recorded scores; beyond them one spread of the scores further a step."""
        at = self._start + z
        if not len(self._scores):
            return at
        beyond = max(at - self._logits[-1], 0) + min(at - self._logits[0], 0)
        return float(np.interp(at, self._logits, self._scores) + self._spread * beyond)


def _logit(q: ArrayLike) -> Floats:
    q = np.asarray(q, np.float64)
    return np.log(q) - np.log1p(-q)
