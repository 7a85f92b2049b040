"""Promises in hard cases: distributions with few distinct samples, and samples that were used before."""

import math
import warnings

import numpy as np
import pytest
from scipy.stats import binom

from branchynet.design.exit_search import CandidateScores, search_exit_sets
from branchynet.errors import InputError
from branchynet.policy.choosing import choose
from branchynet.policy.evaluation import evaluate
from branchynet.policy.exit_cost import ExitCost
from branchynet.policy.exit_record import ExitRecord
from branchynet.policy.record_scores import scores_of_record
from branchynet.policy.risk_tests import halves
from branchynet.policy.sample_digests import digests, is_sketch, repeated, share_samples, sketch
from branchynet.policy.score_fitting import fit_score, fit_temperature

COST = ExitCost((10.0, 10.0), (1.0, 0.0))

RISK = 1.001  # times the limit: leaving early only just breaks it


def placed(samples, tuning_wrong, calibration_wrong):
    """Return `(S,)` whether exit 1 is wrong, with the given number of wrong answers in each half."""
    wrong = np.zeros(samples, bool)
    for half, count in zip(halves(samples), (tuning_wrong, calibration_wrong), strict=True):
        wrong[half[:count]] = True
    return wrong


def by_patience(wrong, limit):
    outputs = np.zeros((len(wrong), 2, 2), np.float32)
    outputs[:, :, 0] = 2
    outputs[wrong, 0] = [0, 2]
    labels = np.arange(len(wrong)) % 2
    return choose(ExitRecord(outputs, labels), COST, max_disagreement=limit, score="patience")


def by_constant(wrong, limit, **options):
    losses = np.stack([wrong, np.zeros(len(wrong))], axis=1)
    return choose(ExitRecord.from_scores(np.full((len(wrong), 2), 0.25), losses), COST, max_drop=limit, **options)


@pytest.mark.filterwarnings("ignore:no thresholds keep", "ignore:.*copies of others")
@pytest.mark.parametrize(
    ("samples", "limit", "chosen"),
    [
        (134, 0.05, by_patience),
        (150, 0.05, by_patience),
        (120, 0.05, lambda wrong, limit: by_constant(wrong, limit, bound="binomial")),
        (240, 0.03, lambda wrong, limit: by_constant(wrong, limit, bound="binomial")),
    ],
)
def test_a_promise_with_two_kinds_of_samples_fails_no_more_often_than_stated(samples, limit, chosen):
    """Sum the probability over all draws; the bound depends only on the counts in both halves."""
    sizes = [len(half) for half in halves(samples)]
    chances = [binom.pmf(np.arange(size + 1), size, RISK * limit) for size in sizes]
    broken = seen = 0.0
    for calibration, chance in enumerate(chances[1]):
        for tuning, other in enumerate(chances[0]):
            if chance * other < 1e-5:
                continue
            seen += chance * other
            found = chosen(placed(samples, tuning, calibration), limit)
            broken += chance * other * (found.policy.thresholds[0] is not None)
    assert seen > 0.99 and broken + (1 - seen) <= 0.05
    assert broken > 0.001  # it is broken sometimes


@pytest.mark.filterwarnings("ignore:no thresholds keep")
@pytest.mark.parametrize(("samples", "limit"), [(600, 0.02), (300, 0.05)])
def test_betting_with_a_constant_score_fails_no_more_often_than_stated(samples, limit):
    rng, draws = np.random.default_rng(0), 400
    broken = 0
    for _ in range(draws):
        found = by_constant(rng.random(samples) < RISK * limit, limit)
        broken += found.policy.thresholds[0] is not None
    assert 0 < broken / draws <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)


def answers(samples, seed=0, exits=2):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, samples)
    outputs = rng.normal(size=(samples, exits, 4))
    outputs[np.arange(samples), :, labels] += 2.0 + np.arange(exits)
    return ExitRecord(outputs, labels)


def test_sketches_detect_shared_samples():
    one = digests(np.random.default_rng(0).normal(size=(4000, 3)).astype(np.float32))
    known = sketch(one[:2000])
    assert (
        is_sketch(known) and is_sketch("") and not is_sketch("ab") and not is_sketch(None) and not is_sketch(16 * "g")
    )
    for part, wanted in ((slice(2000, None), False), (slice(1000, 3000), True), (slice(0, 4000, 7), True)):
        assert share_samples(known, one[part][::-1]) is wanted
    assert not share_samples(known, np.append(one[2000:], one[:20]))  # a few duplicates may occur in any data set
    assert not share_samples("", one) and share_samples(sketch(one[:3]), one)
    assert sketch(one) == sketch(np.random.default_rng(1).permutation(np.tile(one, 2)))


def test_digests_depend_on_the_whole_row():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(9, 2, 3)).astype(np.float32), rng.integers(0, 9, (9, 4))
    whole = digests(first, second)
    assert len(np.unique(whole)) == 9 and whole.dtype == np.uint64
    assert np.array_equal(digests(first[3:5], second[3:5]), whole[3:5])
    second[4, 3] += 1
    assert (digests(first, second) != whole).tolist() == [n == 4 for n in range(9)]


@pytest.mark.parametrize("fit", [fit_score, fit_temperature])
def test_no_promise_on_samples_that_fitted_the_score(fit):
    record = answers(3000)
    fitted, rest = record.take(slice(0, None, 2)), record.take(slice(1, None, 2))
    score = fit(fitted)
    for used in (record, fitted, record.take(slice(0, 2000)), record.take(slice(None, None, -1))):
        with pytest.raises(InputError, match=r"score was fitted on samples that would test the promise.*record\.take"):
            choose(used, COST, max_drop=0.05, score=score)
        choose(used, COST, max_drop=0.05, score=score, confidence=None)
    assert choose(rest, COST, max_drop=0.05, score=score).promise is not None
    tuned = fit(record.take(halves(3000)[0]))  # candidates may come from these samples, but not the test
    assert choose(record, COST, max_drop=0.05, score=tuned).promise is not None


def test_no_promise_on_samples_that_selected_the_exits():
    record = answers(2000)
    used, free = (sketch(record.sample_digests[half]) for half in halves(2000))
    for known, fine in (((used,), True), ((free,), False), ((used, free), False), ((), True)):
        selected = ExitRecord(record.outputs, record.labels, selected_on=known)
        if fine:
            assert choose(selected, COST, max_drop=0.05).promise is not None
        else:
            with pytest.raises(InputError, match="exits or averages were selected on samples that would test"):
                choose(selected, COST, max_drop=0.05)
    with pytest.raises(InputError, match="selected_on must be sketches"):
        ExitRecord(record.outputs, record.labels, selected_on=("validation",))


def test_the_search_for_exits_does_not_use_the_samples_that_test_a_promise():
    """The search finds the same exits if those samples change."""
    rng = np.random.default_rng(0)
    scores, losses = rng.random((400, 5)).astype(np.float32), (rng.random((400, 5)) < 0.2).astype(float)

    def found(scores, losses):
        candidates = CandidateScores(
            scores, losses, (0, 1, 2, 3), lambda c: ExitCost((10.0,) * (len(c) + 1), (0.1,) * len(c) + (0,))
        )
        return search_exit_sets(candidates, 0.2 * 400, 3, lambda line: None)[0]

    _, kept = halves(400)
    other = scores.copy(), losses.copy()
    other[0][kept], other[1][kept] = rng.random((200, 5)), 1.0
    assert found(scores, losses) == found(*other) and len(found(scores, losses)) > 1


def warned_of(record):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        choose(record, ExitCost((10.0,) * record.num_exits, (0.0,) * record.num_exits), max_drop=0.05)
    return any("are copies of others" in str(w.message) for w in seen)


def test_data_recorded_several_times_warn():
    record = answers(1000)
    for rows in (np.repeat(np.arange(1000), 3), np.r_[0:1000, 0:500], np.tile(np.arange(300), 4)):
        assert warned_of(record.take(rows))
    assert not warned_of(record) and not warned_of(record.take(np.r_[0:1000, 0:30]))
    rng = np.random.default_rng(0)
    coarse = ExitRecord.from_scores(rng.integers(1, 4, (1000, 3)) / 3, rng.random((1000, 3)) < 0.1)
    assert not warned_of(coarse)  # few distinct scores are not copies
    again = ExitRecord.from_scores(coarse.scores, coarse.losses, inputs=np.arange(1000, dtype=np.uint64) // 2)
    with pytest.raises(InputError, match=r"50% of the record's 1000 samples are copies of others, by their inputs"):
        warned_of(again)


def test_any_number_of_copies_warns():
    """Copies of outputs, of inputs, and of scores alone."""
    for copies in (2, 10, 30, 60, 300):
        distinct = max(3000 // copies, 40)
        record = answers(distinct).take(np.tile(np.arange(distinct), copies))
        share = 1 - 1 / copies
        assert repeated(record.sample_digests) == pytest.approx(share) and warned_of(record)
        scores = np.random.default_rng(0).random((distinct, 2))[np.arange(record.samples) % distinct]
        assert warned_of(ExitRecord.from_scores(scores, record.losses))
        with pytest.raises(InputError, match="copies of others, by their inputs"):
            warned_of(ExitRecord(record.outputs, record.labels, inputs=record.sample_digests))


def test_equal_scores_are_not_copies():
    rng = np.random.default_rng(0)
    sure = np.where(rng.random((1000, 2)) < 0.7, 0, rng.random((1000, 2)))  # most have the smallest score
    losses = rng.random((1000, 2)) < 0.1
    for scores in (sure, rng.integers(0, 3, (1000, 2)), np.full((1000, 2), 0.5)):
        assert not warned_of(ExitRecord.from_scores(scores, losses))


@pytest.mark.parametrize(("samples", "step"), [(4000, 10), (20000, 8), (20000, 20), (400, 1), (700, 2)])
def test_a_small_part_of_the_fitted_samples_is_noticed(samples, step):
    """Other samples are not noticed, although a few occur in both sets."""
    every = np.random.default_rng(samples + step).integers(0, 2**63, 2 * samples).astype(np.uint64)
    known, others = sketch(every[:samples]), every[samples:]
    assert share_samples(known, every[:samples:step]) and not share_samples(known, others[::step])
    few = np.r_[others, every[: samples // 50]]
    assert not share_samples(known, few) and not share_samples(sketch(few), every[:samples])
    assert share_samples(known, np.r_[others[: samples // 2], every[: samples // 2]])


def test_sketches_of_earlier_versions_work():
    every = np.random.default_rng(0).integers(0, 2**63, 4000).astype(np.uint64)
    old = sketch(every[:2000])[: 32 * 16]
    assert is_sketch(old) and share_samples(old, every[:2000:4]) and not share_samples(old, every[2000:])


@pytest.mark.filterwarnings("ignore:.*copies of others")
def test_equal_samples_prove_nothing_if_few_are_distinct():
    rng = np.random.default_rng(0)
    distinct = answers(60)
    record = distinct.take(rng.integers(0, 60, 3000))
    score = fit_temperature(record.take(slice(0, None, 2)))
    with pytest.warns(UserWarning, match="few distinct samples; unless equal samples .* independently, the tempered"):
        choice = choose(record.take(slice(1, None, 2)), COST, max_drop=0.1, score=score)
    assert choice.promise is not None


@pytest.mark.parametrize("known", [True, False])
def test_a_record_of_a_fitted_score_knows_its_samples_on_disk(tmp_path, known):
    record = answers(2000)
    score = fit_score(record)
    inputs = record.sample_digests if known else None
    ExitRecord.from_scores(scores_of_record(record, score), record.losses, score, inputs=inputs).save(
        tmp_path / "r.npz"
    )
    again = ExitRecord.load(tmp_path / "r.npz")
    assert again.score == "learned" and again.selected_on == (score.fitted_on,)
    if known:
        with pytest.raises(InputError, match="score was fitted on them"):
            choose(again, COST, max_drop=0.05)
    else:
        with pytest.warns(UserWarning, match="cannot be checked"):
            choose(again, COST, max_drop=0.05)


def test_a_score_fitted_on_outputs_is_recognized_with_inputs():
    record = answers(2000)
    later = ExitRecord(record.outputs, record.labels, inputs=np.arange(2000, dtype=np.uint64))
    with pytest.raises(InputError, match="score was fitted on samples that would test"):
        choose(later, COST, max_drop=0.05, score=fit_score(record))
    scored = ExitRecord.from_scores(scores_of_record(record, fit_score(record)), record.losses, fit_score(record))
    with pytest.warns(UserWarning, match=r"learned score was fitted .* cannot be checked.*inputs="):
        choose(scored, COST, max_drop=0.05)


def test_evaluation_on_samples_that_chose_or_fitted_warns():
    record, other = answers(3000), answers(3000, seed=1)
    fitted, rest = record.take(slice(0, None, 2)), record.take(slice(1, None, 2))
    choice = choose(rest, COST, max_drop=0.05, score=fit_score(fitted))
    for seen in (rest, record, fitted, rest.take(slice(0, 1000))):
        with pytest.warns(UserWarning, match="these thresholds were chosen on this record"):
            evaluate(seen, choice)
    assert evaluate(other, choice).samples == 3000


def test_samples_are_known_on_disk(tmp_path):
    record = ExitRecord(answers(50).outputs, answers(50).labels, inputs=np.arange(50, dtype=np.uint64),
                        selected_on=(sketch(np.arange(9, dtype=np.uint64)),))  # fmt: skip
    record.save(tmp_path / "r.npz")
    again = ExitRecord.load(tmp_path / "r.npz")
    assert np.array_equal(again.inputs, record.inputs) and again.selected_on == record.selected_on
    part = again.take(slice(3, 7))
    assert part.sample_digests.tolist() == [3, 4, 5, 6] and part.selected_on == record.selected_on
    with pytest.raises(InputError, match=r"inputs must be uint64 \(50,\)"):
        ExitRecord(record.outputs, record.labels, inputs=np.arange(49, dtype=np.uint64))
