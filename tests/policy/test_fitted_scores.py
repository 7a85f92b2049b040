"""Fitted scores are stored exactly in JSON and ONNX metadata, and give the same results in every engine."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from branchynet import (
    BranchyNet,
    Choice,
    ExitCost,
    ExitRecord,
    Policy,
    averaged,
    bench,
    choose,
    evaluate,
    export,
    fit_score,
    fit_temperature,
    load,
    measure,
)
from branchynet.deploy.torch_engine import TorchEngine
from branchynet.errors import FileError, InputError
from branchynet.policy.averaging import averaged_record
from branchynet.policy.fitted_scores import LearnedScore, TemperedScore, from_json
from branchynet.policy.record_scores import scores_of_record
from branchynet.profiling.target import Target

finite = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def fitted(draw):
    exits = draw(st.integers(1, 4))
    if draw(st.booleans()):
        temperatures = draw(st.lists(st.floats(1e-300, 1e300), min_size=exits, max_size=exits))
        return TemperedScore(draw(st.sampled_from(["entropy", "margin"])), tuple(temperatures))
    classes, earlier = draw(st.integers(2, 4)), draw(st.booleans())
    sizes = [1 + classes + n * earlier for n in range(exits)]
    weights = tuple(tuple(draw(st.lists(finite, min_size=s, max_size=s))) for s in sizes)
    return LearnedScore(classes, earlier, weights, tuple(draw(st.lists(finite, min_size=exits, max_size=exits))))


@settings(max_examples=100, deadline=None)
@given(fitted())
def test_bit_for_bit_through_json(score):
    policy = Policy(score, (0.5,) * (score.num_exits - 1))
    again = Policy.from_json(json.loads(json.dumps(policy.to_json(), allow_nan=False)))
    assert again == policy and hash(again.score) == hash(score)
    assert json.dumps(again.to_json()) == json.dumps(policy.to_json())  # distinguishes -0.0 from 0.0


LEARNED = LearnedScore(2, True, ((1.0, 2.0, 3.0), (1.0, 2.0, 3.0, 4.0)), (0.5, -0.5))
TEMPERED = TemperedScore("entropy", (1.5, 1.0))


def test_names_are_short():
    assert f"{LEARNED} < 3" == "learned < 3" and f"{TEMPERED}" == "tempered entropy"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "forest"}, "kind in .*'learned', 'tempered'.*got 'forest'"),
        ({"kind": ["learned"]}, "must have a kind"),
        ({"kind": None}, "must have a kind"),
        ({"version": 2}, "version 2, but this release reads version 1: upgrade"),
        ({"version": None}, "version None"),
        ({"weights": [[1.0, 2.0], [1.0]]}, "of 2 classes needs 3 weights at exit 1; got 2"),
        ({"weights": [[1.0, 2.0, 3.0]]}, "a bias per exit; got 2 classes, 1 rows of weights and 2 biases"),
        ({"weights": 3}, "weights is 3, not a list"),
        ({"weights": [["1", 2, 3], [1, 2, 3, 4]]}, r"weights\[0\]\[0\] is '1', not float"),
        ({"weights": [[math.nan, 2, 3], [1, 2, 3, 4]]}, "must be finite"),
        ({"weights": [[10**400, 2, 3], [1, 2, 3, 4]]}, "int too large"),
        ({"bias": [True, False]}, r"bias\[0\] is True, not float"),
        ({"bias": [math.inf, 0]}, "must be finite"),
        ({"bias": []}, "a bias per exit"),
        ({"classes": 1}, "two classes or more"),
        ({"classes": "2"}, "classes is '2', not int"),
        ({"earlier": 1}, "earlier is 1, not bool"),
        ({"code": "import os"}, "cannot be read .*'code'"),
    ],
)
def test_broken_learned_json(change, message, tmp_path):
    broken = {**LEARNED.to_json(), **change}
    with pytest.raises(InputError, match=message):
        from_json(broken)
    path = tmp_path / "choice.json"
    choose(record(), ExitCost((1, 1, 1), (0, 0, 0)), max_drop=0.1).save(path)
    stored = json.loads(path.read_text())
    stored["policy"] = {"score": broken, "thresholds": [0.5]}
    del stored["sha256"]
    path.write_text(json.dumps(stored))
    with pytest.raises(FileError, match=r"choice\.json is (no Choice|not valid JSON)"):
        Choice.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperatures": [1, 0]}, "a temperature above 0 per exit"),
        ({"temperatures": [-1]}, "a temperature above 0 per exit"),
        ({"temperatures": []}, "a temperature above 0 per exit"),
        ({"score": 3}, "score is 3, not str"),
    ],
)
def test_broken_tempered_json(change, message):
    with pytest.raises(InputError, match=message):
        from_json({**TEMPERED.to_json(), **change})


def test_missing_parts_and_unknown_names():
    for score in (LEARNED, TEMPERED):
        for key in score.to_json().keys() - {"fitted_on"}:
            with pytest.raises(InputError):
                from_json({k: v for k, v in score.to_json().items() if k != key})
        assert from_json({k: v for k, v in score.to_json().items() if k != "fitted_on"}) == replace(score, fitted_on="")
        with pytest.raises(InputError, match="fitted_on of a fitted score must be a sketch"):
            from_json({**score.to_json(), "fitted_on": "the record"})
    with pytest.raises(InputError, match="unknown score 'entrpy'; did you mean 'entropy'"):
        TemperedScore("entrpy", (1.0,))((torch.zeros(2, 3),))


def test_a_policy_needs_as_many_exits_as_were_fitted():
    with pytest.raises(InputError, match="learned score was fitted on 2 exits, not 3"):
        Policy(LEARNED, (0.5, 0.5))
    with pytest.raises(InputError, match="fitted on 2 exits, not 3"):
        TEMPERED((torch.zeros(2, 3),) * 3)


def test_reading_a_policy_needs_no_torch():
    code = (
        "import sys, json; from branchynet import Policy; p = Policy.from_json(json.loads(sys.argv[1])); "
        "assert p.score.num_exits == 2 and 'torch' not in sys.modules"
    )
    stored = json.dumps(Policy(LEARNED, (0.5,)).to_json())
    subprocess.run([sys.executable, "-c", code, stored], check=True)


# The same results in every engine


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def network():
    torch.manual_seed(0)
    net = BranchyNet(Chain(), {tap: nn.Linear(8, 4) for tap in "ab"}).eval()
    with torch.no_grad():
        for head in (*net.branches, net.backbone.c):
            head.weight *= 6
    return net


def inputs(rows=300):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(1))


def record(net=None):
    with torch.no_grad():
        outputs = torch.stack((net or network())(inputs()), dim=1).numpy()
    noise = np.random.default_rng(0).gumbel(size=outputs[:, -1].shape)
    return ExitRecord(outputs, (outputs[:, -1] + noise).argmax(axis=1))


def apart(scores, share):
    """Return a threshold near this quantile, in a wide gap between scores, so that all engines agree."""
    values = np.unique(scores)
    if len(values) < 2:
        return float(values[0]) + 1
    low = max(1, round(len(values) * share) - 8)
    gaps = np.diff(values)[low - 1 : low + 16]
    widest = low - 1 + int(gaps.argmax())
    return float((values[widest] + values[widest + 1]) / 2)


SCORES = {
    "patience": lambda r: "patience",
    "tempered": lambda r: fit_temperature(r, "margin"),
    "learned": fit_score,
    "learned, own exit": lambda r: fit_score(r, earlier=False),
}


@pytest.mark.parametrize(
    ("name", "average"),
    [("patience", None), ("learned, own exit", None), ("learned", "softmax"), ("tempered", "logits")],
)
def test_records_files_and_torch_agree(name, average, tmp_path):
    net = network() if average is None else averaged(network(), [[1], [1, 2], [1, 2, 3]], of=average)
    found = record(net)
    score = SCORES[name](found)
    scores = scores_of_record(found, score)
    thresholds = (apart(scores[:, 0], 0.4), apart(scores[:, 1], 0.5))
    for used in (thresholds, (None, thresholds[1]))[: 2 if name == "learned" else 1]:
        policy = Policy(score, used)
        wanted = evaluate(found, policy)
        path = export(net, tmp_path / "model.onnx", policy=policy, example=inputs(8))
        engines = [load(path, threads=1)]
        assert engines[0].policy == policy
        if used is thresholds:
            engines.append(TorchEngine(net, policy, inputs(8)))
        for engine in engines:
            answer = engine(inputs().numpy())
            share = [np.mean(answer.exit == n) for n in (1, 2, 3)]
            assert share == pytest.approx(wanted.exit_share)
            assert np.mean(answer.label == found.labels) == pytest.approx(wanted.accuracy)
            rows = np.arange(len(answer.exit))
            assert answer.score == pytest.approx(scores[rows, answer.exit - 1], abs=1e-4)
            np.testing.assert_allclose(answer.output, found.outputs[rows, answer.exit - 1], atol=1e-4)


@pytest.mark.parametrize(("score", "removable"), [("entropy", True), ("patience", False)])
def test_branches_that_a_score_reads_count_as_trunk(score, removable):
    cost = measure(network(), inputs(1), score=score, seconds=0.01)
    assert cost.branch_macs == ((32, 32, 0) if removable else (0, 0, 0))
    assert sum(cost.trunk_macs) == (144 if removable else 208)


def test_a_choice_from_disk_is_exported_evaluated_and_benched_again(tmp_path):
    net, found = network(), record()
    score = fit_score(found)
    cost = measure(net, inputs(8), score=score, seconds=0.05)
    made = choose(found, cost, max_drop=0.05, score=score, confidence=None)
    made.save(tmp_path / "choice.json")
    again = Choice.load(tmp_path / "choice.json")
    assert again == made and evaluate(found, again.policy, cost) == evaluate(found, made.policy, cost)
    path = export(net, tmp_path / "model.onnx", policy=again.policy, example=inputs(8))
    target = torch.from_numpy(found.labels)
    row = bench(path, net, (inputs(), target), Target(4), repeats=1)[0]
    assert row["accuracy_branchy"] == pytest.approx(made.outcome.accuracy, abs=0.01)


def test_a_file_with_a_broken_score_is_refused(tmp_path):
    found = record()
    path = export(network(), tmp_path / "m.onnx", policy=Policy(fit_score(found), (0.0, 0.0)), example=inputs(8))
    model = onnx.load(path)
    about = next(p for p in model.metadata_props if p.key == "branchynet")
    stored = json.loads(about.value)
    stored["policy"]["score"]["kind"] = "oracle"
    about.value = json.dumps(stored)
    onnx.save(model, path)
    with pytest.raises(FileError, match=r"the policy in .*m\.onnx cannot be read .*'oracle'"):
        load(path)


class TestAveraged:
    def test_shares_weights_and_does_not_change_the_network(self):
        net = network()
        mean = averaged(net)
        assert mean.state_dict().keys() == net.state_dict().keys()
        assert all(a is b for a, b in zip(mean.parameters(), net.parameters(), strict=True))
        with torch.no_grad():
            one, other = net(inputs(4)), mean(inputs(4))
        assert torch.allclose(other[0].softmax(1), one[0].softmax(1), atol=1e-6)
        assert torch.allclose(other[2].exp(), sum(o.softmax(1) for o in one) / 3, atol=1e-6)

    def test_record_of_the_averaged_network_equals_averaged_record(self):
        weights = [[1], [1, 3], [1, 1, 2]]
        one = record(averaged(network(), weights))
        assert one.outputs == pytest.approx(averaged_record(record(), weights).outputs, abs=1e-5)

    @pytest.mark.parametrize("net", [nn.Linear(2, 2), averaged(network())])
    def test_takes_a_branchynet_once(self, net):
        with pytest.raises(InputError, match="takes a BranchyNet that is not averaged yet"):
            averaged(net)
