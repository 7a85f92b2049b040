import copy
import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from branchynet.errors import InputError
from branchynet.policy.choosing import choose
from branchynet.policy.evaluation import evaluate
from branchynet.policy.exit_record import ExitRecord
from branchynet.policy.fitted_scores import TemperedScore
from branchynet.policy.record_scores import scores_of_record
from branchynet.policy.score_names import NAMES
from branchynet.policy.scores import SCORES, entropy, margin, max_probability, resolve
from branchynet.policy.values import Choice, Policy, score_name
from helpers import score_oracles
from helpers.score_oracles import ORACLES, softmax

logits = hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(2, 8)), elements=st.floats(-40, 40, width=32))


@pytest.mark.parametrize("name", ORACLES)
@settings(max_examples=100, deadline=None)
@given(logits)
def test_against_numpy(name, z):
    assert SCORES[name]((torch.from_numpy(z),)).numpy() == pytest.approx(ORACLES[name](softmax(z)), abs=2e-5)


@pytest.mark.parametrize("name", ORACLES)
@settings(max_examples=50, deadline=None)
@given(logits, st.floats(-20, 20, width=32))
def test_range_and_invariances(name, z, shift):
    found = SCORES[name]((torch.from_numpy(z),))
    assert found.shape == (len(z),)
    assert (found >= -1e-6).all() and (found <= (math.log(z.shape[1]) if name == "entropy" else 1) + 1e-5).all()
    assert torch.allclose(SCORES[name]((torch.from_numpy(z[:, ::-1] + shift),)), found, atol=2e-5)


@pytest.mark.parametrize(("score", "least_sure"), [(entropy, math.log(4)), (max_probability, 0.75), (margin, 1.0)])
def test_known_values(score, least_sure):
    found = score((torch.tensor([[0.0, 0, 0, 0], [100.0, 0, 0, 0], [50.0, 50, -50, -50]]),))
    tie = {entropy: math.log(2), max_probability: 0.5, margin: 1.0}[score]
    assert found.tolist() == pytest.approx([least_sure, 0, tie], abs=1e-6)


@pytest.mark.parametrize("score", [entropy, max_probability, margin])
def test_surer_is_smaller_and_the_latest_exit_counts(score):
    sure, unsure = torch.tensor([[5.0, 0, 0]]), torch.tensor([[1.0, 0, 0]])
    assert score((unsure, sure)) < score((sure, unsure))


def test_entropy_depends_on_all_classes():
    z = torch.tensor([[0.0, 0, 0, 0, 0, 0, 0, 3]])
    assert entropy((z,)).item() == pytest.approx(ORACLES["entropy"](softmax(z.numpy()))[0], abs=1e-6)


class TestResolve:
    def test_names_and_callables(self):
        assert resolve("entropy") is entropy

        def own(outputs):
            return outputs[-1][:, 0]

        assert resolve(own) is own

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("entrpy", "unknown score 'entrpy'; did you mean 'entropy'"),
            ("max_prob", "did you mean 'max_probability'"),
            ("zzz", "known names: 'entropy', 'max_probability', 'margin'"),
        ],
    )
    def test_unknown_name(self, name, message):
        with pytest.raises(InputError, match=message):
            resolve(name)


class TestOfRecord:
    record = ExitRecord(np.random.default_rng(0).normal(size=(5, 3, 4)), [0, 1, 2, 3, 0])

    @pytest.mark.parametrize("name", ORACLES)
    def test_every_exit(self, name):
        found = scores_of_record(self.record, name)
        assert found.shape == (5, 3) and found.dtype == np.float32
        for n in range(3):
            assert found[:, n] == pytest.approx(ORACLES[name](softmax(self.record.outputs[:, n])), abs=1e-5)

    def test_a_callable_sees_the_outputs_so_far(self):
        seen = []

        def depth(outputs):
            seen.append([tuple(o.shape) for o in outputs])
            assert not torch.is_grad_enabled()
            return outputs[0][:, 0] + len(outputs)

        found = scores_of_record(self.record, depth)
        assert found == pytest.approx(self.record.outputs[:, 0, :1] + [1, 2, 3])
        assert seen == [[(5, 4)] * n for n in (1, 2, 3)]

    def test_float64_scores_become_float32(self):
        assert scores_of_record(self.record, lambda outputs: outputs[-1][:, 0].double()).dtype == np.float32

    @pytest.mark.parametrize("shape", [(5, 1), (5, 4), (), (1,)])
    def test_wrong_shape(self, shape):
        with pytest.raises(InputError, match=r"gave float32 \(.*at exit 1; it must be a tensor \(5,\)"):
            scores_of_record(self.record, lambda outputs: torch.zeros(shape))

    def test_recorded_scores_are_returned(self):
        record = ExitRecord.from_scores([[0.5, math.nan]], [[0, 1]])
        assert scores_of_record(record, "entropy") is record.scores


class TestPatience:
    @settings(max_examples=100, deadline=None)
    @given(hnp.arrays(np.int64, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=st.integers(0, 2)))
    def test_against_a_loop(self, labels):
        outputs = tuple(torch.eye(3)[torch.from_numpy(row)] for row in labels)
        for n in range(1, len(labels) + 1):
            found = resolve("patience")(outputs[:n])
            for sample, score in enumerate(found.tolist()):
                count = 1
                while count < n and labels[n - 1 - count, sample] == labels[n - 1, sample]:
                    count += 1
                assert score == pytest.approx(1 / count)

    def test_dense_outputs_have_the_mean_score(self):
        first, second = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
        first[0, 1, 0] = second[0, 1] = 1
        assert resolve("patience")((first, second)).tolist() == [0.75]


several_logits = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(2, 5)), elements=st.floats(-9, 9, width=32)
)


class TestAgreement:
    @settings(max_examples=200, deadline=None)
    @given(several_logits, st.data())
    def test_against_a_loop(self, z, data):
        for n in range(len(z) - 1):
            if data.draw(st.integers(0, 4)) == 0:
                z[n] = math.nan
        for n in range(1, len(z) + 1):
            found = resolve("agreement")(tuple(map(torch.from_numpy, z[:n])))
            if np.isnan(z[n - 1]).any():
                assert found.isnan().all()
            else:
                wanted = [score_oracles.agreement(z[:n, sample]) for sample in range(z.shape[1])]
                assert found.numpy() == pytest.approx(wanted, abs=1e-5)

    @settings(max_examples=100, deadline=None)
    @given(several_logits)
    def test_the_labels_count_first_then_the_mean_probability(self, z):
        found, n = resolve("agreement")(tuple(map(torch.from_numpy, z))).numpy(), len(z)
        differing = (z.argmax(axis=2) != z[-1].argmax(axis=1)).sum(axis=0)
        assert ((found * n >= differing - 1e-5) & (found * n < differing + 1)).all()
        mean = np.mean([softmax(output) for output in z], axis=0)[np.arange(len(found)), z[-1].argmax(axis=1)]
        order = np.lexsort((-mean, differing))
        assert (np.diff(found[order]) > -1e-5).all()

    def test_exit_1_has_max_probability(self):
        z = torch.randn(50, 4)
        torch.testing.assert_close(resolve("agreement")((z,)), max_probability((z,)))

    def test_a_threshold_is_a_number_of_exits_that_may_differ(self):
        a, b = torch.tensor([[9.0, 0]]), torch.tensor([[0, 9.0]])
        for outputs, differing in (((a, a, a), 0), ((a, b, a), 1), ((a, a, b), 2)):
            score = resolve("agreement")(outputs).item()
            assert [score < k / 3 for k in (1, 2, 3)] == [differing < k for k in (1, 2, 3)]

    def test_dense_outputs_have_the_mean_score(self):
        first, second = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
        first[0, 1, 0] = second[0, 1] = 1
        positions = [resolve("agreement")((first[..., i, j], second[..., i, j])) for i in (0, 1) for j in (0, 1)]
        torch.testing.assert_close(resolve("agreement")((first, second)), torch.stack(positions).mean(dim=0))

    def test_minus_infinity_is_the_probability_0(self):
        first, second = torch.tensor([[-math.inf, 0.0, 0.0]]), torch.tensor([[3.0, -math.inf, -math.inf]])
        assert resolve("agreement")((first, second)).tolist() == pytest.approx([(1 + 1 - 0.5) / 2])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("entropie", "did you mean 'entropy'"),
        ("max_prob", "did you mean 'max_probability'"),
        ("Margin", "did you mean 'margin'"),
        ("zzz", "known names: 'entropy', 'max_probability', 'margin', 'patience'"),
        ("", "known names: 'entropy'"),
    ],
)
def test_an_unknown_name_is_refused_where_it_is_given(name, hint):
    for make in (
        lambda: Policy(name, (0.5,)),
        lambda: Policy(score=name),
        lambda: TemperedScore(name, (1.0, 1.0)),
        lambda: replace(Policy(), score=name),
    ):
        with pytest.raises(InputError, match=f"unknown score '{name}'; {hint}"):
            make()


def test_known_names_are_those_of_the_functions():
    assert tuple(SCORES) == NAMES
    for name in NAMES:
        assert Policy(name).score == name


def own(outputs):
    return -outputs[-1].amax(dim=1)


def test_the_name_of_a_callable_is_kept_in_files_and_records(tmp_path):
    rows = np.random.default_rng(0).random((60, 2))
    losses = np.zeros((60, 2))
    for score in ("mine", own):
        found = ExitRecord.from_scores(rows, losses, score)
        found.save(tmp_path / "record.npz")
        read = ExitRecord.load(tmp_path / "record.npz")
        assert read.score == score_name(score)
        for record in (found, read):
            choice = choose(record, max_drop=0.5, confidence=None)
            choice.save(tmp_path / "choice.json")
            assert Choice.load(tmp_path / "choice.json").policy.score == score_name(score)
            assert evaluate(record, Choice.load(tmp_path / "choice.json").policy) == choice.outcome
            assert evaluate(record, Policy(record.score, choice.policy.thresholds)) == choice.outcome
            assert Policy.from_json(json.loads(json.dumps(choice.policy.to_json()))).score == score_name(score)
            assert pickle.loads(pickle.dumps(choice.policy)) == copy.deepcopy(choice.policy) == choice.policy
            assert choose(record, max_drop=0.5, confidence=None, score=score_name(score)).policy == choice.policy
    with pytest.raises(InputError, match=r"unknown score 'mine'.*or pass a callable"):
        resolve(ExitRecord.from_scores(rows, losses, "mine").score)
