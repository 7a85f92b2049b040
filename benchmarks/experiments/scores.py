"""Compare all scores of the library at equal accuracy, on six networks.

SPLITS times, the validation images are halved at random. Scores are fitted on one half. On the other half, thresholds
are chosen for every drop in DROPS (and, beyond the smallest, tightened), and evaluated on test images. Costs are
multiply-accumulates in percent of the plain network's, with branches; a score or an average that reads earlier exits
keeps their branches even if no sample leaves there. The cost at an accuracy is interpolated between the (cost, test
accuracy) points of a split, made monotone (isotonic regression). AUROC is how well a score separates wrong from right
answers of an exit, on test images.

The features and the penalty of the learned score were selected on validation halves of these networks.

    python benchmarks/experiments/scores.py     # about 25 minutes of training, then 15 more on one core; resumes

Writes benchmarks/results/scores.json.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import roc_auc_score
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from branchynet import BranchyNet, averaged, fit, fit_score, fit_temperature, frontier, load, record, zoo
from branchynet.data import load_data, loader
from branchynet.deploy.assembly import assemble
from branchynet.environment import environment
from branchynet.files import read_json, write_json
from branchynet.graph.macs import exit_macs
from branchynet.graph.onnx_flat import flatten
from branchynet.nn.branches import InputMLP
from branchynet.policy.averaging import averaged_record, fit_averaging
from branchynet.policy.exit_cost import ExitCost
from branchynet.policy.exit_record import ExitRecord
from branchynet.policy.exit_rule import route
from branchynet.policy.record_scores import scores_of_record
from branchynet.policy.scores import features, resolve
from branchynet.profiling.clock import interleaved
from branchynet.training.options import FitOptions

BATCH, RATE = 256, 3e-3
BRANCH_EPOCHS, JOINT_EPOCHS = 6, 10
FASHION_SEEDS = (0, 1, 2, 3)
SPLITS = 20
DROPS = tuple(np.round(np.arange(-0.003, 0.0121, 0.001), 4).tolist())
CAUTION = (0.99, 0.97, 0.94, 0.9, 0.8, 0.65, 0.5, 0.25, 0.0)  # shares of the samples that leave at the smallest drop
TARGETS = (0.0, 0.002)  # points below the plain network's accuracy
VECTORS = 100_000
ROOT = Path(__file__).parents[1]
RUNS = ROOT.parent / "runs" / "scores"
RESULTS = ROOT / "results" / "scores.json"


def pool():
    return nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.ReLU())


def four_exits(lenet):
    """LeNet with small branches on the input, the first and the second convolution."""
    branches = {
        "input": InputMLP((1, 28, 28), 10),
        "conv1": nn.Sequential(pool(), nn.Conv2d(5, 10, 3, padding=1), pool(), nn.Flatten(), nn.Linear(640, 10)),
        "conv2": nn.Sequential(pool(), nn.Flatten(), nn.Linear(810, 10)),
    }
    return BranchyNet(lenet, branches)


def train(net, data, epochs, which, seed, run):
    fit(
        net,
        loader(data.train, BATCH, shuffle=True),
        loader(data.val, 1000),
        epochs=epochs,
        train=which,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=RATE),
        run=run,
        progress=False,
        options=FitOptions(seed=seed, channels_last=True),
    )
    return net


def networks():
    """(name, seed, network, data) per network; all but the first are trained unless their run folders hold them."""
    mnist, fashion = load_data("mnist"), load_data("fashion-mnist")
    yield "B-LeNet, MNIST", 0, zoo.b_lenet(branches="published", pretrained=True), mnist
    torch.manual_seed(0)
    net = four_exits(zoo.lenet(pretrained=True))
    yield "4 exits, MNIST", 0, train(net, mnist, BRANCH_EPOCHS, "branches", 0, RUNS / "mnist"), mnist
    for seed in FASHION_SEEDS:
        torch.manual_seed(seed)
        net = train(four_exits(zoo.lenet()), fashion, JOINT_EPOCHS, "all", seed, RUNS / f"fashion-mnist-{seed}")
        yield "4 exits, Fashion-MNIST", seed, net, fashion


def rows_of(found, rows):
    return ExitRecord(found.outputs[rows], found.labels[rows])


def perceptrons(half, others, seed):
    """Scores of `others` from one network with 16 hidden units per exit instead of the logistic regressions."""
    scores = [np.empty((r.samples, r.num_exits), np.float32) for r in others]
    for n in range(1, half.num_exits + 1):
        seen = [
            features(tuple(torch.from_numpy(r.outputs[:, k].copy()) for k in range(n)), True) for r in (half, *others)
        ]
        model = make_pipeline(StandardScaler(), MLPClassifier((16,), solver="lbfgs", alpha=1.0, random_state=seed))
        with np.errstate(all="ignore"):
            model.fit(seen[0], half.losses[:, n - 1] > 0)
            for found, x in zip(scores, seen[1:], strict=True):
                found[:, n - 1] = np.log(np.clip(model.predict_proba(x)[:, 1], 1e-7, 1))
    return scores


def candidates(half, others, seed):
    """Per score: its name, whether it reads earlier exits, and records of scores for each of `others`."""

    def judged(score, records):
        return [ExitRecord.from_scores(scores_of_record(r, score), r.losses) for r in records]

    for name in ("entropy", "max_probability", "margin"):
        yield name, False, judged(name, others)
        yield f"{name}, temperature", False, judged(fit_temperature(half, name), others)
    if half.num_exits > 2:  # temperatures change no label, so patience is the same with them
        yield "patience", True, judged("patience", others)
    yield "learned, own exit", False, judged(fit_score(half, earlier=False), others)
    yield "learned", True, judged(fit_score(half), others)
    made = [ExitRecord.from_scores(s, r.losses) for s, r in zip(perceptrons(half, others, seed), others, strict=True)]
    yield "learned, 16 hidden units", True, made
    fitted = fit_averaging(half)
    for name, weights, of in (("equal", None, "softmax"), ("logits", None, "logits"), ("fitted", fitted, "softmax")):
        mixed = [averaged_record(r, weights, of=of) for r in others]
        yield f"average ({name}), max_probability", True, judged("max_probability", mixed)
    mixed = [averaged_record(r, fitted) for r in (half, *others)]
    yield "average (fitted), learned", True, judged(fit_score(mixed[0]), mixed[1:])


def points(chosen, base, test, cost):
    """(cost, accuracy) on test images of the choice for every drop from `base`, then tightened in steps to never."""
    found = frontier(chosen, cost, vectors=VECTORS)
    policies = []
    for drop in DROPS:
        within = np.flatnonzero(found.accuracy >= base - drop - 1e-9)
        if len(within):
            policies.append((drop, 1.0, found.policy(int(within[found.mean_us[within].argmin()])).thresholds))
    boldest = policies[0][2] if policies else (None,) * (test.num_exits - 1)
    left = route(chosen.scores, boldest)
    for share in CAUTION:
        kept = [None if t is None or share == 0 else leaving(chosen, left, n, share) for n, t in enumerate(boldest, 1)]
        policies.append((None, share, tuple(kept)))
    made = []
    for drop, share, thresholds in policies:
        left = route(test.scores, thresholds) - 1
        us = cost.latency_us([t is not None for t in thresholds] + [True])
        accuracy = float(1 - test.losses[np.arange(test.samples), left].mean())
        made.append({"drop": drop, "share": share, "cost": float(us[left].mean()), "accuracy": accuracy})
    return made


def leaving(chosen, left, n, share):
    """The threshold at which only this share of the samples that left at exit n, the surest, still leave."""
    scores = chosen.scores[left == n, n - 1]
    return float(np.quantile(scores, share)) if len(scores) else None


def cost_at(made, accuracy, plain):
    """The cost in percent at which the points of a split reach an accuracy; that of the plain network if none does."""
    cost, reached = (np.array([p[key] for p in made]) for key in ("cost", "accuracy"))
    order = np.argsort(cost)
    cost, reached = cost[order], IsotonicRegression().fit_transform(cost[order], reached[order])
    reaching = np.flatnonzero(reached >= accuracy - 1e-12)
    if not len(reaching):
        return plain
    i = reaching[0]
    if i == 0 or reached[i] == reached[i - 1]:
        return float(cost[i])
    part = (accuracy - reached[i - 1]) / (reached[i] - reached[i - 1])
    return float(cost[i - 1] + part * (cost[i] - cost[i - 1]))


def stage_costs(net, example):
    """ExitCosts in percent of the plain network's work, if *never* removes a branch and if it does not."""
    trunk, branch = (np.array(part) for part in exit_macs(flatten(net, example)))
    trunk, branch = 100 * trunk / trunk.sum(), 100 * branch / trunk.sum()
    return ExitCost(tuple(trunk), tuple(branch)), ExitCost(tuple(trunk + branch), (0.0,) * len(trunk))


def one_network(name, seed, net, data):
    """The table rows and all trials of one network, stored in the run folder."""
    kept_as = RUNS / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.json"
    if kept_as.exists():
        return read_json(kept_as)
    val, test = (record(net, loader(split, 1000), progress=False) for split in (data.val, data.test))
    removable, kept = stage_costs(net, data.test.images[:2].float() / 255)
    last = float(1 - test.losses[:, -1].mean())
    trials = {}
    for split in range(SPLITS):
        order = np.random.default_rng(split).permutation(val.samples)
        half, chooser = rows_of(val, order[: val.samples // 2]), rows_of(val, order[val.samples // 2 :])
        base = 1 - chooser.losses[:, -1].mean()
        for score, reads, (chosen, judge) in candidates(half, (chooser, test), split):
            made = points(chosen, base, judge, kept if reads else removable)
            auroc = [roc_auc_score(judge.losses[:, n] > 0, judge.scores[:, n]) for n in range(judge.num_exits)]
            trials.setdefault(score, []).append(
                {
                    "cost": [cost_at(made, last - drop, 100.0) for drop in TARGETS],
                    "as_chosen": [[p["cost"], p["accuracy"]] for p in made if p["drop"] in TARGETS],
                    "auroc": [float(a) for a in auroc],
                    "last_accuracy": float(1 - judge.losses[:, -1].mean()),
                }
            )
        print(name, seed, "split", split, flush=True)
    rows = [row(score, found, trials["entropy"]) for score, found in trials.items()]
    found = {
        "network": name,
        "seed": seed,
        "last_accuracy": last,
        "exit_accuracy": (1 - test.losses.mean(axis=0)).tolist(),
        "trunk_percent": list(removable.trunk_us),
        "branch_percent": list(removable.branch_us),
        "rows": rows,
        "trials": {score: {key: [t[key] for t in each] for key in each[0]} for score, each in trials.items()},
    }
    write_json(kept_as, found)
    return found


def row(score, trials, entropy):
    """Means over the splits, and the paired difference from entropy with its standard error."""
    cost = np.array([t["cost"] for t in trials])
    against = cost - np.array([t["cost"] for t in entropy])
    found = {
        "score": score,
        "auroc": np.mean([t["auroc"] for t in trials], axis=0).tolist(),
        "cost": cost.mean(axis=0).tolist(),
        "minus_entropy": against.mean(axis=0).tolist(),
        "minus_entropy_error": (against.std(axis=0, ddof=1) / len(trials) ** 0.5).tolist(),
        "last_accuracy": float(np.mean([t["last_accuracy"] for t in trials])),
    }
    print(found, flush=True)
    return found


def score_times(net, data):
    """Microseconds that a score adds to each exit at batch 1 and one thread: two exits with and without, halved."""
    images = data.test.images[:8].float() / 255
    half = rows_of(record(net, loader(data.val, 1000), progress=False), slice(5000))
    named = {name: (net, name) for name in ("entropy", "max_probability", "margin", "patience")}
    scores = {
        **named,
        "max_probability, temperature": (net, fit_temperature(half, "max_probability")),
        "learned, own exit": (net, fit_score(half, earlier=False)),
        "learned": (net, fit_score(half)),
        "average (fitted), max_probability": (averaged(net, fit_averaging(half)), "max_probability"),
    }
    outputs = ["output_1", "output_2"]
    with tempfile.TemporaryDirectory() as folder:
        engines = {}
        for name, (network, score) in {"plain": (net, None), **scores}.items():
            flat = flatten(network, images, score=None if score is None else resolve(score))
            path = Path(folder) / f"{name}.onnx"
            wanted = outputs if score is None else [*outputs, "score_1", "score_2"]
            ir.save(assemble(flat, None, outputs=wanted), path)
            engines[name] = load(path, threads=1)
        one = images[:1].numpy()
        times = interleaved([lambda e=e: e.outputs(one) for e in engines.values()], 30.0, rounds=20_000)
    us = dict(zip(engines, times, strict=True))
    return {name: (us[name] - us["plain"]) / 2 for name in scores} | {"network": us["plain"]}


def rounded(value):
    """Round to five decimals to keep the file small."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return round(value, 5) if isinstance(value, float) else value


def main():
    torch.set_num_threads(1)
    made = list(networks())
    write_json(
        RESULTS,
        {
            "command": "python benchmarks/experiments/scores.py",
            "environment": environment(),
            "splits": list(range(SPLITS)),
            "drops": list(DROPS),
            "targets": list(TARGETS),
            "score_us": score_times(*made[1][2:]),
            "networks": rounded([one_network(*network) for network in made]),
        },
    )


if __name__ == "__main__":
    main()
