"""Fitted temperatures, learned scores and weights of averages, on records with a known best fit."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from branchynet import fit_score, fit_temperature
from branchynet.errors import InputError
from branchynet.policy.averaging import average, averaged_record, fit_averaging
from branchynet.policy.exit_record import ExitRecord
from branchynet.policy.record_scores import scores_of_record
from branchynet.policy.scores import SCORES, cooled, features


def drawn(samples=2000, exits=3, classes=4, heat=(1.0, 1.0, 1.0), seed=0):
    """Draw labels from the softmax of true logits; the logits of exit n are `heat[n]` times larger."""
    rng = np.random.default_rng(seed)
    true = rng.normal(size=(samples, classes)) * 2
    labels = (true + rng.gumbel(size=true.shape)).argmax(axis=1)
    return ExitRecord(np.stack([true * heat[n] for n in range(exits)], axis=1), labels)


def misleading(samples=4000, seed=0):
    """Exit 1 is confident and wrong for class 0, and unsure and right for other classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, samples)
    deceived = rng.random(samples) < 0.3
    answer = np.where(deceived, 0, labels)
    gap = np.where(answer == 0, 6.0, 1.5) + rng.normal(size=samples) * 0.3
    early = rng.normal(size=(samples, 4)) * 0.2
    early[np.arange(samples), answer] += gap
    late = rng.normal(size=(samples, 4)) * 0.2
    late[np.arange(samples), np.where(rng.random(samples) < 0.03, (labels + 1) % 4, labels)] += 3
    return ExitRecord(np.stack([early, late], axis=1), labels)


def auroc(record, score, exit):
    return roc_auc_score(record.losses[:, exit - 1], scores_of_record(record, score)[:, exit - 1])


def shuffled(record, seed=1):
    order = np.random.default_rng(seed).permutation(record.samples)
    return ExitRecord(record.outputs[order], record.labels[order])


class TestTemperature:
    def test_finds_the_temperature_of_each_exit(self):
        found = fit_temperature(drawn(20_000, heat=(3.0, 1.0, 0.5))).temperatures
        assert found == pytest.approx((3.0, 1.0, 0.5), rel=0.05)

    def test_no_other_temperature_makes_the_labels_more_likely(self):
        record = drawn(heat=(2.0, 1.0, 0.7))
        logits, labels = torch.from_numpy(record.outputs).double(), torch.from_numpy(record.labels)

        def surprise(n, temperature):
            return torch.nn.functional.cross_entropy(logits[:, n] / temperature, labels).item()

        for n, best in enumerate(fit_temperature(record).temperatures):
            assert all(surprise(n, best) <= surprise(n, best * f) for f in (0.5, 0.99, 1.01, 2))

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.floats(0.05, 20), min_size=3, max_size=3), st.integers(0, 99))
    def test_labels_stay(self, temperatures, seed):
        outputs = torch.randn(20, 5, generator=torch.Generator().manual_seed(seed))
        assert all((c.argmax(1) == outputs.argmax(1)).all() for c in cooled((outputs,) * 3, temperatures))

    @pytest.mark.parametrize("name", SCORES)
    def test_is_the_named_score_of_divided_logits(self, name):
        record = drawn(500, heat=(2.0, 1.0, 0.7))
        score = fit_temperature(record, name)
        divided = record.outputs / np.array(score.temperatures, np.float32)[:, None]
        assert scores_of_record(record, score) == pytest.approx(
            scores_of_record(ExitRecord(divided, record.labels), name), abs=1e-5
        )

    def test_only_named_scores(self):
        with pytest.raises(InputError, match="'entrpy' is none; did you mean 'entropy'"):
            fit_temperature(drawn(), "entrpy")


class TestLearned:
    def test_beats_entropy_on_a_confident_wrong_class(self):
        tuning, fresh = misleading(seed=0), misleading(seed=1)
        assert auroc(fresh, "entropy", 1) < 0.5
        assert auroc(fresh, fit_score(tuning), 1) > 0.7

    def test_sees_that_exits_disagree(self):
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 3, 3000)
        answers = np.where(rng.random((3000, 2)) < 0.7, labels[:, None], rng.integers(0, 3, (3000, 2)))
        record = ExitRecord(np.eye(3)[answers] * 2, labels)
        assert auroc(record, fit_score(record), 2) > 0.75
        assert auroc(record, fit_score(record, earlier=False), 2) < 0.6

    def test_is_the_log_odds_of_a_wrong_answer(self):
        record = drawn(20_000, exits=2)
        odds = scores_of_record(record, fit_score(record))
        for n in range(2):
            claimed = 1 / (1 + np.exp(-odds[:, n].astype(np.float64)))
            for part in np.array_split(np.argsort(claimed), 5):
                assert claimed[part].mean() == pytest.approx(record.losses[part, n].mean(), abs=0.03)

    def test_few_wrong_answers_leave_the_order_to_the_softmax(self):
        record = drawn(300, exits=2)
        odds = features((torch.from_numpy(record.outputs[:, 0].copy()),), True)[:, 0].numpy()
        found = scores_of_record(record, fit_score(record, strength=1e6))[:, 0]
        assert (np.argsort(found) == np.argsort(odds)).mean() > 0.99

    def test_the_odds_of_the_softmax_are_exact_where_it_is_sure(self):
        outputs = torch.tensor([[40.0, 0, 0], [0, 0, 0], [1, 1, -80]])
        odds = features((outputs,), False)[:, 0]
        assert odds.tolist() == pytest.approx([np.log(2) - 40, np.log(2), 0], abs=1e-5)

    def test_nan_gives_nan(self):
        score = fit_score(drawn())
        assert score((torch.tensor([[1.0, 2, 3, torch.nan], [1, 2, 3, 4]]),)).isnan().tolist() == [True, False]

    def test_separable_answers_give_finite_weights(self):
        labels = np.arange(200) % 2
        wrong = np.arange(200) < 50
        gap = np.where(wrong, 0.5, 5.0)
        outputs = np.zeros((200, 2, 2))
        outputs[np.arange(200), :, labels ^ wrong] = gap[:, None]
        record = ExitRecord(outputs, labels)
        assert auroc(record, fit_score(record), 1) == 1
        assert np.isfinite(scores_of_record(record, fit_score(record))).all()

    def test_a_last_exit_without_wrong_answers_has_a_constant_score(self):
        record = drawn(500, exits=2)
        outputs = record.outputs.copy()
        outputs[:, 1] = np.eye(4)[record.labels] * 9
        record = ExitRecord(outputs, record.labels)
        last = scores_of_record(record, fit_score(record))[:, 1]
        assert np.isfinite(last).all() and np.ptp(last) == 0
        assert fit_temperature(record).temperatures[1] == 1

    @pytest.mark.parametrize("strength", [0, -1, float("nan"), float("inf")])
    def test_strength(self, strength):
        with pytest.raises(InputError, match="strength must be a finite number above 0"):
            fit_score(drawn(), strength=strength)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_the_order_of_samples_does_not_matter(seed):
    record = drawn(400, heat=(2.0, 1.0, 0.5), seed=seed % 7)
    again = shuffled(record, seed)
    assert fit_temperature(again).temperatures == pytest.approx(fit_temperature(record).temperatures, rel=1e-9)
    one, other = fit_score(record), fit_score(again)
    assert other.bias == pytest.approx(one.bias, abs=1e-6)
    assert np.concatenate(other.weights) == pytest.approx(np.concatenate(one.weights), abs=1e-6)
    for of, near in (("softmax", 1e-9), ("logits", 1e-4)):
        one, other = fit_averaging(record, of=of), fit_averaging(again, of=of)
        assert np.concatenate(other) == pytest.approx(np.concatenate(one), abs=near)


def test_the_same_record_gives_the_same_score():
    assert fit_score(drawn()) == fit_score(drawn()) and fit_temperature(drawn()) == fit_temperature(drawn())


def rightness(right):
    """Create a record of 40 samples with the given number of right answers at exit 1."""
    labels = np.arange(40) % 4
    early = np.where(np.arange(40) < right, labels, (labels + 1) % 4)
    return ExitRecord(np.eye(4)[np.stack([early, labels], axis=1)], labels)


@pytest.mark.parametrize("fit", [fit_score, fit_temperature])
@pytest.mark.parametrize(
    ("record", "message"),
    [
        (ExitRecord(np.random.default_rng(0).normal(size=(40, 2, 3)), np.full(40, 2)), "all 40 samples .* of class 2"),
        (rightness(40), "exit 1 is wrong on 0 of the 40 samples"),
        (rightness(0), "exit 1 is wrong on 40 of the 40 samples"),
        (rightness(37), "exit 1 is wrong on 3 of the 40 .* at least 5 wrong and 5 right"),
        (ExitRecord.from_scores(np.zeros((9, 2)), np.zeros((9, 2))), "fitting reads outputs: record without loss="),
    ],
)
def test_records_without_enough_answers(fit, record, message):
    with pytest.raises(InputError, match=message):
        fit(record)


def test_a_record_with_nan_is_refused():
    with pytest.raises(InputError, match="holds nan at sample 3"):
        ExitRecord(np.where(np.arange(20).reshape(5, 2, 2) == 12, np.nan, 0), [0, 1, 0, 1, 0])


@pytest.mark.parametrize("fit", [fit_score, fit_temperature])
def test_a_score_of_other_exits_or_classes(fit):
    three = fit(drawn(exits=3))
    for exits in (2, 4):
        with pytest.raises(InputError, match=f"was fitted on 3 exits, not {exits}"):
            scores_of_record(drawn(exits=exits, heat=(1.0,) * 4), three)
    if fit is fit_score:
        with pytest.raises(InputError, match=r"fitted on outputs \(B, 4\) and is given \(2000, 5\)"):
            scores_of_record(drawn(classes=5), three)


class TestAverages:
    outputs = tuple(torch.randn(6, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))

    @pytest.mark.parametrize("weights", [None, [[2], [1, 3], [0, 0, 1]]])
    def test_are_means_of_the_exits_passed(self, weights):
        rows = weights or [[1], [1, 1], [1, 1, 1]]
        p = [o.double().exp() / o.double().exp().sum(1, keepdim=True) for o in self.outputs]
        soft, hard = average(self.outputs, weights), average(self.outputs, weights, of="logits")
        for n, row in enumerate(rows):
            row = np.array(row) / np.sum(row)
            wanted = sum(w * q for w, q in zip(row, p[: n + 1], strict=True))
            assert soft[n].exp().numpy() == pytest.approx(wanted.numpy(), abs=1e-6)
            wanted = sum(w * o for w, o in zip(row, self.outputs[: n + 1], strict=True))
            assert hard[n].numpy() == pytest.approx(wanted.numpy(), abs=1e-6)

    def test_fitted_weights_make_the_labels_most_likely(self):
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 3, 2000)
        outputs = np.stack([np.eye(3)[labels] * 2 + rng.normal(size=(2000, 3)) * s for s in (1, 1, 4)], axis=1)
        record = ExitRecord(outputs, labels)
        weights = fit_averaging(record)
        assert [len(row) for row in weights] == [1, 2, 3] and [sum(row) for row in weights] == pytest.approx([1] * 3)
        assert weights[1][0] == pytest.approx(0.5, abs=0.1) and weights[2][2] < 0.1

        def surprise(rows):
            found = torch.from_numpy(averaged_record(record, rows).outputs)
            return [torch.nn.functional.nll_loss(found[:, n], torch.from_numpy(labels)).item() for n in range(3)]

        best = surprise(weights)
        for other in (None, [[1], [0.9, 0.1], [0.2, 0.2, 0.6]], [[1], [0, 1], [1, 0, 0]]):
            assert (np.array(best) <= np.array(surprise(other)) + 1e-6).all()
        assert (averaged_record(record, weights).losses.mean(0)[1:] < record.losses.mean(0)[1:]).all()

    def test_fitted_weights_of_logits_make_the_labels_most_likely_at_some_temperature(self):
        rng = np.random.default_rng(1)
        labels = rng.integers(0, 3, 2000)
        outputs = np.stack([np.eye(3)[labels] * 2 + rng.normal(size=(2000, 3)) * s for s in (1, 2, 4)], axis=1)
        record = ExitRecord(outputs, labels)
        weights = fit_averaging(record, of="logits")
        assert [len(row) for row in weights] == [1, 2, 3] and [sum(row) for row in weights] == pytest.approx([1] * 3)
        # For independent normal errors, the best weights are proportional to the inverse variances.
        assert weights[2] == pytest.approx(np.array([16, 4, 1]) / 21, abs=0.06)

        def surprise(row):
            mean = torch.from_numpy(np.tensordot(row, outputs[:, : len(row)], axes=(0, 1)))
            inverse = np.geomspace(0.05, 20, 400)
            return min(torch.nn.functional.cross_entropy(b * mean, torch.from_numpy(labels)).item() for b in inverse)

        for n, others in enumerate(([[0.5, 0.5], [1, 0]], [[1 / 3] * 3, [1, 0, 0], [0.5, 0.3, 0.2]]), start=1):
            assert all(surprise(weights[n]) <= surprise(other) + 1e-4 for other in others)

    def test_slices_and_copies_remember_the_samples_of_the_fit(self):
        record = ExitRecord(np.random.default_rng(0).normal(size=(60, 3, 3)), np.arange(60) % 3)
        weights = fit_averaging(record)
        assert weights.fitted_on and weights[1] == tuple(weights)[1]
        for part in (weights[:], weights[:2], weights[::-1], copy.copy(weights), pickle.loads(pickle.dumps(weights))):
            assert part.fitted_on == weights.fitted_on
        assert tuple(weights[1:]) == tuple(weights)[1:]
        assert averaged_record(record, weights[:]).selected_on == averaged_record(record, weights).selected_on != ()

    def test_exits_at_chance_get_equal_weights(self):
        record = ExitRecord(np.zeros((50, 2, 3)), np.arange(50) % 3)
        assert fit_averaging(record, of="logits") == fit_averaging(record) == ((1.0,), (0.5, 0.5))

    @pytest.mark.parametrize(
        "weights",
        [[[1]], [[1], [1, 1], [1, 1]], [[1], [1, -1], [1, 1, 1]], [[0], [1, 1], [1, 1, 1]], 3, [[1], "ab", 2]],
    )
    def test_wrong_weights(self, weights):
        with pytest.raises(InputError, match="weights for 3 exits must be 3 rows, row n of n numbers"):
            average(self.outputs, weights)

    def test_wrong_kind_and_records_without_outputs(self):
        with pytest.raises(InputError, match="of must be 'softmax' or 'logits'; got 'labels'"):
            average(self.outputs, of="labels")
        scores = ExitRecord.from_scores(np.zeros((9, 2)), np.zeros((9, 2)))
        for fit in (fit_averaging, averaged_record):
            with pytest.raises(InputError, match="record without loss="):
                fit(scores)
