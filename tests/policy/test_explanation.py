"""Explanations of choices without early exits, compared with all thresholds."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from branchynet import ExitCost, ExitRecord, Policy, choose, evaluate
from branchynet.policy.explanation import lone_exits, why_never
from branchynet.policy.values import Promise

times = st.floats(0, 50)


@st.composite
def scored(draw, exits=3, samples=8):
    """Draw a record with few distinct scores, NaN and infinity, so that samples leave together."""
    some = st.sampled_from([0.0, 0.25, 0.5, 1.0, np.inf, np.nan])
    scores = draw(st.lists(st.lists(some, min_size=exits, max_size=exits), min_size=samples, max_size=samples))
    wrong = st.lists(st.integers(0, 1), min_size=exits, max_size=exits)
    return ExitRecord.from_scores(scores, draw(st.lists(wrong, min_size=samples, max_size=samples)))


def a_cost(draw, exits=3):
    trunk, branch = (draw(st.lists(times, min_size=exits, max_size=exits)) for _ in range(2))
    return ExitCost(tuple(trunk), tuple(branch))


def alone(exits, n, threshold):
    return Policy(thresholds=tuple(threshold if k == n else None for k in range(exits - 1)))


@given(scored(), st.sampled_from(["max_drop", "min_accuracy"]), st.floats(0, 1), st.data())
def test_the_share_that_may_leave_is_the_largest_of_all_thresholds(record, name, limit, data):
    cost = a_cost(data.draw)
    never = choose(record, cost, max_drop=0.0, confidence=None)
    last = evaluate(record, Policy(thresholds=(None, None))).accuracy
    limit = min(limit, last) if name == "min_accuracy" else limit
    asked = replace(never, policy=Policy(never.policy.score, (None, None)), constraint={name: limit})
    for n, found in enumerate(lone_exits(record, cost, asked)):
        outcomes = [evaluate(record, alone(3, n, t)) for t in (-1.0, 0.1, 0.3, 0.7, 2.0)]
        least = limit if name == "min_accuracy" else last - limit
        want = max(o.exit_share[n] for o in outcomes if o.accuracy >= least - 1e-9)
        assert found.exit == n + 1 and found.possible == pytest.approx(want)


@given(scored(), st.data())
def test_an_exit_pays_from_the_reported_share(record, data):
    cost = a_cost(data.draw)
    choice = choose(record, cost, max_drop=0.0, confidence=None)
    plain = cost.latency_us([False, False, True])[-1]
    for n, found in enumerate(lone_exits(record, cost, choice)):
        each = cost.latency_us([k in (n, 2) for k in range(3)])
        for share in (0.0, 0.1, 0.5, 0.9, 1.0):
            mean = share * each[n] + (1 - share) * each[-1]
            if abs(share - found.needed) > 1e-9 and abs(mean - plain) > 1e-9:
                assert (mean < plain) == (share > found.needed)


def test_there_is_a_reason_only_if_no_sample_leaves_early():
    scores = [[0.1, 0.1], [0.2, 0.1], [0.9, 0.1], [0.95, 0.1]]
    record = ExitRecord.from_scores(scores, [[0, 0], [0, 0], [1, 0], [1, 0]])
    cheap, dear = ExitCost((10, 30), (1, 0)), ExitCost((10, 30), (25, 0))
    assert why_never(record, cheap, choose(record, cheap, max_drop=0.0, confidence=None)) == ""
    text = why_never(record, dear, choose(record, dear, max_drop=0.0, confidence=None))
    assert "adds 25.0 us to a sample that continues and saves 5.0 us on one that leaves" in text
    assert "pays if 83.3% leave; this limit allows 50.0%" in text
    slow = ExitCost((10, 30), (35, 0), batch_size=8, runtime="torch-cuda", device="NVIDIA Abacus")
    text = why_never(record, slow, choose(record, slow, max_drop=0.0, confidence=None))
    assert text.startswith("do not bother with exits at batch 8, threads 1, torch-cuda on NVIDIA Abacus: ")
    assert "takes 40.0 us per sample, and leaving at the fastest exit takes 45.0 us" in text and "saves nothing" in text


def test_too_few_samples_for_a_promise_are_a_reason():
    """Exit 1 is wrong on one sample in ten, but not on the surest; 60 samples are too few for a promise."""
    scores = np.linspace(0, 1, 60)[:, None].repeat(2, axis=1)
    losses = np.stack([scores[:, 0] > 0.9, np.zeros(60)], axis=1)
    record, cost = ExitRecord.from_scores(scores, losses), ExitCost((10, 30), (8, 0))
    free = choose(record, cost, max_drop=0.0, confidence=None)
    assert any(free.policy.enabled[:-1])
    promise = Promise("max_drop", 0.0, 0.95, "betting", 30, 30)
    held = replace(free, policy=Policy(free.policy.score, (None,)), promise=promise)
    for known in (cost, None):
        text = why_never(record, known, held)
        assert "no early exit passes the test of the promise" in text and "too few for a promise" in text
        assert "pays at this limit" not in text and "sure enough" not in text


@settings(max_examples=200)
@given(st.integers(2, 5), st.sampled_from([{"max_drop": 0.0}, {"max_drop": 0.2}, {"min_accuracy": 0.5}]), st.data())
@pytest.mark.heavy
def test_without_a_promise_no_exit_that_would_pay_is_said_not_to(exits, limit, data):
    """Also with three and four thresholds, for which the search need not be exhaustive."""
    record, cost = data.draw(scored(exits)), a_cost(data.draw, exits)
    assume(limit != {"min_accuracy": 0.5} or 1 - record.losses[:, -1].mean() >= 0.5)
    for known in (cost, None):
        choice = choose(record, known, **limit, confidence=None)
        assert "promise" not in choice.reason
        if choice.reason and known is not None:
            for one in lone_exits(record, known, choice):
                gain = one.possible * (one.saved_us + one.added_us) - one.added_us
                assert one.saved_us <= 0 or gain <= 1e-6, "a rounding error, or the exit would pay"


COSTS = [None, ExitCost((10, 30), (25, 0)), ExitCost((10, 30), (35, 0)), ExitCost((9, 9), (9, 0))]
FREE = {"confidence": None}


@pytest.mark.filterwarnings("ignore:no thresholds keep")
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(
    "limit", [{"max_drop": 0.05}, {"max_drop": 0.0} | FREE, {"min_accuracy": 1.0} | FREE, {"max_latency_us": 1e6}]
)
def test_a_choice_says_why_no_sample_leaves_early(cost, limit):
    """The first exit is wrong if it is sure, and the last is right, so no sample may leave early."""
    scores = np.linspace(0, 1, 200)[:, None].repeat(2, axis=1)
    record = ExitRecord.from_scores(scores, np.stack([scores[:, 0] < 0.5, np.zeros(200)], axis=1))
    if cost is None and "max_latency_us" in limit:
        return  # is refused
    choice = choose(record, cost, **limit)
    assert choice.policy.thresholds == (None,)
    assert choice.reason == why_never(record, cost, choice) != ""
    text = str(choice).splitlines()
    assert text[:2] == ["exit 1 answers 0.0%: never", "exit 2 answers 100.0%: always"]
    assert choice.reason in text[-1] and "`advise`" in text[-1]
    assert (" us" in choice.reason) == (cost is not None and "max_latency_us" not in limit)


def test_a_choice_that_lets_samples_leave_has_no_reason():
    scores = [[0.1, 0.1], [0.2, 0.1], [0.9, 0.1], [0.95, 0.1]]
    record = ExitRecord.from_scores(scores, [[0, 0], [0, 0], [1, 0], [1, 0]])
    choice = choose(record, max_drop=0.0, confidence=None)
    assert choice.reason == "" and "advise" not in str(choice)
    assert str(choice).splitlines() == [
        "exit 1 answers 50.0%: entropy < 0.55",
        "exit 2 answers 50.0%: always",
        "accuracy 100.00%, last exit alone 100.00%, on the 4 samples used to choose",
    ]


def by_accuracy(accuracies, classes=10, common=0.1, samples=2000):
    """A record whose exits are right for these shares of the samples; class 0 has the share `common`."""
    rng = np.random.default_rng(0)
    labels = np.where(rng.random(samples) < common, 0, rng.integers(1, classes, samples))
    outputs = np.zeros((samples, len(accuracies), classes), np.float32)
    for n, accuracy in enumerate(accuracies):
        answers = np.where(np.arange(samples) < accuracy * samples, labels, (labels + 1) % classes)
        outputs[np.arange(samples), n, answers] = 1 + rng.random(samples)
    return ExitRecord(outputs, labels)


@pytest.mark.parametrize(
    ("accuracies", "common", "named"),
    [
        ((0.106, 0.98), 0.1, "exit 1 has 10.6% accuracy"),
        ((0.02, 0.98), 0.1, "exit 1 has 2.0% accuracy"),
        ((0.8, 0.13, 0.9), 0.1, "exit 2 has 13.0% accuracy"),
        ((0.902, 0.99), 0.9, "exit 1 has 90.2% accuracy"),
        ((0.3, 0.98), 0.1, None),  # weak, but better than chance
        ((0.1, 0.11), 0.1, None),  # the network is untrained too
        ((0.93, 0.99), 0.9, None),
    ],
)
def test_an_exit_near_chance_is_named(accuracies, common, named):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        choose(by_accuracy(accuracies, common=common), max_drop=0.1, confidence=None)
    texts = [str(w.message) for w in caught if "most common class" in str(w.message)]
    assert [text.startswith(named or "-") and "advise(...) finds" in text for text in texts] == [True] * bool(named)


def test_records_without_labels_have_no_chance():
    losses = np.ones((100, 2))
    losses[:, 1] = 0
    choose(ExitRecord.from_scores(losses, losses, "entropy"), max_drop=0.1, confidence=None)
