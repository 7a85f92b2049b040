"""Logits of minus infinity rule classes out: scores are of the other classes, in every runtime; NaN never leaves."""

import importlib.util
import math

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from branchynet import BranchyNet, Policy, choose, export, fit_score, fit_temperature, joint_loss, load, record
from branchynet.deploy.assembly import assemble
from branchynet.deploy.torch_engine import TorchEngine
from branchynet.errors import GraphError, InputError
from branchynet.graph.onnx_flat import flatten
from branchynet.nn.averaging import averaged
from branchynet.policy import record_scores, scores
from branchynet.policy.averaging import average, averaged_record, fit_averaging
from branchynet.policy.exit_record import ExitRecord
from branchynet.policy.fitted_scores import LearnedScore, TemperedScore
from helpers.score_oracles import ORACLES, softmax

INF, NAN = math.inf, math.nan
RUNTIMES = [
    "onnxruntime",
    "torch",
    pytest.param(
        "openvino", marks=pytest.mark.skipif(not importlib.util.find_spec("openvino"), reason="needs OpenVINO")
    ),
]
NO_ANSWER = np.float32(
    [[-INF] * 4, [NAN] * 4, [NAN, 1, 1, 1], [1, NAN, 0, 0], [1, 0, 0, NAN], [-INF, NAN, -INF, 0], [INF, 0, 0, 0]]
)
LEARNED = LearnedScore(4, True, ((1.0, 0.1, 0.2, 0.3, 0.4), (1.0, 0.1, 0.2, 0.3, 0.4, -0.5)), (0.0, 0.0))
EVERY_SCORE = [*scores.SCORES, TemperedScore("margin", (2.0, 0.5)), LEARNED]


@st.composite
def masked(draw):
    """Draw logits (S, C) with minus infinity, but not in a whole row, and the mask of these."""
    z = draw(hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(2, 7)), elements=st.floats(-30, 30)))
    out = draw(hnp.arrays(bool, z.shape))
    out[np.arange(len(z)), draw(hnp.arrays(np.int64, len(z), elements=st.integers(0, z.shape[1] - 1)))] = False
    return np.where(out, np.float32(-INF), z), ~out


def alone(name, z):
    """Return the score of the classes that are not ruled out."""
    if len(z) == 1:
        return 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        return ORACLES[name](softmax(z[None]).clip(1e-300))[0]


@pytest.mark.parametrize("name", ORACLES)
@settings(max_examples=100, deadline=None)
@given(masked())
def test_a_score_is_that_of_the_other_classes(name, case):
    z, allowed = case
    found = scores.SCORES[name]((torch.from_numpy(z),)).numpy()
    # float32 sums of up to 7 probabilities have errors of a few 1e-7; those of entropies are 30 times larger
    assert found == pytest.approx([alone(name, row[keep]) for row, keep in zip(z, allowed, strict=True)], abs=2e-5)


@settings(max_examples=50, deadline=None)
@given(masked())
def test_patience_counts_answers_of_the_other_classes(case):
    z, _ = case
    outputs = (torch.from_numpy(z), torch.from_numpy(np.roll(z, 1, axis=1)), torch.from_numpy(z))
    first, second = (o.argmax(1) for o in outputs[:2])
    assert torch.equal(scores.patience(outputs), torch.where(first == second, 1 / 3, 1.0))


def test_an_exit_without_an_answer_agrees_with_no_exit():
    sure = torch.tensor([[5.0, 0, 0, 0]]).repeat(len(NO_ANSWER), 1)
    silent = torch.from_numpy(NO_ANSWER)
    assert scores.patience((silent, sure)).tolist() == [1.0] * len(silent)
    assert scores.patience((sure, silent)).isnan().all()


class Twice(nn.Module):
    """A network of two exits that returns its inputs."""

    def forward(self, x):
        return x + 0.0, x * 1.0


def engine(net, policy, runtime, folder, example=None):
    example = torch.randn(3, 4) if example is None else example
    if runtime == "torch":
        return TorchEngine(net, policy, example)
    ir.save(assemble(flatten(net, example, score=scores.resolve(policy.score)), policy), folder / "model.onnx")
    return load(folder / "model.onnx", threads=1, runtime=runtime)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("score", EVERY_SCORE, ids=str)
def test_equal_in_every_runtime(runtime, score, tmp_path):
    z = np.random.default_rng(0).normal(size=(23, 4)).astype(np.float32) * 3
    z[np.arange(23) % 4 > 0, 1] = -INF
    z[5] = [-INF, -INF, -INF, 2]
    z[6] = [3, 1, 1, -INF]
    places = np.array([0, 4, 9, 13, 17, 21, 22])
    rows = np.insert(z, places, NO_ANSWER, axis=0)
    silent = np.insert(np.zeros(23, bool), places, True)
    made = engine(Twice(), Policy(score=score, thresholds=(3e38,)), runtime, tmp_path)
    for batch in (1, len(rows)):
        answers = [made(rows[i : i + batch]) for i in range(0, len(rows), batch)]
        assert np.concatenate([a.exit for a in answers]).tolist() == np.where(silent, 2, 1).tolist()
        outputs = torch.from_numpy(z)
        want = scores.resolve(score)((outputs,))
        assert want.isfinite().all()
        found = np.concatenate([a.score for a in answers])[~silent]
        np.testing.assert_allclose(found, want, atol=1e-4, rtol=1e-5)
    assert scores.resolve(score)((torch.from_numpy(NO_ANSWER),)).isnan().all()


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", ["entropy", "max_probability"])
def test_of_dense_outputs_every_position_counts(runtime, name, tmp_path):
    z = torch.randn(5, 4, 2, 3)
    z[:, 2, 0] = -INF
    want = [np.mean([alone(name, p[np.isfinite(p)]) for p in sample.reshape(4, -1).T.numpy()]) for sample in z]
    z[3, :, 1, 1] = NAN
    z[4, :, 0, 2] = -INF
    made = engine(Twice(), Policy(score=name, thresholds=(3e38,)), runtime, tmp_path, example=torch.randn(3, 4, 2, 3))
    answer = made(z.numpy())
    assert answer.exit.tolist() == [1, 1, 1, 2, 2]
    np.testing.assert_allclose(answer.score[:3], want[:3], atol=1e-5)


class Allowed(nn.Module):
    """A branch that always rules out class 3, and class 1 if the first feature is negative."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x):
        rule = torch.stack([x[:, 0] < -INF, x[:, 0] < 0, x[:, 0] < -INF, x[:, 0] > -INF], dim=1)
        return self.linear(x).masked_fill(rule, -INF)


def masked_net():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Identity(), nn.Linear(6, 6), nn.Tanh(), Allowed())
    return BranchyNet(backbone, {"0": Allowed(), "2": Allowed()}).eval()


def recorded(net, x):
    """Create a record with possible labels, of which every exit predicts two thirds."""
    with torch.no_grad():
        last = net(x)[-1]
    second = last.topk(2, dim=1).indices[:, 1]
    return record(net, [(x, torch.where(torch.arange(len(x)) % 3 == 0, second, last.argmax(1)))], progress=False)


@pytest.mark.parametrize("score", ["entropy", "tempered", "learned"])
def test_from_the_record_to_the_file(score, tmp_path):
    net, x = masked_net(), torch.randn(400, 6)
    answers = recorded(net, x)
    assert np.isneginf(answers.outputs[:, :, 3]).all()
    fitted = {"entropy": lambda r: "entropy", "tempered": fit_temperature, "learned": fit_score}[score](answers)
    found = record_scores.scores_of_record(answers, fitted)
    assert np.isfinite(found).all()
    choice = choose(answers, max_drop=0.5, score=fitted, confidence=None)
    path = export(net, tmp_path / "m.onnx", policy=choice.policy, example=x[:4])
    answer = load(path, threads=1)(x.numpy())
    left = choice.policy.thresholds
    near = np.min([abs(found[:, n] - t) for n, t in enumerate(left) if t is not None], axis=0) < 1e-4
    reached = np.argmax(np.array([*[found[:, n] < (-INF if t is None else t) for n, t in enumerate(left)],
                                  np.ones(len(x), bool)]), axis=0) + 1  # fmt: skip
    assert (answer.exit == reached)[~near].all() and near.mean() < 0.5
    assert (answer.label != 3).all() and not ((answer.label == 1) & (x[:, 0].numpy() < 0)).any()


def test_a_label_that_is_ruled_out_does_not_change_temperatures():
    answers = recorded(masked_net(), torch.randn(400, 6))
    more = ExitRecord(
        np.concatenate([answers.outputs, answers.outputs[:50]]), np.concatenate([answers.labels, np.full(50, 3)])
    )
    assert fit_temperature(more).temperatures == pytest.approx(fit_temperature(answers).temperatures)


@pytest.mark.parametrize("of", ["softmax", "logits"])
def test_averages_rule_out_the_same_classes(of, tmp_path):
    net, x = masked_net(), torch.randn(300, 6)
    answers = recorded(net, x)
    weights = fit_averaging(answers, of=of)
    assert np.isfinite([w for row in weights for w in row]).all()
    means = averaged_record(answers, weights, of=of)
    assert np.isfinite(record_scores.scores_of_record(means, "max_probability")).all()
    skipped = average([torch.tensor([[0.0, -INF]]), torch.tensor([[1.0, 2.0]])], [[1.0], [0.0, 1.0]], of="logits")
    assert skipped[1].tolist() == [[1, 2]]
    mean = averaged(net, weights, of=of)
    path = export(mean, tmp_path / "m.onnx", policy=Policy(thresholds=(3e38, 3e38)), example=x[:4])
    rows = x[:3].numpy().copy()
    rows[1] = NAN
    assert load(path, threads=1)(rows).exit.tolist() == [1, 3, 1]


def test_distillation_ignores_classes_that_are_ruled_out():
    net, x = masked_net(), torch.randn(20, 6)
    loss = joint_loss(net(x), torch.zeros(20, dtype=torch.long), distill=0.5)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in net.parameters())


def test_a_file_with_other_masks_is_refused(tmp_path):
    class Drifts(nn.Module):
        """A branch whose mask differs from the exported constant."""

        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(6, 4), 0

        def forward(self, x):
            self.calls += 1
            return self.linear(x).index_fill(1, torch.tensor([self.calls % 2]), -INF)

    torch.manual_seed(0)
    net = BranchyNet(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)), {"0": Drifts()})
    for attempt in (
        lambda: export(net, tmp_path / "m.onnx", policy=None, example=torch.randn(3, 6)),
        lambda: TorchEngine(net, Policy(thresholds=(1.0,)), torch.randn(3, 6)),
    ):
        with pytest.raises(GraphError, match=r"differ by inf at exit 1|exit 1 differ by inf from"):
            attempt()


def test_a_row_without_an_answer_is_refused_in_records(tmp_path):
    for row in NO_ANSWER:
        with pytest.raises(InputError, match=r"outputs holds (nan|inf|-inf) at sample 1, exit 1"):
            ExitRecord(np.float32([[[1, 0, 0, 0]], [row]]), [0, 0])
    net = BranchyNet(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)), {"0": nn.Linear(6, 4)})
    broken = torch.randn(4, 6)
    broken[2, 1] = NAN
    with pytest.raises(GraphError, match=r"exit 1 gives NaN for row 2 of the example"):
        export(net, tmp_path / "m.onnx", policy=Policy(thresholds=(1.0,)), example=broken)
    assert not (tmp_path / "m.onnx").exists()
