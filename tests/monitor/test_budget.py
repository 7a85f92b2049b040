"""The controller holds a mean cost."""

import math

import numpy as np
import pytest

from branchynet.errors import InfeasibleError, InputError
from branchynet.monitor.budget import BudgetController
from branchynet.monitor.predictions import predicted
from branchynet.policy.exit_cost import ExitCost
from branchynet.policy.values import Policy
from helpers.monitoring import COST, POLICY, in_threads, record_of, scores_of


def route(scores, thresholds):
    leaves = scores < np.array([*thresholds, np.inf], np.float32)
    return leaves.argmax(axis=1) + 1


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("goal", [30.0, 45.0, 80.0])
@pytest.mark.parametrize("slope", [0.0, 3.0, -3.0])
def test_the_goal_is_held_while_inputs_get_harder_or_easier(batch, goal, slope):
    controller = BudgetController(record_of(2000), POLICY, COST, goal_us=goal)
    hard = scores_of(6000, seed=1) * np.exp(slope * np.linspace(-1 / 5, 1, 6000).clip(0))[:, None]
    hard = hard.astype(np.float32)
    for i in range(0, len(hard), batch):
        spent = controller.update(route(hard[i : i + batch], controller.thresholds))
        if spent.samples >= 2000:
            assert abs(spent.mean_us / goal - 1) < 0.05
    assert spent.thresholds == controller.thresholds
    if slope:
        assert np.sign(spent.looseness) == np.sign(slope)


@pytest.mark.parametrize("score", [1e4, 1e30, -1e4, -np.inf])  # nothing can leave early, or everything does
@pytest.mark.parametrize("batch", [20, 64])
@pytest.mark.parametrize("goal", [45.0, 80.0])
@pytest.mark.parametrize("stuck", [640, 6400])
def test_no_windup_while_the_goal_cannot_be_held(score, batch, goal, stuck):
    controller = BudgetController(record_of(2000), POLICY, COST, goal_us=goal)
    for _ in range(stuck // batch):
        spent = controller.update(route(np.full((batch, 3), score, np.float32), controller.thresholds))
    side = np.sign(spent.mean_us - goal)
    end = COST.latency_us(POLICY.enabled)[0 if side > 0 else -1]
    later = scores_of(40000, seed=1)
    for i in range(0, len(later), batch):
        spent = controller.update(route(later[i : i + batch], controller.thresholds))
        # The controller compensates the error, and no more: it may notice the change two batches later, and 5%
        # is the tolerance for drift, as above.
        most = 0.05 + abs(end / goal - 1) * 2 * batch / spent.samples
        assert side * (spent.mean_us / goal - 1) > -most
    assert abs(spent.mean_us / goal - 1) < 0.05


def test_threads_share_a_controller():
    known = record_of(500)
    exits, *_ = predicted(known, POLICY)
    us, seen = COST.latency_us(POLICY.enabled), []
    controller = BudgetController(known, POLICY, COST, goal_us=45)

    def update(rows):
        seen.append(us[exits[rows] - 1].sum())
        controller.update(exits[rows])

    count = in_threads(update)
    assert controller.state.samples == count
    assert math.isclose(controller.state.mean_us, sum(seen) / count, rel_tol=1e-9)  # sums in another order


def test_thresholds_start_at_the_goal_on_the_record_and_keep_disabled_exits():
    known = record_of(4000)
    controller = BudgetController(known, Policy(thresholds=(None, 0.3)), COST, goal_share=0.7)
    assert controller.thresholds[0] is None
    us = COST.latency_us((False, True, True))
    exits, *_ = predicted(known, Policy(thresholds=controller.thresholds))
    assert math.isclose(us[exits - 1].mean(), 0.7 * us[-1], rel_tol=1e-3)
    assert controller.state.mean_us is None
    assert controller.state.looseness == 0


def test_the_policy_has_a_looseness():
    """With the cost of the policy on the record as the goal, samples take the exits of the policy."""
    known = record_of(4000)
    exits, *_ = predicted(known, POLICY)
    cost = COST.latency_us(POLICY.enabled)[exits - 1].mean()
    controller = BudgetController(known, POLICY, COST, goal_us=cost)
    again, *_ = predicted(known, Policy(thresholds=controller.thresholds))
    assert (again != exits).mean() < 0.003


def test_thresholds_increase_together_and_reach_both_ends():
    controller = BudgetController(record_of(500), POLICY, COST, goal_us=60)
    lines = [controller._line.thresholds(z) for z in np.linspace(-60, 60, 200)]
    assert (np.diff(lines, axis=0) >= 0).all()
    scores = scores_of(500)[:, :2]
    assert (scores >= lines[0]).all() and (scores < lines[-1]).all()


@pytest.mark.parametrize(
    ("goal", "ends"), [({"goal_us": 24.9}, "25"), ({"goal_us": 110}, "110"), ({"goal_share": 1.2}, "1")]
)
def test_the_error_for_an_infeasible_goal_names_the_limits(goal, ends):
    with pytest.raises(InfeasibleError, match=r"from 25 us.* to 110 us") as error:
        BudgetController(record_of(100), POLICY, COST, **goal)
    assert ends in str(error.value)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({}, "exactly one"),
        ({"goal_us": 50, "goal_share": 0.5}, "exactly one"),
        ({"goal_us": math.nan}, "goal_us must be a finite number; got nan"),
        ({"goal_us": -1}, "goal_us must be above 0; got -1"),
        ({"goal_share": "half"}, "goal_share must be a finite number; got 'half'"),
        ({"goal_us": 50, "rate": 0}, "rate must be above 0; got 0"),
    ],
)
def test_bad_goals_and_rates_are_refused(keywords, message):
    with pytest.raises(InputError, match=message):
        BudgetController(record_of(100), POLICY, COST, **keywords)


def test_a_cost_of_other_exits_is_refused():
    with pytest.raises(InputError, match="the cost has 2 exits, but the record has 3"):
        BudgetController(record_of(100), POLICY, ExitCost((1, 2), (1, 0)), goal_us=2)
