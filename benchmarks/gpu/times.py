"""Time one network in one precision on a GPU; `run.py` starts several of these and tells them when to measure.

The rows are the plain network operator by operator, recorded as CUDA graphs, and compiled and recorded; the network
with exits recorded, and compiled and recorded; and the limit: for each exit, the time of a full batch up to that exit,
compiled and recorded, without decisions, weighted with the share of the samples that leave there. Inputs are on the
GPU; a call ends when the answers are numpy arrays. Thresholds are quantiles of the scores of the batch, so that the
shares are exact. At batch 1, calls leave at the exits in turn, in the same shares.

It reads lines from stdin: ``batches DEADLINE``, ``single``, ``one DEADLINE``, ``end``; deadlines are in seconds since
1970. It answers each with a line, and after every batch writes its results so far.
"""

import argparse
import functools
import gc
import json
import math
import random
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from networks import NETWORKS, UpTo, built

from branchynet import Policy, TorchEngine, detach
from branchynet.deploy import torch_engine
from branchynet.deploy.recorded_stages import BATCH_SIZES

SHARES = {"25/25/50": (0.25, 0.25, 0.5), "75/15/10": (0.75, 0.15, 0.1)}
BATCHES = 8, 64, 256
CYCLE = 20  # calls at batch 1 in which each exit gets its share
WARM, ROUNDS, SECONDS = 3, 100, 5.0


class Subject:
    """One network in one precision: its engines and its results."""

    def __init__(self, options):
        self.name, self.precision, self.tiny = options.network, options.precision, options.rehearse
        self.device = torch.device("cpu" if options.rehearse else "cuda")
        self.path = options.out / f"{options.network.replace('/', '')}-{options.precision}.json"
        self.found = {"network": self.name, "precision": self.precision, "build_s": {}, "rows": []}
        self.batches = (4, 8) if options.rehearse else BATCHES
        self.rounds, self.seconds = (2, 1.0) if options.rehearse else (ROUNDS, SECONDS)
        self.net, self.inputs = built(self.name, self.device, tiny=self.tiny)
        self.exits = self.net.num_exits
        self.plain = detach(self.net)
        self.limits = [UpTo(self.net, n).eval() for n in range(1, self.exits + 1)]
        self.example = self.inputs(4)
        self.engines = {}

    def build(self, sizes, *, eager=True):
        """Make all engines for these batch sizes; 1 is not among the others, because it takes another compilation."""
        never = Policy(thresholds=(0.0,) * (self.exits - 1))
        plain = self.plain
        wanted = {
            "plain recorded": (plain, Policy(), {"batch_sizes": sizes}),
            "plain": (plain, Policy(), {"batch_sizes": sizes, "compile": True}),
            "ours recorded": (self.net, never, {"batch_sizes": sizes}),
            "ours": (self.net, never, {"batch_sizes": sizes, "compile": True}),
        }
        if eager:
            wanted = {"plain eager": (plain, Policy(), {"batch_sizes": ()}), **wanted}
        for n in range(1, self.exits + 1):
            wanted[f"up to {n}"] = self.limits[n - 1], Policy(), {"batch_sizes": sizes, "compile": True}
        for name, (net, policy, how) in wanted.items():
            start = time.perf_counter()
            self.engines[name] = TorchEngine(net, policy, self.example, precision=self.precision, **how)
            size = "one" if sizes == (1,) else "all"
            self.found["build_s"][f"{name}, {size}"] = round(time.perf_counter() - start, 2)
        self.write()

    def measure(self, batch):
        """Time all engines at one batch size, in turns, and write the results."""
        x = self.inputs(batch)
        calls, weights = {}, {}
        for name, engine in self.engines.items():
            if name == "plain eager" or not name.startswith("ours"):
                calls[name, ""] = [functools.partial(engine, x)]
                continue
            for share, parts in SHARES.items():
                settings, weight = self.settings(engine, x, parts)
                calls[name, share] = [functools.partial(engine, x, thresholds=one) for one in settings]
                weights[name, share] = weight
        times = timed(calls, self.rounds if batch > 1 else max(self.rounds, CYCLE), self.seconds)
        row = {"batch": batch, "difference": self.differences(x)}
        row |= {name: summary(found) for (name, share), found in times.items() if not share}
        row["shares"] = {share: self.shared(share, times, weights) for share in SHARES}
        if self.device.type == "cuda":
            row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.found["rows"].append(row)
        self.write()
        print(json.dumps({"network": self.name, "precision": self.precision, **row}), file=sys.stderr, flush=True)

    def settings(self, engine, x, parts):
        """Return a cycle of thresholds, at batch 1 one per call, and the share of samples that leave at each exit."""
        if len(x) == 1:
            forced = [[math.inf if k == n else None for k in range(1, self.exits)] for n in range(1, self.exits + 1)]
            counts = [round(CYCLE * part) for part in parts]
            return [one for one, count in zip(forced, counts, strict=True) for _ in range(count)], parts
        left, thresholds = np.ones(len(x), bool), [None] * (self.exits - 1)
        ends = np.round(np.cumsum(parts) * len(x)).astype(int)
        for k, end in enumerate(ends[:-1]):
            scores = engine(x, thresholds=[*thresholds[:k], math.inf, *thresholds[k + 1 :]]).score
            ordered, leave = np.sort(scores[left]), end - (len(x) - left.sum())
            if leave <= 0:
                continue
            edge = math.inf if leave == len(ordered) else float(ordered[leave - 1 : leave + 1].astype(float).mean())
            thresholds[k] = edge
            left = engine(x, thresholds=[*thresholds[: k + 1], *[None] * (self.exits - 2 - k)]).exit > k + 1
        exits = engine(x, thresholds=thresholds).exit
        return [thresholds], [float((exits == n).mean()) for n in range(1, self.exits + 1)]

    def shared(self, share, times, weights):
        """The times of the engines with exits, and their ratios to the limit and to the plain network."""
        part = {}
        for name in ("ours recorded", "ours"):
            weight, found = weights[name, share], times[name, share]
            limit = sum(w * middle(times[f"up to {n}", ""]) for n, w in enumerate(weight, 1))
            own = statistics.fmean(statistics.median(f) for f in found)  # at batch 1, one list per call of the cycle
            part[name] = {
                **summary(found),
                "ms": round(1e3 * own, 4),
                "leave": [round(w, 4) for w in weight],
                "limit_ms": round(1e3 * limit, 4),
                "to_limit": round(own / limit, 3),
                "to_plain": round(own / middle(times["plain", ""]), 3),
                "limit_to_plain": round(limit / middle(times["plain", ""]), 3),
            }
        return part

    def differences(self, x):
        """The largest difference between outputs with exits and those of each exit alone, relative to the largest."""
        worst = {}
        for n in range(1, self.exits + 1):
            alone = self.engines[f"up to {n}"](x).output
            forced = [math.inf if k == n else None for k in range(1, self.exits)]
            for name in ("ours recorded", "ours"):
                answer = self.engines[name](x, thresholds=forced)
                if (answer.exit != n).any():
                    raise SystemExit(f"{self.name}, {name}: samples left at {set(answer.exit.tolist())} instead of {n}")
                worst[f"{name}, exit {n}"] = float(np.abs(answer.output - alone).max() / np.abs(alone).max())
        return {name: float(f"{value:.2g}") for name, value in worst.items()}

    def write(self):
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")


def share_graphs():
    """Let the engines of one network share its exported graph: exporting takes longer than the rest of making one."""
    for make in (torch_engine.in_precision, torch_engine.cut_stages):
        setattr(torch_engine, make.__name__, functools.partial(_once, make, {}))


def _once(make, known, net, example, *how):
    key = id(net), repr(how)
    if key not in known:
        known[key] = make(net, example, *how), net  # which keeps its id
    return known[key][0]


def timed(calls, rounds, seconds):
    """Return the seconds of each call, called in turns in random order."""
    for options in calls.values():
        for call in options:
            for _ in range(WARM):
                call()
    times = {name: [[] for _ in options] for name, options in calls.items()}
    order, start = list(calls), time.perf_counter()
    gc.collect()
    gc.disable()
    for turn in range(rounds):
        random.shuffle(order)
        for name in order:
            place = turn % len(calls[name])
            began = time.perf_counter()
            calls[name][place]()
            times[name][place].append(time.perf_counter() - began)
        if time.perf_counter() - start > seconds and turn >= CYCLE:
            break
    gc.enable()
    return times


def middle(found):
    return statistics.median([t for times in found for t in times])


def summary(found):
    """Percentiles in milliseconds."""
    values = np.array([t for times in found for t in times]) * 1e3
    return {f"p{p}_ms": round(float(np.percentile(values, p)), 4) for p in (50, 95, 99)} | {"calls": len(values)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, required=True)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true", help="tiny networks on the CPU, without inductor")
    options = parser.parse_args()
    if options.rehearse:
        torch.set_num_threads(1)
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    share_graphs()
    subject = Subject(options)
    subject.build((2, 4, 8) if options.rehearse else [size for size in BATCH_SIZES if size > 1])
    print("ready", flush=True)
    for line in sys.stdin:
        order, *deadline = line.split()
        if order == "end":
            return
        if order == "single":
            subject.engines.clear()
            subject.build((1,))
        else:
            for batch in subject.batches if order == "batches" else (1,):
                if time.time() < float(deadline[0]):
                    subject.measure(batch)
                else:
                    subject.found.setdefault("skipped", []).append(f"batch {batch}: no time was left")
            subject.write()
        print("done", flush=True)


if __name__ == "__main__":
    main()
