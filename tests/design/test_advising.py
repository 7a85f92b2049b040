"""Advice on a network trained on real digits, and arguments refused before training."""

import json
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import nn

from branchynet import Target, load, record, zoo
from branchynet.data import ImageData, Split, load_data, loader
from branchynet.design import Advice, SearchOptions, advise
from branchynet.design.advice import CandidateResult, Design
from branchynet.design.candidates import attach_candidates
from branchynet.errors import FileError, GraphError, InputError
from branchynet.policy.risk_tests import halves
from branchynet.policy.sample_digests import share_samples
from branchynet.reproduce.recipes import adam
from branchynet.training.loop import fit
from helpers.loop import every_exit, figure_2


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def learn(net, data, epochs):
    fit(net, loader(data.train, 64, shuffle=True), epochs=epochs, optimizer=adam(3e-3), progress=False)


@pytest.fixture(scope="module")
def trained(digits):
    """A LeNet that knows most digits."""
    torch.manual_seed(0)
    net = zoo.lenet()
    learn(net, digits, 14)
    return net.eval()


def advised(net, data, **options):
    names = [field.name for field in fields(SearchOptions)]
    search = SearchOptions(**({"seconds": 1.0} | {name: options.pop(name) for name in names if name in options}))
    if "runtime" in options:
        options["target"] = Target(runtime=options.pop("runtime"))
    options = {"progress": False, "search": search} | options
    example = data.val.images[:8].float() / 255
    return advise(net, loader(data.train, 64, shuffle=True), loader(data.val, 200), example, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tmp_path_factory.mktemp("advice")


@pytest.fixture(scope="module", params=[0, pytest.param(2, marks=pytest.mark.heavy)], ids=["one round", "two rounds"])
def advice(request, trained, digits, run):
    before = [p.clone() for p in trained.parameters()]
    found = advised(trained, digits, max_drop=0.01, run=run, final_epochs=request.param)
    assert all(torch.equal(a, b) for a, b in zip(before, trained.parameters(), strict=True))
    return found


def test_advice_agrees_with_the_advised_network(advice, trained, digits):
    """Exits, accuracy and mean time of the best design, sample by sample as Figure 2 has it."""
    plain = record(trained, loader(digits.val, 200), progress=False)
    tuning, kept = halves(len(digits.val))  # the other half is for a promise
    assert advice.accuracy == pytest.approx(1 - plain.losses[tuning].mean()) and advice.samples == len(tuning)
    assert share_samples(advice.selected_on, plain.inputs[tuning]) and not share_samples(
        advice.selected_on, plain.inputs[kept]
    )
    assert advice.network.selected_on == (advice.selected_on,)
    assert advice.designs[0].us == pytest.approx(advice.plain_us)  # multiplied and divided by the samples
    assert advice.designs[0].accuracy == pytest.approx(advice.accuracy)
    assert advice.min_accuracy == pytest.approx(advice.accuracy - 0.01)
    design = advice.design
    fewer = advice.designs[: advice.best]
    assert all(0.99 * d.us > min(d.us for d in advice.designs) for d in fewer) and advice.network.taps == design.taps
    assert design.us <= 1.01 * min(d.us for d in advice.designs)
    assert design.accuracy >= advice.min_accuracy - 1e-9
    outputs = every_exit(advice.network, (digits.val.images[tuning].float() / 255,))
    labels = digits.val.labels[tuning]
    left = [figure_2(sample, design.thresholds) for sample in outputs]
    right = [z.argmax() == label for (_, z), label in zip(left, labels, strict=True)]
    assert np.mean(right) == pytest.approx(design.accuracy, abs=2 / len(right))
    shares = [np.mean([n == k for n, _ in left]) for k in range(1, len(design.taps) + 2)]
    assert shares == pytest.approx(design.exit_share, abs=2 / len(right))
    each = advice.cost.latency_us([True] * len(shares))
    assert np.dot(shares, each) == pytest.approx(design.us, rel=0.02)
    low, high = design.interval_us
    assert low < design.us < high and advice.speedup == advice.plain_us / design.us
    assert design.oracle_us <= design.us * (1 + 1e-9)  # summed in another order


def test_every_candidate_is_reported_with_its_break_even_share(advice, trained, digits):
    assert len(advice.tried) == len(attach_candidates(trained, digits.val.images[:2].float() / 255).candidates) > 8
    for one in advice.tried:
        assert 0 <= one.accuracy <= 1 and one.us > 0
        if one.break_even is not None:
            assert 0 <= one.break_even <= 1
            saved = one.added_us + advice.plain_us - one.us  # per sample that leaves
            assert one.break_even * saved == pytest.approx(max(0.0, one.added_us), abs=1e-6)
    assert max(one.accuracy for one in advice.tried) > 0.9


@pytest.mark.heavy
def test_the_best_branches_are_trained_further_and_the_others_do_not_change(trained, digits, tmp_path):
    """And stopped after that, the search goes on with the same ones, though the clock would now prefer others."""
    first = advised(trained, digits, max_drop=0.01, run=tmp_path)
    second = advised(trained, digits, max_drop=0.01, run=tmp_path, final_epochs=2)
    kept = json.loads(next(tmp_path.glob("final-*/finalists.json")).read_text())["candidates"]
    changed = [i for i, (a, b) in enumerate(zip(first.tried, second.tried, strict=True)) if a.accuracy != b.accuracy]
    assert changed and set(changed) <= set(kept) and len(kept) < len(first.tried)
    others = [(t.tap, t.branch) for i, t in enumerate(second.tried) if i not in kept]
    assert all(pair not in others for d in second.designs for pair in zip(d.taps, d.branches, strict=True))
    states = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("training.safetensors")}
    again = advised(trained, digits, max_drop=0.01, run=tmp_path, final_epochs=2)
    assert len(states) == 2 and states == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("training.safetensors")}
    assert [t.accuracy for t in again.tried] == [t.accuracy for t in second.tried]


def test_advice_is_kept_on_disk(advice, tmp_path):
    advice.save(tmp_path / "advice.json")
    again = Advice.load(tmp_path / "advice.json")
    assert again == advice and again.network is None and str(again) == str(advice)
    (tmp_path / "other.json").write_text(json.dumps({"designs": 3}))
    with pytest.raises(FileError, match=r"other\.json is no Advice"):
        Advice.load(tmp_path / "other.json")


@pytest.mark.heavy
def test_advice_for_another_batch_size_trains_nothing_again(trained, digits, tmp_path, monkeypatch):
    few = {"taps": ["conv1"], "max_drop": 0.05, "epochs": 1}
    advised(trained, digits, run=tmp_path, **few)
    state = (tmp_path / "branches" / "training.safetensors").stat().st_mtime_ns
    other = advised(trained, digits, run=tmp_path, target=Target(16), **few)
    assert other.batch_size == 16 and (tmp_path / "branches" / "training.safetensors").stat().st_mtime_ns == state


def test_the_target_runtime_is_timed(trained, digits, monkeypatch):
    opened = []

    def spied(path, **options):
        opened.append(options["runtime"])
        return load(path, **options)

    monkeypatch.setattr("branchynet.profiling.onnx_parts.load", spied)
    found = advised(trained, digits, taps=["conv1"], max_drop=0.05, epochs=1, runtime="openvino")
    assert set(opened) == {"openvino"} == {found.runtime} and "in openvino" in str(found)
    assert advised(trained, digits, taps=["conv1"], max_drop=0.05, epochs=1).runtime == "onnxruntime"
    assert set(opened) == {"openvino", "onnxruntime"}


def test_advice_against_exits_that_cannot_help(digits):
    """One linear layer: every branch costs more than it can save."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    learn(net, digits, 14)
    found = advised(net, digits, taps=["input", "0"], epochs=1)
    assert not found.worth and str(found).startswith("Do not bother")


def test_exits_that_cannot_help_are_named_with_the_times_on_the_device():
    """Where every call costs much, as for a small network on a large GPU."""
    plain = Design((), (), (), 90.0, (85.0, 95.0), 0.9, (1.0,), (90.0,), (0.0,), (), 90.0)
    times = (("hidden", 130.0), ("linear", 115.0))
    tried = tuple(CandidateResult("conv1", name, 0.1, 0.8, us, 60.0, None) for name, us in times)
    where = {"runtime": "torch-cuda", "device": "NVIDIA Abacus"}
    found = Advice(1, 1, "entropy", 90.0, 0.9, 0.9, 500, (plain,), tried, 0, "", **where)
    assert str(found) == (
        "Do not bother: no early exit helps at batch 1, 1 thread in torch-cuda on NVIDIA Abacus at 90.00% accuracy. No "
        "candidate would save time, even if all samples left there: the network takes 90.0 us per sample, and the "
        "fastest candidate, linear at 'conv1', takes 115.0 us."
    )


def test_pytorch_is_a_target(trained, digits):
    found = advised(trained, digits, taps=["conv1"], max_drop=0.05, epochs=1, runtime="torch")
    assert found.runtime == "torch" == found.cost.runtime and "in torch" in str(found) and found.device
    assert found.plain_us > 0 and all(one.us > 0 for one in found.tried)
    assert found.target == Target(runtime="torch")


def split(data, part, rows):
    kept = getattr(data, part)
    return Split(kept.images[:rows], kept.labels[:rows])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_exits": 1}, "num_exits must be at least 2"),
        ({"max_drop": 0.1, "min_accuracy": 0.9}, "max_drop or min_accuracy, not both"),
        ({"min_accuracy": 1.01}, r"less than the limit of 101\.00%"),
        ({"taps": ["conv9"]}, r"no submodule 'conv9'"),
        ({"target": 64}, "target must be a Target; got 64"),
        ({"epochs": 0}, "epochs must be at least 1 and final_epochs 0; got 0 and 0"),
        ({"final_epochs": -1}, "final_epochs 0; got 3 and -1"),
        ({"score": "entrpy"}, "entrpy"),
        ({"runtime": "openvno"}, "unknown runtime 'openvno'"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_trained(trained, digits, monkeypatch, options, message):
    monkeypatch.setattr("branchynet.design.advising.fit", None)
    with pytest.raises(InputError, match=message):
        advised(trained, digits, **options)


def test_an_untrained_trunk_and_too_little_data_are_refused(trained, digits, monkeypatch):
    monkeypatch.setattr("branchynet.design.advising.fit", None)
    torch.manual_seed(1)
    with pytest.raises(InputError, match=r"always predicting the most common class gives 1\d\.\d%: train it"):
        advised(zoo.lenet(), digits)
    few = ImageData("few", digits.classes, split(digits, "train", 1000), split(digits, "val", 24), digits.test)
    with pytest.raises(
        InputError, match=r"24 validation samples cannot rank designs: .* \d+ are needed to distinguish"
    ):
        advised(trained, few)
    few = ImageData("few", digits.classes, split(digits, "train", 100), digits.val, digits.test)
    with pytest.raises(InputError, match=r"about 1\d\d training samples cannot train branches .*; give at least 200"):
        advised(trained, few)


class Windows(nn.Module):
    """Cuts images into quarters that stand one behind the other in the batch, so that its rows cannot be picked."""

    def __init__(self):
        super().__init__()
        self.quarters = nn.Linear(196, 48)
        self.inside = nn.Linear(48, 48)
        self.fc = nn.Linear(192, 10)

    def forward(self, x):
        x = x.reshape(-1, 2, 14, 2, 14).permute(0, 1, 3, 2, 4).reshape(-1, 196)
        x = torch.relu(self.inside(torch.relu(self.quarters(x))))
        return self.fc(x.reshape(-1, 192))


def test_a_place_where_the_network_cannot_be_cut_is_named_before_anything_is_trained(digits, monkeypatch):
    torch.manual_seed(0)
    net = Windows()
    learn(net, digits, 20)
    monkeypatch.setattr("branchynet.design.advising.fit", None)
    with pytest.raises(GraphError, match="'quarters'"):
        advised(net, digits, taps=["quarters"])
