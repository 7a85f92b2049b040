import copy
import math
import pickle
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from branchynet.errors import InfeasibleError, InputError
from branchynet.monitor import martingale
from branchynet.monitor.budget import BudgetController
from branchynet.monitor.drift import Monitor
from branchynet.monitor.martingale import CHUNK, ConformalRanks, _returns
from branchynet.monitor.predictions import predicted
from branchynet.policy.exit_cost import ExitCost
from branchynet.policy.exit_record import ExitRecord
from branchynet.policy.prediction import Prediction
from branchynet.policy.values import Choice, Outcome, Policy

POLICY = Policy(thresholds=(0.1, 0.3))
COST = ExitCost((20, 30, 50), (5, 5, 0))
few = settings(max_examples=15, deadline=None)


def scores_of(samples, seed=0, shift=0.0):
    """Draw scores (S, 3) like entropies: hard samples are hard for all exits, and `shift` makes all samples harder."""
    rng = np.random.default_rng(seed)
    hard = rng.normal(size=(samples, 1)) + 0.5 * rng.normal(size=(samples, 3))
    return np.exp(-4 + 2 * hard + shift - np.arange(3)).astype(np.float32)


def record_of(samples, seed=0, shift=0.0):
    return ExitRecord.from_scores(scores_of(samples, seed, shift), np.zeros((samples, 3)))


def stream_of(samples, seed, shift=0.0, policy=POLICY):
    return predicted(record_of(samples, seed, shift), policy)[:2]


def changed(quiet, after, seed, shift):
    parts = stream_of(quiet + 1, seed), stream_of(after, seed + 1, shift)
    parts = tuple(part[:quiet] for part in parts[0]), parts[1]
    return tuple(np.concatenate(both) for both in zip(*parts, strict=True))


def reported(alarm):
    return (alarm.alarmed, alarm.at, alarm.statistic, alarm.since, alarm.cut, alarm.seen)


def p_values(ranks, values, rng):
    cuts = range(CHUNK, len(values), CHUNK)
    return np.concatenate([ranks.p_values(v, rng.random((len(v), 2))) for v in np.split(values, cuts)])


@pytest.mark.parametrize("known", [0, 1, 7, 3000])
@pytest.mark.parametrize("levels", [3, 10**9])
def test_p_values_are_uniform_and_independent_for_any_calibration(known, levels):
    rng = np.random.default_rng(known)
    rows = []
    for _ in range(400):
        values = rng.integers(0, levels, known + 8).astype(float) ** 2
        rows.append(p_values(ConformalRanks(values[:known], rng), values[known:], rng))
    p = np.array(rows)
    for column in p.T:  # Kolmogorov-Smirnov, each at a level of 1e-4
        gap = np.abs(np.sort(column) - (np.arange(400) + 0.5) / 400).max()
        assert gap < math.sqrt(-math.log(1e-4 / 2) / 2 / 400) + 1 / 800
    assert np.abs(np.corrcoef(p.T) - np.eye(8)).max() < 0.25


def test_p_values_are_the_ranks_among_calibration_and_stream():
    rng = np.random.default_rng(0)
    known, stream = rng.normal(size=500), rng.normal(size=300)
    p = p_values(ConformalRanks(known, rng), stream, rng)
    for t in range(300):
        below = (known < stream[t]).sum() + (stream[:t] < stream[t]).sum()
        before = 501 + t
        inside = (
            1
            + (  # earlier values in the same gap between calibration values
                np.searchsorted(np.sort(known), stream[:t]) == np.searchsorted(np.sort(known), stream[t])
            ).sum()
        )
        assert abs(p[t] - below / before) <= inside / before


def test_every_bet_is_fair():
    """For uniform p-values a stake of 1 returns 1 on average, so stakes and cash are a martingale."""
    p = (np.arange(1000) + 0.5) / 1000
    np.testing.assert_allclose(_returns(p).mean(axis=0), 1)


def test_capital_is_the_sum_over_starts_and_bets():
    p = np.random.default_rng(1).random(40)
    cash = np.log(100) / np.log(100 + np.arange(41))
    returns = _returns(p)
    wanted = [
        sum((cash[s] - cash[s + 1]) * returns[s : t + 1].prod(axis=0).mean() for s in range(t + 1)) + cash[t + 1]
        for t in range(40)
    ]
    np.testing.assert_allclose(martingale.TestMartingale().update(p), wanted)


def test_false_alarms_on_unshifted_streams_are_within_the_stated_rate():
    """Both calibration and stream are drawn, as the rate is over both; a rate of 0.1 is large enough for a test."""
    streams, stated = 200, 0.1
    alarms = 0
    for seed in range(streams):
        known, stream = record_of(300, 3 * seed), stream_of(2000, 3 * seed + 1)
        alarms += Monitor(known, POLICY, false_alarm=stated, seed=seed).update(*stream).alarmed
    assert alarms / streams <= stated + 3 * math.sqrt(stated * (1 - stated) / streams)
    assert alarms  # without any alarm, the rate would be too strict


@pytest.mark.parametrize("quiet", [0, 1000, 20_000])
def test_a_shift_is_detected_after_any_number_of_unshifted_samples(quiet):
    for seed in range(5):
        monitor = Monitor(record_of(5000, 100 + seed), POLICY, seed=seed)
        alarm = monitor.update(*changed(quiet, 600, 200 + 2 * seed, 1.5))
        assert alarm.alarmed and quiet < alarm.at <= quiet + 300
        assert abs(alarm.since - quiet) < 150
        assert alarm.capital >= 1
        assert f"alarm at sample {alarm.at}" in str(alarm)


def test_easier_inputs_are_drift_too():
    assert Monitor(record_of(5000), POLICY).update(*changed(500, 1000, 5, -1.5)).alarmed


def test_scores_alone_can_alarm_while_exits_stay():
    known = record_of(5000)
    exits, scores = stream_of(2000, 7)
    alarm = Monitor(known, POLICY).update(exits, np.where(exits == 1, scores / 3, scores))
    assert alarm.statistic == "scores of exit 1"
    assert len(alarm.expected) == len(alarm.seen) == 2
    assert math.isclose(sum(alarm.seen), 1)
    assert "scores of exit 1 are" in str(alarm)


def test_exits_alone_can_alarm():
    known = record_of(5000)
    exits, scores = stream_of(4000, 8)
    kept = (exits != 1) | (np.random.default_rng(0).random(4000) < 0.5)
    alarm = Monitor(known, POLICY).update(exits[kept], scores[kept])
    assert alarm.statistic == "exits"
    assert len(alarm.expected) == len(alarm.seen) == 3
    assert "leave at exit" in str(alarm)


@few
@given(st.integers(0, 10**6), st.lists(st.integers(1, 300), min_size=1, max_size=8), st.sampled_from([0.0, 0.7, 2.0]))
def test_splitting_a_stream_into_batches_changes_nothing(seed, sizes, shift):
    exits, scores = changed(200, 600, seed, shift)
    known = record_of(500, seed + 2)
    at_once = Monitor(known, POLICY, seed=seed).update(exits, scores)
    parts = Monitor(known, POLICY, seed=seed)
    for some, s in zip(np.split(exits, np.cumsum(sizes)), np.split(scores, np.cumsum(sizes)), strict=True):
        if len(some):
            parts.update(some, s)
    assert reported(parts.state) == reported(at_once)
    assert parts.state.samples == at_once.samples == 800
    assert math.isclose(parts.state.capital, at_once.capital, rel_tol=1e-6)


def test_single_samples_and_batches_of_64_agree():
    exits, scores = changed(128, 512, 1, 2.0)
    single, batches = Monitor(record_of(2000), POLICY), Monitor(record_of(2000), POLICY)
    for i in range(len(exits)):
        single.update(exits[i : i + 1], scores[i : i + 1])
    for i in range(0, len(exits), 64):
        batches.update(exits[i : i + 64], scores[i : i + 64])
    assert reported(single.state) == reported(batches.state)
    assert single.state.alarmed


@few
@given(st.integers(0, 10**6))
def test_order_within_a_batch_moves_an_alarm_by_two_batches_at_most(seed):
    exits, scores = changed(512, 1024, seed, 2.0)
    order = np.concatenate([i + np.random.default_rng(seed).permutation(64) for i in range(0, len(exits), 64)])
    known = record_of(2000, seed + 2)
    ordered, mixed = Monitor(known, POLICY), Monitor(known, POLICY)
    ordered.update(exits, scores)
    mixed.update(exits[order], scores[order])
    assert ordered.state.alarmed and mixed.state.alarmed
    assert abs(ordered.state.at // 64 - mixed.state.at // 64) <= 2


def logits_of(samples, seed, classes=(0, 1, 2, 3)):
    """Draw a record with equally hard classes, so that exits and scores do not depend on the class."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, samples)
    outputs = rng.normal(size=(samples, 3, 4))
    outputs[np.arange(samples), :, labels] += 4
    return ExitRecord(outputs, labels)


def test_only_labels_detect_missing_classes():
    policy = Policy(thresholds=(0.05, 0.1))
    stream = predicted(logits_of(1500, 1, classes=(1, 3)), policy)
    assert not Monitor(logits_of(5000, 0), policy).update(*stream[:2]).alarmed
    alarm = Monitor(logits_of(5000, 0), policy).update(*stream)
    assert alarm.statistic == "labels" and alarm.at < 150
    assert len(alarm.expected) == len(alarm.seen) == 4
    assert alarm.seen[0] < 0.05
    assert "have label" in str(alarm)
    assert not Monitor(logits_of(5000, 0), policy).update(*predicted(logits_of(1500, 1), policy)).alarmed


@pytest.mark.parametrize(("labels", "message"), [([1, 4], "1..4"), ([1], "shape"), ([0.0, 1.0], "integers")])
def test_labels_that_the_record_does_not_have_are_refused(labels, message):
    monitor = Monitor(logits_of(100, 0), POLICY)
    with pytest.raises(InputError, match=message):
        monitor.update([1, 1], [0.01, 0.02], labels)
    with pytest.raises(InputError, match=message):
        monitor.update(Prediction(np.array(labels), np.ones(2, int), np.full(2, 0.01), np.zeros((2, 4))))


def test_an_alarm_does_not_change():
    monitor = Monitor(record_of(2000), POLICY)
    first = monitor.update(*stream_of(500, 3, 3.0))
    again = monitor.update(*stream_of(500, 4))
    assert first.alarmed and reported(first) == reported(again)
    assert again.samples == 1000


def test_a_prediction_is_read_like_exits_and_scores():
    exits, scores = stream_of(300, 5, 1.0)
    prediction = Prediction(np.zeros(300, np.int64), exits, scores, np.zeros((300, 10), np.float32))
    one, other = Monitor(record_of(1000), POLICY), Monitor(record_of(1000), POLICY)
    assert one.update(prediction) == other.update(exits, scores)


def test_score_differences_below_the_resolution_are_ignored():
    """Most scores of a confident network are far below the resolution, and rounding errors set their order."""
    rng = np.random.default_rng(0)
    known = ExitRecord.from_scores(1e-7 * rng.random((3000, 3)), np.zeros((3000, 3)))
    other = 1e-6 + 1e-7 * rng.random(3000)
    assert not Monitor(known, POLICY).update(np.ones(3000, int), other).alarmed


def test_an_exit_that_calibration_samples_never_took():
    known = ExitRecord.from_scores(np.full((1000, 3), 0.01), np.zeros((1000, 3)))
    alarm = Monitor(known, POLICY).update(np.full(100, 3), np.full(100, 0.2))
    assert alarm.statistic == "exits" and alarm.expected == (1, 0, 0) and alarm.seen[2] > 0.5


@pytest.mark.parametrize(
    ("exits", "scores", "message"),
    [
        ([], [], "at least one sample"),
        ([1, 2], [0.01, math.nan], "sample 1 of the batch is NaN"),
        ([1, 4], [0.01, 0.02], "exit 4"),
        ([0, 1], [0.01, 0.02], "exit 0"),
        ([1.0, 2.0], [0.01, 0.02], "integers"),
        ([[1, 2]], [[0.01, 0.02]], "integers"),
        ([1, 2], [0.01], "shape"),
        ([1, 2], ["a", "b"], "numbers"),
        ([1, 2], None, "without scores"),
    ],
)
def test_bad_batches_are_refused_and_not_counted(exits, scores, message):
    monitor = Monitor(record_of(100), POLICY)
    with pytest.raises(InputError, match=message):
        monitor.update(np.array(exits, int) if not exits else exits, scores)
    assert monitor.state.samples == 0
    if message in ("exit 4", "exit 0", "integers", "at least one sample"):
        with pytest.raises(InputError, match=message):
            BudgetController(record_of(100), POLICY, COST, goal_us=50).update(
                np.array(exits, int) if not exits else exits
            )


def test_a_prediction_and_scores_are_refused():
    prediction = Prediction(np.zeros(1, np.int64), np.ones(1, np.int64), np.ones(1, np.float32), np.ones((1, 2)))
    with pytest.raises(InputError, match="given twice"):
        Monitor(record_of(100), POLICY).update(prediction, [0.1])
    with pytest.raises(InputError, match="and labels"):
        Monitor(logits_of(100, 0), POLICY).update(prediction, labels=[1])


def test_a_disabled_exit_is_refused():
    monitor = Monitor(record_of(100), Policy(thresholds=(None, 0.3)))
    with pytest.raises(InputError, match=r"exit 1, .* uses \[2, 3\]"):
        monitor.update([1], [0.01])


@pytest.mark.parametrize("make", [Monitor, lambda r, p: BudgetController(r, p, COST, goal_us=50)])
@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Policy(thresholds=(0.1,)), "1 thresholds, but a record of 3 exits needs 2"),
        (Policy(thresholds=(None, None)), "no early exit"),
    ],
)
def test_policies_that_do_not_fit_are_refused(make, policy, message):
    with pytest.raises(InputError, match=message):
        make(record_of(100), policy)


def test_a_record_with_nan_cannot_calibrate():
    scores = scores_of(100)
    scores[3] = np.nan
    with pytest.raises(InputError, match="NaN at sample 3, exit 3"):
        Monitor(ExitRecord.from_scores(scores, np.zeros((100, 3))), POLICY)


@pytest.mark.parametrize("false_alarm", [0, 1, -1, math.nan])
def test_false_alarm_is_a_probability(false_alarm):
    with pytest.raises(InputError, match="false_alarm"):
        Monitor(record_of(100), POLICY, false_alarm=false_alarm)


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


def in_threads(update, threads=6, batches=100):
    """Call `update` with 20 samples at a time in threads that start together."""
    gate = threading.Barrier(threads)

    def work(thread):
        gate.wait()
        for n in range(batches):
            update(np.random.default_rng(1000 * thread + n).integers(0, 500, 20))

    every = [threading.Thread(target=work, args=(k,)) for k in range(threads)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads then switch within an update
    try:
        for thread in every:
            thread.start()
        for thread in every:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    return threads * batches * 20


def test_threads_share_a_monitor():
    known = record_of(500)
    exits, scores, _ = predicted(known, POLICY)
    monitor = Monitor(known, POLICY)
    assert monitor.state.samples == 0
    assert in_threads(lambda rows: monitor.update(exits[rows], scores[rows])) == monitor.state.samples


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


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_continue_from_the_same_state(copied):
    known = record_of(500)
    exits, scores, _ = predicted(known, POLICY)
    for each, more in ((Monitor(known, POLICY), (scores,)), (BudgetController(known, POLICY, COST, goal_us=45), ())):
        each.update(exits, *more)
        other = copied(each)
        assert other.state == each.state
        assert other.update(exits, *more) == each.update(exits, *more)


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


def chosen(record):
    outcome = Outcome(1, 1.0, (0.0, 1.0), 1.0, (0.4, 0.3, 0.3), (1.0, 1.0, 1.0))
    return Choice(POLICY, {"max_drop": 0.1}, outcome, record.digest, network=record.network)


@pytest.mark.parametrize("network", [None, "a-1"])
def test_a_choice_is_used_as_its_policy(network):
    record, other = (replace(record_of(200, seed), network=network) for seed in (0, 1))
    choice = chosen(other)
    exits, scores = stream_of(300, 2)
    one, two = Monitor(record, choice), Monitor(record, POLICY)
    assert one.update(exits, scores) == two.update(exits, scores) and one.policy == POLICY
    one, two = (BudgetController(record, p, COST, goal_us=40) for p in (choice, POLICY))
    assert one.update(exits) == two.update(exits) and one.thresholds == two.thresholds
    foreign = replace(record, network="b-2")
    if network:
        for make in (lambda: Monitor(foreign, choice), lambda: BudgetController(foreign, choice, COST, goal_us=40)):
            with pytest.raises(InputError, match="the record and the choice are of different networks"):
                make()


def test_a_monitor_on_the_samples_that_chose_warns():
    record = record_of(200)
    with pytest.warns(UserWarning, match="these thresholds were chosen on this record"):
        Monitor(record, chosen(record))
    BudgetController(record, chosen(record), COST, goal_us=40)
