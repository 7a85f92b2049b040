import copy
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from branchynet.errors import InputError
from branchynet.monitor.budget import BudgetController
from branchynet.monitor.drift import Monitor
from branchynet.monitor.predictions import predicted
from branchynet.policy.exit_record import ExitRecord
from branchynet.policy.prediction import Prediction
from branchynet.policy.values import Policy
from helpers.monitoring import COST, POLICY, chosen, in_threads, record_of, scores_of, stream_of

few = settings(max_examples=15, deadline=None)


def changed(quiet, after, seed, shift):
    parts = stream_of(quiet + 1, seed), stream_of(after, seed + 1, shift)
    parts = tuple(part[:quiet] for part in parts[0]), parts[1]
    return tuple(np.concatenate(both) for both in zip(*parts, strict=True))


def reported(alarm):
    return (alarm.alarmed, alarm.at, alarm.statistic, alarm.since, alarm.cut, alarm.seen)


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


def test_threads_share_a_monitor():
    known = record_of(500)
    exits, scores, _ = predicted(known, POLICY)
    monitor = Monitor(known, POLICY)
    assert monitor.state.samples == 0
    assert in_threads(lambda rows: monitor.update(exits[rows], scores[rows])) == monitor.state.samples


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_continue_from_the_same_state(copied):
    known = record_of(500)
    exits, scores, _ = predicted(known, POLICY)
    for each, more in ((Monitor(known, POLICY), (scores,)), (BudgetController(known, POLICY, COST, goal_us=45), ())):
        each.update(exits, *more)
        other = copied(each)
        assert other.state == each.state
        assert other.update(exits, *more) == each.update(exits, *more)


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
