"""Move the thresholds of requests that give none to hold a mean cost, within the bound of a policy with a promise."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..deploy.engine import Engine
from ..errors import FileError, InputError, nearest
from ..monitor.budget import BudgetController
from ..policy.exit_cost import ExitCost
from ..policy.exit_record import ExitRecord
from ..policy.values import Policy
from .presets import Preset

_SAMPLES = 64  # per move, because requests with equal thresholds share batches


class MovingThresholds:
    """The thresholds of a `BudgetController`, each at most that of a policy with a promise.

    A sample that leaves at some exit would have left there, or earlier, with the thresholds of that policy too. While
    the thresholds are at the bound and the cost is still above the goal, the controller does not count the error, so
    it turns back as soon as the inputs get easier.

    Args:
        controller: follows the cost.
        bound: the policy that the promise was tested for.
        cost: the cost of the exits.
    """

    def __init__(self, controller: BudgetController, bound: Policy, cost: ExitCost) -> None:
        self._controller, self._bound = controller, bound.thresholds
        self._us = cost.latency_us(controller.policy.enabled)
        self._lock = threading.Lock()
        self._exits: list[NDArray[Any]] = []
        self._count = 0
        self.thresholds = self._bounded()

    def add(self, outputs: dict[str, NDArray[Any]]) -> None:
        """Count the answers of a request that ran with `thresholds`, and move them now and then."""
        with self._lock:
            self._exits.append(outputs["exit"])
            self._count += len(outputs["exit"])
            if self._count < _SAMPLES:
                return
            exits = np.concatenate(self._exits)
            self._exits, self._count = [], 0
            at_bound = self.thresholds == self._limits()
            if not (at_bound and self._us[exits - 1].mean() >= self._controller.goal_us):
                self._controller.update(exits)
                self.thresholds = self._bounded()

    def _limits(self) -> tuple[float | None, ...]:
        pairs = zip(self._controller.policy.thresholds, self._bound, strict=True)
        return tuple(None if own is None else bound for own, bound in pairs)

    def _bounded(self) -> tuple[float | None, ...]:
        pairs = zip(self._controller.thresholds, self._bound, strict=True)
        return tuple(None if one is None or bound is None else min(one, bound) for one, bound in pairs)


def moving_thresholds(
    folder: Path | None,
    record: Path | None,
    engine: Engine | None,
    presets: dict[str, Preset],
    name: str,
    goal_us: float,
) -> MovingThresholds:
    """Return the moving thresholds of a model.

    Args:
        folder: the folder of the model, with ``cost.json``.
        record: calibration samples.
        engine: the engine of the model.
        presets: the policies of the model.
        name: the name of the policy that bounds the moves.
        goal_us: the mean cost to hold, in microseconds per sample.

    Raises:
        FileError: a file is missing.
        InputError: there is no such policy, it has no promise, or the files do not fit.
        InfeasibleError: no thresholds reach the goal.
    """
    if engine is None or engine.policy is None:
        raise InputError("budget_us needs a model with thresholds")
    if name not in presets:
        raise InputError(f"budget_limit={name!r} is not a policy of the model{nearest(name, presets)}")
    choice = presets[name].choice
    if choice is None or choice.promise is None:
        raise InputError(f"budget_limit={name!r} has no promise; choose it with a limit on accuracy and a confidence")
    if folder is None or record is None or not (folder / "cost.json").exists():
        raise FileError(
            "budget_us needs cost.json and record.npz in the folder of the model; write them with save(...)"
        )
    cost = ExitCost.load(folder / "cost.json")
    controller = BudgetController(ExitRecord.load(record), engine.policy, cost, goal_us=goal_us)
    return MovingThresholds(controller, choice.policy, cost)
