"""Segmentation, several labels per sample, regression: every step works as for classification.

The oracle is a loop over samples and exits in float64, with scores and losses written out in numpy.
"""

import dataclasses
import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from branchynet import (
    BranchyNet,
    ExitCost,
    ExitRecord,
    Policy,
    choose,
    evaluate,
    export,
    fit,
    frontier,
    load,
    measure,
    record,
)
from branchynet.deploy.torch_engine import TorchEngine
from branchynet.errors import InputError
from branchynet.losses import pixel_error
from branchynet.policy.record_scores import scores_of_record
from branchynet.policy.scores import SCORES
from branchynet.training.options import FitOptions
from branchynet.training.trainer import EpochTotals, ProgressBar
from helpers.tasks import SAMPLES, TASKS, Task, hamming, linear, log_variance


@dataclasses.dataclass(frozen=True)
class TrainedNetwork:
    """A task after attach, fit and record, and the loop's results for every sample."""

    task: Task
    net: BranchyNet
    inputs: torch.Tensor
    targets: torch.Tensor
    made: ExitRecord
    history: Any
    outputs: list[list[np.ndarray]]
    scores: np.ndarray
    losses: np.ndarray


@pytest.fixture(scope="module", params=TASKS)
def trained(request):
    task = TASKS[request.param]
    torch.manual_seed(1)
    inputs, targets = task.data()
    net = task.net(inputs[:4])
    batches = DataLoader(TensorDataset(inputs, targets), 7)
    history = fit(
        net,
        batches,
        batches,
        epochs=6,
        loss=task.train,
        optimizer=adam,
        progress=False,
        options=FitOptions(device="cpu"),
    )
    made = record(net, batches, loss=task.loss, score=task.score, progress=False)
    net.eval()
    with torch.no_grad():
        outputs = [[o.numpy()[0] for o in net(inputs[i : i + 1])] for i in range(SAMPLES)]
    exits = range(1, net.num_exits + 1)
    scores = np.array([[task.slow_score(sample[:n]) for n in exits] for sample in outputs])
    labels = targets.numpy()
    losses = np.array([[task.slow_loss(o, labels[i]) for o in sample] for i, sample in enumerate(outputs)])
    return TrainedNetwork(task, net, inputs, targets, made, history, outputs, scores, losses)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def in_gaps(scores, share):
    """Thresholds near this quantile of each early exit's scores, midway in the widest gap around it."""
    thresholds = []
    for column in scores[:, :-1].T:
        values = np.sort(column)
        if np.isinf(values[0]):
            thresholds.append(None)
            continue
        middle = round(share * len(values))
        window = range(max(1, middle - 4), min(len(values), middle + 5))
        after = max(window, key=lambda i: values[i] - values[i - 1])
        assert values[after] - values[after - 1] > 1e-4
        thresholds.append(float((values[after] + values[after - 1]) / 2))
    return tuple(thresholds)


def leave(scores, thresholds):
    """Figure 2 of the paper for one sample."""
    for n, threshold in enumerate(thresholds, 1):
        if threshold is not None and scores[n - 1] < threshold:
            return n
    return len(scores)


def test_a_record_is_what_the_loop_says(trained):
    assert trained.made.outputs is None and trained.made.score == trained.task.score
    np.testing.assert_allclose(trained.made.scores, trained.scores, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(trained.made.losses, trained.losses, rtol=1e-4, atol=1e-5)
    assert np.ptp(trained.made.losses) > 0.1 and np.ptp(trained.made.scores[:, -1]) > 0.01


def test_evaluate_is_what_the_loop_does(trained):
    for share in (0.2, 0.5, 0.8):
        thresholds = in_gaps(trained.scores, share)
        exits = np.array([leave(row, thresholds) for row in trained.scores])
        outcome = evaluate(trained.made, Policy(trained.task.score, thresholds))
        np.testing.assert_allclose(
            outcome.exit_share, [(exits == n).mean() for n in range(1, trained.net.num_exits + 1)]
        )
        assert outcome.accuracy == pytest.approx(1 - trained.losses[range(SAMPLES), exits - 1].mean(), abs=1e-5)


def test_choose_keeps_its_promise_with_the_score_of_the_record(trained):
    cost = ExitCost((1.0,) * trained.net.num_exits, (0.1,) * trained.net.num_exits)
    chosen = choose(trained.made, cost, max_drop=0.02, confidence=None)
    assert chosen.policy.score == trained.task.score
    assert frontier(trained.made, cost).score == trained.task.score
    exits = np.array([leave(row, chosen.policy.thresholds) for row in trained.made.scores])
    lost = trained.losses[range(SAMPLES), exits - 1].mean() - trained.losses[:, -1].mean()
    assert lost <= 0.02 + 1e-5
    everyone = choose(trained.made, cost, max_drop=0.999, confidence=None).outcome
    assert everyone.exit_share[0] == 1 or np.isinf(trained.scores[:, 0]).all()


def test_engines_are_what_the_loop_does(trained, tmp_path):
    thresholds = in_gaps(trained.scores, 0.5)
    policy = Policy(trained.task.score, thresholds)
    path = export(trained.net, tmp_path / "model.onnx", policy=policy, example=trained.inputs[:4])
    for engine in (load(path, threads=1), TorchEngine(trained.net, policy, trained.inputs[:4])):
        seen = set()
        for share in (0.5, 0.2, 0.8):
            given = None if share == 0.5 else in_gaps(trained.scores, share)
            used = thresholds if given is None else given
            for batch in (1, 7, SAMPLES):
                for start in range(0, SAMPLES, max(batch, 12)):
                    rows = range(start, min(start + batch, SAMPLES))
                    answer = engine(trained.inputs[start : start + batch].numpy(), thresholds=given)
                    exits = [leave(trained.scores[i], used) for i in rows]
                    assert answer.exit.tolist() == exits
                    expected = np.stack([trained.outputs[i][n - 1] for i, n in zip(rows, exits, strict=True)])
                    np.testing.assert_allclose(answer.output, expected, rtol=1e-4, atol=1e-4)
                    at_exit = [trained.scores[i, n - 1] for i, n in zip(rows, exits, strict=True)]
                    np.testing.assert_allclose(answer.score, at_exit, rtol=1e-3, atol=1e-4)
                    assert answer.label.shape == expected.shape[:1] + expected.shape[2:]
                    np.testing.assert_array_equal(answer.label, answer.output.argmax(axis=1))
                    seen.update(exits)
        assert seen >= {n for n, t in enumerate((*thresholds, 0.0), 1) if t is not None}
        none = engine(trained.inputs[:0].numpy())
        assert none.output.shape == (0, *trained.outputs[0][0].shape) and none.label.shape == (
            0,
            *none.output.shape[2:],
        )


def test_training_tells_accuracies_of_classes_alone(trained):
    row = trained.history.last
    if trained.task.train is F.cross_entropy:
        np.testing.assert_allclose(row.val_accuracy, 1 - trained.losses.mean(axis=0), atol=1e-4)
    else:
        assert row.train_accuracy == row.val_accuracy == ()
    assert math.isfinite(row.val_loss) and row.val_loss < trained.history.rows[0].val_loss


def test_measure_takes_the_score(trained):
    cost = measure(trained.net, trained.inputs[:4], score=trained.task.score, seconds=0.05)
    assert cost.num_exits == trained.net.num_exits and sum(cost.trunk_us) > 0


def test_a_record_lets_go_of_every_batch_of_outputs():
    seen = []

    def loss(output, target):
        assert all(reference() is None for reference in seen[:-1]), "outputs of an earlier batch are kept"
        seen.append(weakref.ref(output))
        return output.new_zeros(len(output))

    net = nn.Conv2d(1, 3, 1)
    made = record(net, [(torch.rand(2, 1, 4, 4), torch.zeros(2))] * 5, loss=loss, progress=False)
    assert made.outputs is None and made.scores.shape == made.losses.shape == (10, 1) and len(seen) == 5


@settings(max_examples=15, deadline=None)
@given(samples=st.integers(1, 12), batch=st.integers(1, 5), name=st.sampled_from(sorted(SCORES)))
def test_batches_do_not_matter(samples, batch, name):
    net = BranchyNet(nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 3, 1)), {"0": nn.Conv2d(4, 3, 1)})
    data = TensorDataset(torch.randn(samples, 1, 2, 3), torch.randint(3, (samples, 2, 3)))
    whole, parts = (
        record(net, DataLoader(data, size), loss=pixel_error, score=name, progress=False) for size in (samples, batch)
    )
    np.testing.assert_allclose(whole.scores, parts.scores, atol=1e-6)
    np.testing.assert_array_equal(whole.losses, parts.losses)


class TestWhichScore:
    """A policy compares thresholds only with the score that they were chosen on."""

    made = ExitRecord.from_scores([[0.1, 0], [0.2, 0]], [[0, 0], [1, 0]], score=log_variance)

    def test_another_score_is_refused(self):
        for score in ("entropy", hamming):
            with pytest.raises(InputError, match=r"holds the score 'log_variance', not '(entropy|hamming)'"):
                choose(self.made, max_drop=0.0, confidence=None, score=score)
            with pytest.raises(InputError, match="leave score= out"):
                evaluate(self.made, Policy(score, (0.15,)))
        assert choose(self.made, max_drop=0.0, confidence=None, score=log_variance).policy.score is log_variance

    def test_a_name_and_its_function_are_one(self):
        made = dataclasses.replace(self.made, score="entropy")
        assert choose(made, max_drop=0.0, confidence=None, score=SCORES["entropy"]).policy.score is SCORES["entropy"]
        assert choose(made, max_drop=0.0, confidence=None).policy.score == "entropy"

    def test_the_disk_keeps_the_name(self, tmp_path):
        self.made.save(tmp_path / "record.npz")
        again = ExitRecord.load(tmp_path / "record.npz")
        assert again.score == "log_variance" and again.digest == self.made.digest
        assert choose(again, max_drop=0.0, confidence=None, score=log_variance).policy.score is log_variance
        with pytest.raises(InputError, match="holds the score 'log_variance'"):
            choose(again, max_drop=0.0, confidence=None, score="margin")
        with pytest.raises(InputError, match=r"unknown score 'log_variance'.*pass a callable"):
            policy = choose(again, max_drop=0.0, confidence=None).policy
            export(linear(), tmp_path / "model.onnx", policy=policy, example=torch.rand(2, 3))

    def test_where_it_is_not_known_any_will_do(self, tmp_path):
        made = ExitRecord.from_scores(self.made.scores, self.made.losses)
        made.save(tmp_path / "record.npz")
        for known in (made, ExitRecord.load(tmp_path / "record.npz")):
            assert known.score is None and choose(known, max_drop=0.0, confidence=None).policy.score == "entropy"
            assert scores_of_record(known, "margin") is known.scores

    def test_logits_have_no_score_of_their_own(self):
        with pytest.raises(InputError, match="not both"):
            ExitRecord(outputs=np.zeros((2, 1, 3)), labels=np.zeros(2, np.int64), score="entropy")


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(SCORES)),
    shape=st.tuples(st.integers(1, 3), st.integers(2, 5), st.integers(1, 4), st.integers(1, 4)),
    flat=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_dense_score_is_the_mean_over_positions(name, shape, flat, seed):
    z = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    z = z.flatten(2) if flat else z
    positions = z.flatten(2).permute(0, 2, 1)
    expected = [float(sum(SCORES[name]((p.unsqueeze(0),)) for p in sample) / len(sample)) for sample in positions]
    assert SCORES[name]((z,)).tolist() == pytest.approx(expected, abs=1e-5)


def tallied(output, target):
    tally = EpochTotals("here")
    tally.add(torch.tensor(1.0), (output, output), target)
    return tally.read()[1]


@pytest.mark.parametrize(
    ("output", "target"),
    [
        ((6, 1), torch.zeros(6, dtype=torch.int64)),  # one number with integer targets: argmax is always 0
        ((6, 1, 2, 2), torch.zeros(6, 2, 2, dtype=torch.int64)),  # a mask from one logit
        ((6, 1), torch.zeros(6, dtype=torch.bool)),
        ((6, 4), torch.zeros(6, 4, dtype=torch.int64)),  # several labels as integers
        ((6, 4), torch.zeros(6)),
        ((6,), torch.zeros(6, dtype=torch.int64)),
        ((6, 3), torch.full((6,), -100)),  # every target is ignored
    ],
)
def test_there_is_no_accuracy_without_classes(output, target):
    assert tallied(torch.zeros(output), target) == ()


def test_positions_that_the_loss_ignores_do_not_count():
    target = torch.tensor([[0, 0, -100, -100], [1, -100, 0, -100]])
    assert tallied(torch.tensor([1.0, 0.0]).view(1, 2, 1).expand(2, 2, 4), target) == (0.75, 0.75)


def test_the_bar_speaks_of_right_answers_only_where_there_are_any(capsys):
    for accuracies in ((), (0.5, 0.75)):
        bar = ProgressBar("epoch", 1, visible=True)
        with bar:
            bar.show(0.25, accuracies)
        output = capsys.readouterr().err
        assert "0.25" in output and ("right" in output) == bool(accuracies)
