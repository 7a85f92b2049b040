"""Values hold the digests of what they were made from, and mixed files are refused by name."""

import numpy as np
import pytest
import torch
from torch import nn

from branchynet import BranchyNet, Policy, averaged, choose, evaluate, export, fit_score, load, measure, record
from branchynet.errors import InputError
from branchynet.nn.fingerprint import fingerprint
from branchynet.policy.averaging import averaged_record, fit_averaging
from branchynet.policy.exit_cost import ExitCost
from branchynet.policy.exit_record import ExitRecord
from branchynet.policy.risk_tests import halves

COST = ExitCost((10.0,) * 3, (1.0, 1.0, 0.0))


def network(seed=0):
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    return BranchyNet(trunk, {"1": nn.Linear(32, 3), "3": nn.Linear(32, 3)}).eval()


def batches(samples=600, seed=0, rows=100):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 16, generator=generator)
    y = (x[:, 0] > 0.4).long() + (x[:, 1] > 0.4)
    return [(x[i : i + rows], y[i : i + rows]) for i in range(0, samples, rows)]


def recorded(net, **options):
    return record(net, batches(**options), progress=False)


@pytest.mark.parametrize("of", ["softmax", "logits"])
@pytest.mark.parametrize("weights", [None, [[1], [1, 3], [1, 1, 2]]])
def test_an_averaged_network_has_its_own_fingerprint(of, weights):
    net = network()
    mean = averaged(net, weights, of=of)
    others = [averaged(net, w, of=o) for w in (None, [[1], [1, 3], [1, 1, 2]], [[1], [0, 1], [0, 0, 1]])
              for o in ("softmax", "logits")]  # fmt: skip
    assert len({fingerprint(n) for n in (net, *others)}) == 7 and fingerprint(mean) in {fingerprint(n) for n in others}
    assert fingerprint(averaged(network(), weights, of=of)) == fingerprint(mean) != fingerprint(averaged(network(1)))
    one, other = recorded(mean), averaged_record(recorded(net), weights, of=of)
    assert one.network == other.network == fingerprint(mean) and np.array_equal(one.inputs, other.inputs)
    assert averaged_record(ExitRecord(other.outputs, other.labels)).network is None


def test_averages_and_the_plain_network_are_not_mixed():
    net = network()
    mean = averaged(net)
    plain, average = recorded(net), recorded(mean)
    choice = choose(plain, COST, max_drop=0.5, confidence=None)
    with pytest.raises(InputError, match="different networks"):
        evaluate(average, choice)
    with pytest.raises(InputError, match="different architectures"):
        choose(average, measure(net, batches()[0][0][:4], seconds=0.05), max_drop=0.5, confidence=None)


def test_a_file_holds_record_digest_and_promise(tmp_path):
    net, example = network(), batches()[0][0][:8]
    choice = choose(recorded(net), COST, max_drop=0.5)
    about = load(export(net, tmp_path / "m.onnx", policy=choice, example=example)).metadata
    assert about["network"] == fingerprint(net) == choice.network and about["chosen_on"] == choice.record_digest
    assert about["promise"] == str(choice.promise) and about["policy"] == choice.policy.to_json()
    for other in (network(1), averaged(net)):
        with pytest.raises(InputError, match=r"network and the choice are of different networks .*from one network"):
            export(other, tmp_path / "other.onnx", policy=choice, example=example)
    plain = load(export(net, tmp_path / "p.onnx", policy=choice.policy, example=example)).metadata
    assert plain["promise"] is None and "chosen_on" not in plain


def test_input_digests_do_not_depend_on_the_container():
    class Pairs(nn.Module):
        def forward(self, a, b):
            return a[:, :3] + b.float()

    x, labels = torch.randn(40, 16), torch.arange(40) % 3
    several = (x, torch.arange(120).reshape(40, 3))
    one = record(Pairs(), [(several, labels)], progress=False)
    named = record(Pairs(), [({"b": several[1], "a": x}, labels)], progress=False)
    parts = [(tuple(t[i : i + 7] for t in several), labels[i : i + 7]) for i in range(0, 40, 7)]
    assert np.array_equal(record(Pairs(), parts, progress=False).inputs, one.inputs)
    assert np.array_equal(one.inputs, named.inputs) and len(np.unique(one.inputs)) == 40
    halved = [(x.bfloat16().float(), labels)]
    net = network()
    first, second = (record(n, halved, progress=False) for n in (net, network(1)))
    assert np.array_equal(first.inputs, second.inputs)  # depends on the samples, not on the network
    by_loss = record(net, halved, loss=lambda o, t: (o.argmax(1) != t).float(), progress=False)
    assert np.array_equal(by_loss.inputs, first.inputs)


def test_the_selection_sketch_is_in_records_and_files(tmp_path):
    net = network()
    every = recorded(net, samples=1200)
    tuning, rest = halves(every.samples)
    weights = fit_averaging(every.take(rest))
    mean = averaged(net, weights)
    again = recorded(mean, samples=1200)
    assert again.selected_on == averaged_record(every, weights).selected_on == (weights.fitted_on,)
    with pytest.raises(InputError, match="averages were selected on samples that would test the promise"):
        choose(again, COST, max_drop=0.5)
    flat = load(export(mean, tmp_path / "flat.onnx", policy=None, example=batches()[0][0][:8]))
    assert record(flat, batches(), progress=False).selected_on == (weights.fitted_on,)
    fine = recorded(averaged(net, fit_averaging(every.take(tuning))), samples=1200)
    assert choose(fine, COST, max_drop=0.5).promise is not None


def test_a_stored_choice_holds_the_samples_of_its_score(tmp_path):
    every = recorded(network(), samples=1200)
    score = fit_score(every.take(halves(1200)[0]))
    choice = choose(every, COST, max_drop=0.5, score=score)
    choice.save(tmp_path / "c.json")
    again = type(choice).load(tmp_path / "c.json")
    assert again == choice and again.policy.score.fitted_on == score.fitted_on and again.samples
    assert Policy.from_json(choice.policy.to_json()).score == score
