"""The promise of `choose`: its bounds are compared with brute force and simulation."""

import math
import re
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchynet.errors import InfeasibleError, InputError
from branchynet.policy.choosing import choose
from branchynet.policy.evaluation import evaluate, frontier
from branchynet.policy.exit_cost import ExitCost
from branchynet.policy.exit_record import ExitRecord
from branchynet.policy.risk_tests import best_bet, betting_p, binomial_p, fixed_sequence_test, halves, samples_needed
from branchynet.policy.values import Choice, Policy, Promise

COST = ExitCost((10.0, 20.0, 30.0), (1.0, 1.0, 0.0), (100.0, 200.0, 300.0), (5.0, 5.0, 0.0))


def population(samples, seed=0, exits=3, correct_early=0.01):
    """Draw scores that give the error rate of an early exit, which is sometimes right when the last exit is wrong."""
    rng = np.random.default_rng(seed)
    hardness = rng.random(samples)
    scores = np.clip(hardness[:, None] + rng.normal(0, 0.1, (samples, exits)), 0, None)
    wrong = rng.random((samples, exits)) < 0.6 * hardness[:, None] ** (2 + np.arange(exits))
    wrong[:, -1] = (wrong[:, -2] & (rng.random(samples) < 0.5)) | (rng.random(samples) < correct_early)
    return ExitRecord.from_scores(scores, wrong.astype(np.float32))


def redrawn(record, rng, samples):
    rows = rng.integers(0, record.samples, samples)
    inputs = np.arange(samples, dtype=np.uint64)  # all samples are distinct
    return ExitRecord.from_scores(record.scores[rows], record.losses[rows], inputs=inputs)


def drop(record, policy):
    outcome = evaluate(record, policy)
    return outcome.last_accuracy - outcome.accuracy


@given(st.integers(2, 300))
def test_halves_are_random_and_reproducible(samples):
    tuning, calibration = halves(samples)
    assert sorted([*tuning, *calibration]) == list(range(samples)) and abs(len(tuning) - len(calibration)) <= 1
    again = halves(samples)
    assert np.array_equal(tuning, again[0]) and np.array_equal(calibration, again[1])
    if samples > 20:
        assert 0.2 < (calibration < samples // 2).mean() < 0.8 and (np.diff(calibration) < 0).any()


@pytest.mark.parametrize(("harmed", "samples", "limit"), [(0, 30, 0.1), (3, 200, 0.02), (7, 50, 0.1)])
def test_the_binomial_p_value_is_the_sum_of_its_terms(harmed, samples, limit):
    differences = np.r_[np.ones(harmed), -np.ones(2), np.zeros(samples - harmed - 2)]
    terms = (math.comb(samples, k) * limit**k * (1 - limit) ** (samples - k) for k in range(harmed + 1))
    assert binomial_p(differences, limit) == pytest.approx(sum(terms))


@pytest.mark.parametrize("bound", ["betting", "binomial"])
@pytest.mark.parametrize(("limit", "delta"), [(0.005, 0.05), (0.01, 0.1), (0.2, 0.01), (0.9, 0.05)])
def test_the_fewest_samples_are_just_enough(bound, limit, delta):
    def p(samples):
        unchanged = np.zeros(samples)
        if bound == "binomial":
            return binomial_p(unchanged, limit)
        return betting_p(unchanged, limit, best_bet(np.zeros(50), limit))

    count = samples_needed(limit, delta, bound)
    assert p(count) <= delta < p(count - 1)


@pytest.mark.parametrize(("limit", "first"), [(0.01, 692), (0.005, 1386), (0.05, 136)])
def test_the_stated_number_of_samples_is_the_smallest_with_early_exits(limit, first):
    cost = ExitCost((1.0, 9.0), (0.0, 0.0))
    for samples in (first - 2, first):
        record = ExitRecord.from_scores(np.random.default_rng(0).random((samples, 2)), np.zeros((samples, 2)))
        if samples == first:
            assert choose(record, cost, max_drop=limit).outcome.exit_share[0] > 0.9
        else:
            with pytest.raises(InputError, match=f"by the betting bound needs at least {first} samples.*has {samples}"):
                choose(record, cost, max_drop=limit)


@pytest.mark.parametrize(
    "law",
    [
        {1: 0.02, 0: 0.98},
        {1: 0.05, -1: 0.03, 0: 0.92},
        {1: 0.4, -0.5: 0.6 * 0.4, 0.1: 0.36},
    ],
    ids=["harm alone", "both ways", "any loss"],
)
def test_no_true_null_is_rejected_more_often_than_stated(law):
    """The risk equals the limit, the worst case, for any bet."""
    values, shares = np.array(list(law)), np.array(list(law.values()))
    limit, delta, draws = float(values @ shares), 0.1, 2000
    rng = np.random.default_rng(0)
    slack = 3 * math.sqrt(delta * (1 - delta) / draws)
    for bet in (0.1, 0.5, best_bet(rng.choice(values, 2000, p=shares), limit * 2)):
        ps = np.array([betting_p(rng.choice(values, 400, p=shares), limit, bet) for _ in range(draws)])
        assert (ps <= delta).mean() <= delta + slack
    if set(law) <= {0, 1}:
        ps = np.array([binomial_p(rng.choice(values, 400, p=shares), limit) for _ in range(draws)])
        assert delta / 4 < (ps <= delta).mean() <= delta + slack


def test_betting_credits_answers_that_leaving_early_corrects():
    rng = np.random.default_rng(1)
    differences = rng.choice([1.0, -1.0, 0.0], 4000, p=[0.012, 0.012, 0.976])
    assert betting_p(differences, 0.01, best_bet(differences, 0.01)) < 0.01 < binomial_p(differences, 0.01)


def test_testing_stops_at_the_first_that_fails():
    good, bad = np.zeros(500), np.ones(500)
    for bound in ("binomial", "betting"):
        assert fixed_sequence_test([good] * 3, [good, bad, good], 0.02, 0.05, bound) == 1
        assert fixed_sequence_test([good] * 3, [good, good, good], 0.02, 0.05, bound) == 3
        assert fixed_sequence_test([good], [good], 1.0, 0.05, bound) == 1


def test_the_bound_fits_the_loss():
    record = logits()
    used = {limit: choose(record, COST, **{limit: value}).promise.bound
            for limit, value in (("max_drop", 0.05), ("max_disagreement", 0.05), ("min_accuracy", 0.5))}  # fmt: skip
    assert used == {"max_drop": "betting", "max_disagreement": "binomial", "min_accuracy": "binomial"}
    soft = ExitRecord.from_scores(population(1500).scores, population(1500).losses * 0.3)
    assert choose(soft, COST, min_accuracy=0.5).promise.bound == "betting"
    with pytest.raises(InputError, match=r"binomial bound needs losses of 0 and 1.*bound='betting'"):
        choose(soft, COST, min_accuracy=0.5, bound="binomial")


@pytest.mark.filterwarnings("ignore:no thresholds keep")
def test_the_promise_is_broken_no_more_often_than_stated():
    truth = population(20_000)
    rng = np.random.default_rng(0)
    draws, limit, confidence = 150, 0.02, 0.8
    choices = [choose(redrawn(truth, rng, 1500), COST, max_drop=limit, confidence=confidence) for _ in range(draws)]
    broken = np.mean([drop(truth, c.policy) > limit for c in choices])
    delta = 1 - confidence
    assert broken <= delta + 3 * math.sqrt(delta * (1 - delta) / draws)
    plain = [choose(redrawn(truth, rng, 1500), COST, max_drop=limit, confidence=None) for _ in range(40)]
    assert np.mean([drop(truth, c.policy) > limit for c in plain]) > delta  # without a promise
    full = evaluate(truth, Policy(thresholds=(None, None)), COST).mean_us
    assert np.median([c.outcome.mean_us for c in choices]) < 0.8 * full


def test_the_same_record_gives_the_same_choice():
    first, second = (choose(population(2000), COST, max_drop=0.02) for _ in range(2))
    assert first == second


def test_a_warning_if_no_candidate_passes():
    record = population(2000)
    with pytest.warns(UserWarning, match=r"max_drop=0 at 95% confidence on 1000 .* early: allow more than 0"):
        assert choose(record, COST, max_drop=0.0).policy.thresholds == (None, None)
    wrong = np.random.default_rng(0).random((2000, 2)) < [0.02, 0]
    close = ExitRecord.from_scores(np.random.default_rng(1).random((2000, 2)), wrong)
    with pytest.warns(UserWarning, match=r"max_drop=0\.004 .* no sample leaves early: record more samples, or allow"):
        choose(close, ExitCost((1.0, 9.0), (0.0, 0.0)), max_drop=0.004)


def test_no_sample_leaves_if_early_answers_are_wrong():
    record = population(2000)
    losses = record.losses.copy()
    losses[:, :-1] = 1
    losses[:, -1] = 0
    choice = choose(ExitRecord.from_scores(record.scores, losses), COST, max_drop=0.02)
    assert choice.policy.thresholds == (None, None) and choice.outcome.exit_share == (0, 0, 1)


def test_an_absolute_limit_is_kept_or_refused():
    truth = population(20_000)
    sample = redrawn(truth, np.random.default_rng(0), 3000)
    last = evaluate(truth, Policy(thresholds=(None, None))).accuracy
    choice = choose(sample, COST, min_accuracy=last - 0.05)
    assert evaluate(truth, choice.policy).accuracy >= last - 0.05 and choice.outcome.exit_share[0] > 0.1
    with pytest.raises(
        InfeasibleError, match=r"min_accuracy=0\.\d+ at 95% confidence on 1500 calibration samples; the"
    ):
        choose(sample, COST, min_accuracy=last + 0.02)


def test_the_error_for_too_few_samples_names_the_number_needed():
    needed = 2 * samples_needed(0.01, 0.05, "binomial")
    record = ExitRecord.from_scores(np.random.default_rng(0).random((needed, 2)), np.zeros((needed, 2)))
    cost = ExitCost((1.0, 9.0), (0.0, 0.0))
    assert choose(record, cost, max_drop=0.01, bound="binomial").outcome.exit_share[0] > 0.9
    fewer = ExitRecord.from_scores(record.scores[:-2], record.losses[:-2])
    text = rf"max_drop=0\.01 at 95% confidence by the binomial .* at least {needed} samples.*has {needed - 2}.*None"
    with pytest.raises(InputError, match=text):
        choose(fewer, cost, max_drop=0.01, bound="binomial")
    assert choose(fewer, cost, max_drop=0.01, confidence=None).promise is None


def logits(samples=1500, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, samples)
    outputs = rng.normal(size=(samples, 3, 4))
    outputs[np.arange(samples), :, labels] += 2.0 + np.arange(3)
    return ExitRecord(2 * outputs, labels)


def test_disagreement_needs_no_labels():
    record = logits()
    other = ExitRecord(record.outputs, np.random.default_rng(1).integers(0, 4, record.samples))
    agreed = ExitRecord(record.outputs, record.outputs[:, -1].argmax(1))
    for confidence in (None, 0.9):
        first, second = (choose(r, COST, max_disagreement=0.02, confidence=confidence) for r in (record, other))
        same = choose(agreed, COST, max_drop=0.02, confidence=confidence, bound="binomial")
        assert first.policy == second.policy == same.policy
    assert 0 <= drop(agreed, first.policy) <= 0.02 and first.outcome.exit_share[0] > 0
    with pytest.raises(InputError, match="max_disagreement needs a record of outputs"):
        choose(population(50), COST, max_disagreement=0.1)


def test_a_limit_on_work_is_kept_and_used():
    record = logits()
    for limit in (150.0, 400.0):
        choice = choose(record, COST, max_macs=limit)
        assert choice.promise is None and choice.outcome.mean_macs <= limit * (1 + 1e-6)
        by_macs = ExitCost(COST.trunk_macs, COST.branch_macs)
        best = max(a for a, c in zip(*_curve(frontier(record, by_macs)), strict=True) if c <= limit)
        assert choice.outcome.accuracy == pytest.approx(best)
    with pytest.raises(InfeasibleError, match=r"max_macs=10 .*multiply-accumulates per sample"):
        choose(record, COST, max_macs=10)
    with pytest.raises(InputError, match="max_macs needs a cost"):
        choose(record, max_macs=10)
    with pytest.raises(InputError, match="with multiply-accumulates"):
        choose(record, ExitCost((1.0,) * 3, (0.0,) * 3), max_macs=10)


def _curve(found):
    return found.accuracy, found.mean_us


def test_a_choice_stores_and_prints_its_promise(tmp_path):
    choice = choose(population(1500), COST, max_drop=0.02)
    choice.save(tmp_path / "choice.json")
    again = Choice.load(tmp_path / "choice.json")
    assert again == choice and isinstance(again.promise, Promise)
    text = str(again.promise)
    assert re.search(r"With 95% confidence, accuracy is at most 2\.00 points below the last exit's", text)
    assert "1,500 samples" in text and "750 of them" in text and again.promise.bound in text


def test_evaluation_on_the_data_that_chose_warns():
    record, other = population(1500), population(1500, seed=1)
    choice = choose(record, COST, max_drop=0.02)
    with pytest.warns(UserWarning, match="these thresholds were chosen on this record"):
        flattered = evaluate(record, choice, COST)
    assert flattered == choice.outcome
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluate(other, choice, COST) == evaluate(other, choice.policy, COST)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"confidence": 1.0}, r"confidence=1 must lie between 0 and 1"),
        ({"confidence": 0.0}, r"confidence=0 must lie"),
        ({"bound": "hoeffding"}, r"unknown bound 'hoeffding'.*betting, binomial"),
    ],
)
def test_wrong_options_are_named(options, text):
    with pytest.raises(InputError, match=text):
        choose(population(1500), COST, max_drop=0.02, **options)


def test_labels_of_one_class_are_refused():
    record = logits()
    with pytest.raises(InputError, match="all 1500 labels of the record are class 2"):
        choose(ExitRecord(record.outputs, np.full(1500, 2)), COST, max_drop=0.1)


def test_the_knee_is_where_the_curve_turns():
    found = frontier(population(3000), COST)
    knee = found.knee
    gain = (found.accuracy - found.accuracy[0]) / np.ptp(found.accuracy)
    spent = (found.mean_us - found.mean_us[0]) / np.ptp(found.mean_us)
    assert 0 < knee < len(found) - 1 and gain[knee] - spent[knee] == pytest.approx(max(gain - spent))
