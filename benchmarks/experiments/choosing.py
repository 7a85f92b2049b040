"""Measure whether thresholds are chosen fast, better than by the usual searches, and with a promise that holds.

1. Search: seconds and memory for 1,000,000 threshold vectors over 10,000 samples of 3 and of 4 exits, and for 6 exits.
2. Rivals at equal accuracy, on the same record: (a) nine fixed values, one exit after another; (b) one threshold for
   all exits; (c) all combinations of a sweep of 17 values. For each of their points: our mean cost / theirs.
3. Coverage: 2,000 draws with replacement from a record that serves as the truth. How often does a choice break its
   limit? Both bounds, on B-LeNet, on four exits on Fashion-MNIST, and on made-up scores whose risk grows evenly with
   the threshold.
4. Price: mean cost with a promise / mean cost without.

    python benchmarks/experiments/choosing.py  # about 30 minutes on one core; uses the networks of scores.py
    python benchmarks/experiments/choosing.py search networks    # the first part, and the second and fourth: minutes

Writes benchmarks/results/choosing.json.
"""

import itertools
import json
import math
import statistics
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import torch
from scores import networks

from branchynet import ExitCost, ExitRecord, Policy, choose, evaluate, frontier, measure, record, zoo
from branchynet.data import load_data, loader
from branchynet.environment import environment
from branchynet.files import write_json
from branchynet.policy.exit_rule import route
from branchynet.policy.record_scores import scores_of_record

DRAWS, SAMPLES, CONFIDENCE, SEED = 2000, 4000, 0.95, 0
MADE_UP_SAMPLES = 10_000  # enough for dense candidates
DROPS = (0.0, 0.001, 0.002, 0.005, 0.01)
NINE = np.arange(1, 10) / 10
SWEEP = np.geomspace(1e-4, 1.0, 17)  # of the largest entropy, as are the nine
RESULTS = Path(__file__).parents[1] / "results" / "choosing.json"


def evenly(exits, samples, steps):
    """Random scores of `steps` values, with later exits better, and losses that rule out no threshold in advance."""
    rng = np.random.default_rng(SEED)
    scores = np.floor(rng.random((samples, exits)) * steps) / steps
    return ExitRecord.from_scores(scores, rng.random((samples, exits)) * scores / (1 + np.arange(exits)))


def distinct(samples):
    """Two thresholds over all distinct scores of 10,000 samples with right and wrong answers: the exact search."""
    rng = np.random.default_rng(SEED)
    scores = rng.random((samples, 3))
    return ExitRecord.from_scores(scores, rng.random((samples, 3)) < scores * (0.3, 0.1, 0.05))


def search_cost(name, made, vectors, repeats=7):
    cost = ExitCost((10.0,) * made.num_exits, (3.0,) * (made.num_exits - 1) + (0.0,))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        frontier(made, cost)
        times.append(time.perf_counter() - start)
    tracemalloc.start()
    frontier(made, cost)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "search": name,
        "exits": made.num_exits,
        "samples": made.samples,
        "vectors": vectors,
        "seconds": statistics.median(times),
        "megabytes": peak / 2**20,
    }


def searches(samples=10_000):
    yield search_cost("every combination of 1,000 scores per exit", evenly(3, samples, 1000), 1000**2)
    yield search_cost("every combination of 100 scores per exit", evenly(4, samples, 100), 100**3)
    yield search_cost("all distinct scores, right and wrong answers", distinct(samples), samples**2)
    yield search_cost("coordinate ascent", evenly(6, samples, samples), None)


def outcome_of(scores, losses, cost, thresholds):
    """(accuracy, mean microseconds); None is never."""
    position = route(scores, thresholds) - 1
    us = cost.latency_us([t is not None for t in thresholds] + [True])
    return 1 - losses[np.arange(len(losses)), position].mean(), us[position].mean()


def rivals(made, cost):
    """Points (accuracy, microseconds) of each rival on the record."""
    scores, losses, early = scores_of_record(made), made.losses.astype(np.float64), made.num_exits - 1
    top = math.log(made.outputs.shape[2])
    last = 1 - losses[:, -1].mean()

    def judge(thresholds):
        return outcome_of(scores, losses, cost, thresholds)

    greedy = []
    for drop in DROPS:
        chosen = [None] * early
        for n in range(early):
            tried = [[*chosen[:n], t, *chosen[n + 1 :]] for t in (None, *(NINE * top))]
            within = [(judge(t)[1], t) for t in tried if judge(t)[0] >= last - drop]
            chosen = min(within, key=lambda pair: pair[0])[1] if within else chosen
        greedy.append(judge(chosen))
    shared = [judge([t] * early) for t in np.unique(np.quantile(scores[:, 0], np.linspace(0.01, 1, 100)))]
    sweep = [judge(list(c)) for c in itertools.product((None, *(SWEEP * top)), repeat=early)]
    return {"greedy, nine values": greedy, "one threshold for all": shared, "sweep of 17": sweep}


def against(made, cost):
    """Per rival: our cost at its accuracy or above / its cost, as the worst and the median over its points."""
    found = frontier(made, cost)
    rows = []
    for name, points in rivals(made, cost).items():
        ratios = [found.mean_us[found.accuracy >= accuracy - 1e-12].min() / us for accuracy, us in points]
        rows.append({"rival": name, "points": len(points), "worst": max(ratios), "median": statistics.median(ratios)})
    return rows


def without_the_third(made, cost):
    """Record and cost of the four exits as if the third had no branch."""
    kept = [0, 1, 3]
    trunk = (*cost.trunk_us[:2], sum(cost.trunk_us[2:]))
    return ExitRecord(made.outputs[:, kept], made.labels), ExitCost(trunk, tuple(cost.branch_us[n] for n in kept))


def synthetic():
    """One early exit, wrong with a probability that grows evenly with its score; the last exit is always right."""
    rng = np.random.default_rng(SEED)
    scores = rng.random((200_000, 2))
    return ExitRecord.from_scores(scores, np.stack([rng.random(200_000) < 0.1 * scores[:, 0], np.zeros(200_000)], 1))


def coverage(truth, cost, limit, bound, samples=SAMPLES):
    """How often the promise of `choose` on a draw does not hold for the whole record."""
    ((name, value),) = limit.items()
    rng = np.random.default_rng(SEED)
    scores = scores_of_record(truth)
    losses = truth.losses
    if name == "max_disagreement":
        answers = truth.outputs.argmax(2)
        losses = (answers != answers[:, -1:]).astype(np.float32)
        limit = {"max_drop": value}  # on losses that are disagreements
    broken, us, plain = 0, [], []
    each = np.arange(samples, dtype=np.uint64)  # every draw counts as a separate sample
    for draw in range(DRAWS):
        rows = rng.integers(0, len(scores), samples)
        sample = ExitRecord.from_scores(scores[rows], losses[rows], inputs=each)
        choice = choose(sample, cost, **limit, confidence=CONFIDENCE, bound=bound, vectors=10_000)
        accuracy, mean = outcome_of(scores, losses.astype(np.float64), cost, choice.policy.thresholds)
        broken += (1 - losses[:, -1].mean(dtype=np.float64)) - accuracy > value + 1e-12
        us.append(mean)
        if draw < 50:
            hope = choose(sample, cost, **limit, confidence=None, vectors=10_000).policy.thresholds
            plain.append(outcome_of(scores, losses.astype(np.float64), cost, hope)[1])
    return {
        "limit": name,
        "value": value,
        "bound": bound,
        "draws": DRAWS,
        "samples": samples,
        "broken": broken / DRAWS,
        "mean_us": float(np.mean(us)),
        "mean_us_without_promise": float(np.mean(plain)),
        "never_us": float(cost.latency_us([False] * (len(scores[0]) - 1) + [True])[-1]),
    }


def judged():
    """`(name, network, data)`: those of scores.py, and the paper's on CIFAR-10 with the shipped weights."""
    for name, _, net, data in itertools.islice(networks(), 3):
        yield name, net, data
    yield "B-AlexNet, CIFAR-10", zoo.b_alexnet(branches="text", pretrained=True), load_data("cifar10")


def on_networks():
    """Rivals and price per network, and the cases for the coverage."""
    found, cases = {"rivals": [], "price": []}, []
    for name, net, data in judged():
        val, test = (record(net, loader(part, 1000), progress=False) for part in (data.val, data.test))
        cost = measure(net, data.val.images[:8].float() / 255)
        found["rivals"].append({"network": name, "rows": against(val, cost)})
        if name == "4 exits, MNIST":
            three = against(*without_the_third(val, cost))
            found["rivals"].append({"network": "B-LeNet and a branch on the input", "rows": three})
        kept = choose(val, cost, max_drop=0.01).policy
        hope = choose(val, cost, max_drop=0.01, confidence=None).policy
        found["price"].append(
            {
                "network": name,
                "promised": vars(evaluate(test, kept, cost)),
                "without": vars(evaluate(test, hope, cost)),
                "never": vars(evaluate(test, Policy(thresholds=(None,) * (val.num_exits - 1)), cost)),
                "ratio_on_validation": evaluate(val, kept, cost).mean_us / evaluate(val, hope, cost).mean_us,
            }
        )
        print(found["rivals"][-1], found["price"][-1]["ratio_on_validation"], flush=True)
        both = ExitRecord(np.concatenate([val.outputs, test.outputs]), np.concatenate([val.labels, test.labels]))
        more = ({"max_disagreement": 0.02},) if name.startswith("B-LeNet") else ()
        if name in ("B-LeNet, MNIST", "4 exits, Fashion-MNIST"):  # of both kinds one
            cases.append((name, both, cost, ({"max_drop": 0.01}, *more)))
    return found, cases


def main():
    torch.set_num_threads(1)
    parts = sys.argv[1:] or ["search", "networks", "coverage"]
    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    result |= {"command": "python benchmarks/experiments/choosing.py", "environment": environment(), "seed": SEED}
    if "search" in parts:
        result["search"] = list(searches())
        print(result["search"], flush=True)
    if "networks" in parts or "coverage" in parts:
        found, real = on_networks()
        result |= found
    if "coverage" in parts:
        made_up = ExitCost((10.0, 20.0), (2.0, 0.0))
        result["coverage"] = []
        for name, truth, cost, limits in [("made up", synthetic(), made_up, ({"max_drop": 0.02},)), *real]:
            for limit, bound in itertools.product(limits, ("betting", "binomial")):
                samples = MADE_UP_SAMPLES if cost is made_up else SAMPLES
                result["coverage"].append({"network": name, **coverage(truth, cost, limit, bound, samples)})
                print(result["coverage"][-1], flush=True)
                write_json(RESULTS, result)
    write_json(RESULTS, result)


if __name__ == "__main__":
    main()
