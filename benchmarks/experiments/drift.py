"""Measure on real digits how often the monitor alarms falsely, how soon it sees drift, and how well a cost is held.

B-LeNet has the shipped weights and the threshold of mnist_training.py. The 20,000 validation and test images, none of
which trained the network, run once for every kind and strength of drift; streams are random rows of these.

1. Unshifted: 1,000 times, 5,000 (or 10,000) random images calibrate and all others are the stream, so both have one
   distribution, as the promise assumes. Also two cases that the promise does not cover: thresholds chosen on the
   calibration images, and one fixed calibration (validation images) for all streams (of test images).
2. Shifted: 1,000 streams per kind. After QUIET unshifted images, noise or rotation grows evenly for DELAY images, or
   only some digits remain from one image to the next: 5 to 9, which are at one end of the labels' order, or five or
   eight random digits per stream. Drift counts as seen if an alarm comes within DELAY images of the change.
3. Budget: streams of LENGTH images, in which drift grows from a fifth of the stream to its end, or classes vanish at a
   fifth. The error is the largest error of the mean cost since the start, from image 2,000 on.
4. The exported file in ONNX Runtime, on test images.

    python benchmarks/experiments/drift.py  # twenty minutes on one core; or name parts: deployed, unshifted, ...

Writes benchmarks/results/drift.json.
"""

import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from mnist_training import threshold_at_share
from torch.nn import functional as F

from branchynet import ExitRecord, Policy, evaluate, export, load, measure, record, zoo
from branchynet.data import load_data
from branchynet.environment import environment
from branchynet.files import write_json
from branchynet.monitor.budget import BudgetController
from branchynet.monitor.drift import Monitor
from branchynet.policy.exit_rule import leaving
from branchynet.policy.record_scores import scores_of_record

PARTS = ("deployed", "unshifted", "shifted", "classes", "budget")
STREAMS = 1000
CALIBRATION = 5000
STATED = (0.1, 0.01)
QUIET, DELAY = 2000, 2000
LENGTH, BUDGET_SEEDS = 10_000, 20
STRENGTHS = {"noise": np.linspace(0, 0.6, 13), "rotation": np.linspace(0, 60, 13)}  # standard deviation, degrees
KEPT = {"classes": (5, 6, 7, 8, 9), "five": 5, "eight": 8}  # these digits, or this many random digits per stream
RESULTS = Path(__file__).parents[1] / "results" / "drift.json"


def drifted(images, kind, strength):
    """Images (S, 1, 28, 28) in [0, 1] with noise of this standard deviation, or rotated by this many degrees."""
    if kind == "noise":
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(int(strength * 1000)))
        return (images + float(strength) * noise).clamp(0, 1)
    turn = torch.deg2rad(torch.tensor(float(strength)))
    matrix = torch.tensor([[turn.cos(), -turn.sin(), 0], [turn.sin(), turn.cos(), 0]])
    grid = F.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


class Pool:
    """The answers of every exit to every image at every strength of drift; streams are rows of it."""

    def __init__(self, net, images, labels):
        self.labels = labels.numpy()
        self.record = record(net, batches(images, labels), progress=False)
        self.tables = {}  # of each kind scores, losses and labels, (strengths, images, exits)
        for kind, strengths in STRENGTHS.items():
            rows = []
            for strength in strengths:
                found = record(net, batches(drifted(images, kind, strength), labels), progress=False)
                rows.append((scores_of_record(found, "entropy"), found.losses, found.outputs.argmax(axis=2)))
            self.tables[kind] = [np.stack(column) for column in zip(*rows, strict=True)]

    def calibration(self, rows):
        """Record of the given images."""
        return ExitRecord(self.record.outputs[rows], self.record.labels[rows])

    def stream(self, kind, progress, rng, rows):
        """Scores, losses and labels (T, N) of an image a step, where `progress` (T,) goes from 0 to full drift, 1."""
        if kind in KEPT:
            kept = KEPT[kind] if kind == "classes" else rng.choice(10, KEPT[kind], replace=False)
            left = rows[np.isin(self.labels[rows], kept)]
            taken = np.where(progress > 0, rng.choice(left, len(progress)), rng.choice(rows, len(progress)))
            level, tables = np.zeros(len(progress), int), self.tables["noise"]
        else:
            tables = self.tables[kind]
            # Between two recorded strengths the images are a mixture of both.
            last = len(tables[0]) - 1
            level = np.minimum(np.floor(progress * last + rng.random(len(progress))).astype(int), last)
            taken = rng.choice(rows, len(progress), replace=len(progress) > len(rows))
        return tuple(table[level, taken] for table in tables)


def batches(images, labels, size=1000):
    return [(images[i : i + size], labels[i : i + size]) for i in range(0, len(images), size)]


def left(scores, labels, policy):
    """Exits, scores and labels (T,) that the engine would return."""
    position = leaving(scores, np.array(policy.thresholds, np.float32))
    rows = np.arange(len(scores))
    return position + 1, scores[rows, position], labels[rows, position]


def unshifted(pool, policy, name, draw, own_policy=False):
    """The number of STREAMS streams in which the monitor alarms, per stated rate."""
    alarms = dict.fromkeys(STATED, 0)
    samples = 0
    for seed in range(STREAMS):
        calibration, stream = draw(np.random.default_rng(seed))
        known = pool.calibration(calibration)
        used = Policy(thresholds=(threshold_at_share(known),)) if own_policy else policy
        scores, _, labels = (table[0, stream] for table in pool.tables["noise"])
        answers = left(scores, labels, used)
        samples = len(stream)
        for rate in STATED:  # from the largest rate: a stream without an alarm there has none at smaller rates
            if not Monitor(known, used, false_alarm=rate, seed=seed).update(*answers).alarmed:
                break
            alarms[rate] += 1
    row = {"setting": name, "streams": STREAMS, "samples": samples}
    return row | {"alarms": [{"stated": rate, "alarms": alarms[rate]} for rate in STATED]}


def shifted(pool, policy, kind, quiet, labels_too=True):
    """How soon the monitor alarms after the change; earlier alarms are counted separately."""
    progress = np.zeros(quiet + 2 * DELAY)
    progress[quiet:] = 1 if kind in KEPT else np.minimum(np.arange(1, 2 * DELAY + 1) / DELAY, 1)
    delays, statistics, early = [], {}, 0
    for seed in range(STREAMS):
        rng = np.random.default_rng(seed)
        rows = rng.permutation(len(pool.labels))
        scores, _, labels = pool.stream(kind, progress, rng, rows[CALIBRATION:])
        monitor = Monitor(pool.calibration(rows[:CALIBRATION]), policy, false_alarm=STATED[-1], seed=seed)
        answers = left(scores, labels, policy)
        alarm = monitor.update(*(answers if labels_too else answers[:2]))
        if alarm.alarmed and alarm.at <= quiet:
            early += 1
        else:
            delays.append(alarm.at - quiet if alarm.alarmed else np.inf)
            statistics[alarm.statistic] = statistics.get(alarm.statistic, 0) + alarm.alarmed
    delays = np.array(delays)
    return {
        "kind": kind,
        "labels_too": labels_too,
        "quiet": quiet,
        "delay_allowed": DELAY,
        "streams": STREAMS,
        "alarms_before_the_change": early,
        "seen_within_delay": int((delays <= DELAY).sum()),
        "delay_median": quantile(delays, 0.5),
        "delay_95": quantile(delays, 0.95),
        "strength_at_median": float(np.interp(np.median(delays) / DELAY, [0, 1], STRENGTHS[kind][[0, -1]]))
        if kind in STRENGTHS
        else None,
        "statistics": statistics,
    }


def quantile(delays, share):
    """The quantile of the delays; None if drift was missed that often."""
    found = float(np.quantile(delays, share, method="inverted_cdf"))
    return found if np.isfinite(found) else None


def budget(pool, policy, cost, kind, goal_us, batch):
    """The error of the mean cost, and the accuracy, with the controller and with fixed thresholds."""
    start = LENGTH // 5
    progress = np.zeros(LENGTH)
    if kind == "classes":
        progress[start:] = 1
    elif kind != "none":
        progress[start:] = np.linspace(0, 1, LENGTH - start)
    us = cost.latency_us(policy.enabled)
    kept = {"worst": [], "final": [], "rolling": [], "accuracy": [], "fixed_us": [], "fixed_accuracy": []}
    for seed in range(BUDGET_SEEDS):
        rng = np.random.default_rng(seed)
        rows = rng.permutation(len(pool.labels))
        scores, losses, _ = pool.stream("noise" if kind == "none" else kind, progress, rng, rows[CALIBRATION:])
        controller = BudgetController(pool.calibration(rows[:CALIBRATION]), policy, cost, goal_us=goal_us)
        fixed = leaving(scores, np.array(controller.thresholds, np.float32))
        exits = np.empty(LENGTH, int)
        for i in range(0, LENGTH, batch):
            part = slice(i, i + batch)
            exits[part] = leaving(scores[part], np.array(controller.thresholds, np.float32)) + 1
            controller.update(exits[part])
        spent = np.cumsum(us[exits - 1])
        mean = spent / np.arange(1, LENGTH + 1) / goal_us - 1
        rolling = (spent[2000:] - spent[:-2000]) / 2000 / goal_us - 1
        each = np.arange(LENGTH)
        kept["worst"].append(np.abs(mean[1999:]).max())
        kept["final"].append(abs(mean[-1]))
        kept["rolling"].append(np.abs(rolling).max())
        kept["accuracy"].append(1 - losses[each, exits - 1].mean())
        kept["fixed_us"].append(us[fixed].mean())
        kept["fixed_accuracy"].append(1 - losses[each, fixed].mean())
    return {
        "kind": kind,
        "goal_us": goal_us,
        "batch": batch,
        "streams": BUDGET_SEEDS,
        "samples": LENGTH,
        "error_after_2000_worst": float(max(kept["worst"])),
        "error_final_mean": float(np.mean(kept["final"])),
        "error_rolling_2000_worst": float(max(kept["rolling"])),
        "accuracy": float(np.mean(kept["accuracy"])),
        "fixed_error": float(np.mean(kept["fixed_us"]) / goal_us - 1),
        "fixed_accuracy": float(np.mean(kept["fixed_accuracy"])),
    }


def deployed(net, data, policy, cost, known):
    """The exported file on test images in batches of 64: shuffled, in file order, and with growing noise.

    MNIST test images are from two groups of writers, one after the other, so their order is drift.
    """
    images = data.test.images.float() / 255
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    with tempfile.TemporaryDirectory() as folder:
        engine = load(export(net, Path(folder) / "model.onnx", policy=policy, example=images[:8]), threads=1)
        clean, noisy, ordered = (Monitor(known, policy) for _ in range(3))
        goal = evaluate(known, policy, cost).mean_us
        controller = BudgetController(known, policy, cost, goal_us=goal)
        seconds = 0.0
        for i in range(0, len(images), 64):
            some = images[i : i + 64]
            answer = engine(some.numpy())
            begun = time.perf_counter()
            clean.update(answer)
            seconds += time.perf_counter() - begun
            ordered.update(engine(data.test.images[i : i + 64].float().div(255).numpy()))
            worse = drifted(some, "noise", round(0.6 * i / len(images), 3)).numpy()
            noisy.update(engine(worse))
            controller.update(engine(worse, thresholds=controller.thresholds))
    spent = controller.state
    return {
        "samples": spent.samples,
        "clean_alarmed": clean.state.alarmed,
        "clean_capital": clean.state.capital,
        "ordered_alarm": str(ordered.state),
        "noisy_alarm": str(noisy.state),
        "goal_us": spent.goal_us,
        "mean_us": spent.mean_us,
        "monitor_us_a_sample": 1e6 * seconds / len(images),
    }


def false_alarms(pool, policy, val, test):
    """All settings of part 1."""
    everything = np.concatenate([val, test])

    def split(size):
        def draw(rng):
            rows = rng.permutation(everything)
            return rows[:size], rows[size:]

        return draw

    settings = (
        ("5,000 calibrate, 15,000 follow", split(5000), False),
        ("10,000 calibrate, 10,000 follow", split(10_000), False),
        ("threshold chosen on the 5,000 that calibrate", split(5000), True),
        ("validation calibrates all, test follows", lambda rng: (val, rng.choice(test, 10_000)), False),
    )
    return [shown(unshifted(pool, policy, *setting)) for setting in settings]


def main():
    torch.set_num_threads(1)
    parts = sys.argv[1:] or PARTS
    assert set(parts) <= set(PARTS), f"parts are {PARTS}"
    data = load_data("mnist")
    net = zoo.b_lenet(branches="published", pretrained=True)
    images = torch.cat([data.val.images, data.test.images]).float() / 255
    pool = Pool(net, images, torch.cat([data.val.labels, data.test.labels]))
    val, test = np.arange(len(data.val)), np.arange(len(data.val), len(images))
    known = pool.calibration(val)
    policy = Policy(thresholds=(threshold_at_share(known),))
    result = {
        "command": "python benchmarks/experiments/drift.py",
        "environment": environment(),
        "threshold": policy.thresholds[0],
        "seeds": f"0 to {STREAMS - 1} (budget: 0 to {BUDGET_SEEDS - 1})",
        "calibration": CALIBRATION,
    }
    if "deployed" in parts:
        result["deployed"] = shown(deployed(net, data, policy, measure(net, images[:1]), known))
    if "unshifted" in parts:
        result["unshifted"] = false_alarms(pool, policy, val, test)
    if "shifted" in parts:
        kinds = (
            ("noise", QUIET, True),
            ("rotation", QUIET, True),
            ("classes", QUIET, True),
            ("noise", 5 * QUIET, True),
            ("classes", 5 * QUIET, True),
            ("classes", QUIET, False),
        )
        result["shifted"] = [shown(shifted(pool, policy, *kind)) for kind in kinds]
    if "classes" in parts:
        kinds = (("five", QUIET, True), ("eight", QUIET, True))
        result["classes"] = [shown(shifted(pool, policy, *kind)) for kind in kinds]
    if "budget" in parts:
        cost = measure(net, images[:1])
        result["cost_us"] = list(cost.latency_us(policy.enabled))
        goals = [evaluate(known, policy, cost).mean_us, float(np.mean(result["cost_us"]))]
        cases = itertools.product(("none", "noise", "rotation", "classes"), goals, (1, 64))
        result["budget"] = [shown(budget(pool, policy, cost, *case)) for case in cases]
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    write_json(RESULTS, before | result)


def shown(row):
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
