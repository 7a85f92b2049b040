"""Advice on a trained network: which exits, where, and what they will bring."""

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..arguments import check_fraction
from ..errors import FileError, InputError
from ..files import write_json
from ..graph.onnx_flat import FlatGraph, flatten
from ..nn.fingerprint import fingerprint
from ..nn.network import BranchyNet
from ..policy.digests import sketch
from ..policy.evaluation import evaluate
from ..policy.exit_record import ExitRecord
from ..policy.exit_rule import route
from ..policy.record_scores import scores_of_record
from ..policy.risk_tests import halves
from ..policy.scores import resolve
from ..policy.search import mean_cost
from ..policy.values import Z95, ExitCost, Floats, Policy
from ..profiling.recording import record
from ..profiling.target import Target, check_target
from ..stored import read_entry
from ..training.loop import fit
from ..training.options import FitOptions
from .advice import Advice, CandidateResult, Design
from .candidates import CandidateNetwork, attach_candidates
from .exit_search import CandidateScores, ExitSet, break_even, least_us, search_exit_sets
from .options import SearchOptions
from .part_times import StageTimes, time_stages, uncuttable

RESOLUTION = 0.05  # difference in accuracy that half of the validation samples must be able to show
PER_CLASS = 20  # training samples a class that branches need
ALIKE = 0.01  # of two designs that take as long but for so much, relatively, the one with fewer exits is better
RATE, DISTILL = 3e-3, 0.5
PLACES = 4  # where branches are trained on, or as many as a design may have early exits
_CLOCK = 0.03  # medians of the same calls differ by so much, relatively, between runs on a machine that does other work


def advise(
    backbone: nn.Module,
    train_loader: Any,
    val_loader: Any,
    example: Any,
    target: Target = Target(),
    *,
    max_drop: float | None = None,
    min_accuracy: float | None = None,
    num_exits: int = 4,
    run: str | os.PathLike[str] | None = None,
    progress: bool = True,
    search: SearchOptions = SearchOptions(),
    options: FitOptions = FitOptions(),
) -> Advice:
    """Find the exits that make a trained network fastest at an accuracy, and tell what they will bring.

    Branches of several sizes stand at the input and at up to eight other places. Every part is timed in the runtime as
    it will be deployed, all branches are trained side by side on the frozen network in `epochs` passes, and every set
    of exits is tried with every threshold on their recorded answers: all single exits and all pairs; of more, those
    that add to the best.

    Args:
        backbone: a trained network that gives logits `(B, C)`; it is not changed.
        train_loader: yields `(inputs, target)` with `(B,)` int64 class indices, to train branches.
        val_loader: likewise, not shuffled. Half of its samples choose the design; the others are left for the promise
            that `choose` makes on a record of all, in the same order. Not the test set.
        example: one batch of inputs, real ones if possible.
        target: the batch size, the threads and the runtime of the deployed file. The best design depends on them: for
            a batch, or on a GPU, it is another one.
        max_drop: accuracy on validation at most so far below the network's own; by default 0.
        min_accuracy: an accuracy instead.
        num_exits: the most a design may have, the network's own included.
        run: a folder for the branches' training, so that a stopped search goes on, and a search for another batch size
            trains nothing again.
        progress: show bars and tell what is being done.
        search: places to try, the score, and how long branches learn and parts are timed.
        options: as for `fit`, for the branches' training; the device also records, while what is timed runs where the
            target's runtime does.

    Returns:
        The advice; its ``network`` is the best design with branches trained so far, to be trained on with everything.

    Raises:
        InputError: an untrained network, too few samples (told how many are needed), a limit above what the network
            reaches, or an argument that does not fit.
        GraphError: a place where the network cannot be cut (the value in the way is named), or none.
    """
    say: Callable[[str], None] = partial(print, flush=True, file=sys.stderr) if progress else lambda line: None
    check_target(target)
    _check_limits(num_exits, max_drop, min_accuracy)
    validation = record(backbone, val_loader, device=options.device, progress=progress)
    alone = validation.take(halves(validation.samples)[0])
    accuracy = evaluate(alone, Policy()).accuracy
    _check_trained(alone, accuracy)
    _check_data(alone, validation.samples, accuracy, train_loader)
    limit = accuracy - (max_drop or 0.0) if min_accuracy is None else min_accuracy
    _check_reached(accuracy, limit)
    say("looking for places where exits can stand")
    torch.manual_seed(options.seed)
    forest, flat = _planted(backbone, example, search.taps, resolve(search.score))
    places = f"{len(forest.candidates)} branches at {len(forest.net.taps)} places"
    say(f"timing {places} in {target.runtime}: {search.seconds:.0f} s, after they are exported")
    times = time_stages(forest, flat, example, target, search.seconds)

    def learned(net: BranchyNet, epochs: int, name: str) -> tuple[Floats, Floats]:
        """Scores and losses `(S, N)` of a network whose branches have learned so long."""
        fit(
            net,
            train_loader,
            epochs=epochs,
            train="branches",
            distill=DISTILL,
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=RATE),
            run=None if run is None else Path(run) / name,
            progress=progress,
            options=options,
        )
        found = record(net, val_loader, device=options.device, progress=progress)
        net.cpu()
        return scores_of_record(found, search.score), found.losses.astype(np.float64)

    say(f"training {places}, {search.epochs} epochs")
    judged = CandidateScores(*learned(forest.net, search.epochs, "branches"), times.taps, times.cost)
    most = (1 - limit) * validation.samples
    best, least = search_exit_sets(judged, most, num_exits, say)
    if search.final_epochs and np.isfinite(least).any():
        name = f"final-{target.runtime}-batch-{target.batch_size}-threads-{target.threads}-{search.score}-{limit:.4f}"
        kept = _finalists(
            None if run is None else Path(run) / name / "finalists.json", judged, least, max(PLACES, num_exits - 1)
        )
        say(f"training {len(kept)} of them on, {search.final_epochs} epochs")
        scores, losses = learned(forest.of(kept), search.final_epochs, name)
        judged = judged.replaced(kept, scores[:, :-1], losses[:, :-1])
        best, _ = search_exit_sets(judged, most, num_exits, say, among=kept)
    designs = tuple(_design(forest, judged, times, one, most) for one in best)
    selected_on = _sketch(validation, judged)
    least = min(design.us for design in designs)
    fastest = next(n for n, design in enumerate(designs) if design.us <= (1 + ALIKE) * least)
    return Advice(
        **asdict(target),
        score=search.score,
        plain_us=times.plain_us,
        accuracy=accuracy,
        min_accuracy=limit,
        samples=alone.samples,
        designs=designs,
        tried=_tried(forest, judged, times),
        best=fastest,
        fingerprint=fingerprint(backbone),
        selected_on=selected_on,
        network=_selected(forest.network(best[fastest].chosen), selected_on),
    )


def _check_limits(num_exits: int, max_drop: float | None, min_accuracy: float | None) -> None:
    if num_exits < 2:
        raise InputError(f"num_exits must be at least 2, the network's own included; got {num_exits}")
    if max_drop is not None and min_accuracy is not None:
        raise InputError("give max_drop or min_accuracy, not both")
    if max_drop is not None:
        check_fraction("max_drop", max_drop)


def _check_reached(accuracy: float, limit: float) -> None:
    if limit > accuracy:
        raise InputError(
            f"the network has {accuracy:.2%} accuracy on the validation samples, less than the limit of {limit:.2%}: "
            "exits are chosen not to lose accuracy, not to gain it; ask for less, or train on"
        )


def _sketch(validation: ExitRecord, judged: CandidateScores) -> str:
    """Of the samples that chose the design; empty where they are not known."""
    known = validation.sample_digests
    return "" if known is None else sketch(known[judged.tuning])


def _selected(net: BranchyNet, known: str) -> BranchyNet:
    net.selected_on = (*net.selected_on, *filter(None, [known]))
    return net


def _finalists(path: Path | None, judged: CandidateScores, least: Floats, places: int) -> list[int]:
    """The candidates that learn on, in running order; those in a file where it is there, so that training goes on.

    At each of the places where the best sets have exits these are the branch that does best there so far, and the most
    accurate one, which is large and still has most to learn.

    Args:
        path: the file.
        judged: all candidates.
        least: `(K,)` microseconds of the best set with each.
        places: how many; as many as early exits at least, so that the best set is among them.
    """
    if path is not None and path.exists():
        kept = read_entry(path, "candidates", list[int], "design")
        if not kept or min(kept) < 0 or max(kept) >= len(judged.taps):
            raise FileError(f"{path} names candidates {kept} of {len(judged.taps)}; remove it, and design again")
        return kept
    taps, wrong = np.array(judged.taps), judged.losses[judged.tuning, :-1].mean(axis=0)
    useful = [int(i) for i in np.argsort(least, kind="stable") if np.isfinite(least[i])]
    kept = set()
    for tap in list(dict.fromkeys(taps[useful]))[:places]:
        here = [i for i in useful if taps[i] == tap]
        kept |= {here[0], min(here, key=lambda i: wrong[i])}
    if path is not None:
        write_json(path, {"candidates": sorted(kept)})
    return sorted(kept)


def _check_trained(alone: ExitRecord, accuracy: float) -> None:
    """Raises `InputError` where the network answers no better than by always naming the commonest class."""
    assert alone.labels is not None
    chance = float(np.bincount(alone.labels).max()) / alone.samples
    if accuracy <= chance + 3 * math.sqrt(chance * (1 - chance) / alone.samples):
        raise InputError(
            f"the network's accuracy on the validation samples is {accuracy:.1%}, where naming the commonest class "
            f"always gives {chance:.1%}: train it first, since where exits belong depends on what it has learned"
        )


def _check_data(alone: ExitRecord, samples: int, accuracy: float, train_loader: Any) -> None:
    """Raises `InputError` where designs could not be told apart, or branches not be trained.

    Args:
        alone: the network's record of the half of the validation samples that chooses the design.
        samples: how many validation samples there are.
        accuracy: on that record.
        train_loader: trains the branches.
    """
    needed = math.ceil(Z95**2 * max(1 - accuracy, 0.01) / RESOLUTION**2)
    if alone.samples < needed:
        raise InputError(
            f"{samples} validation samples cannot rank designs: at {accuracy:.1%} accuracy it takes {2 * needed} to "
            f"tell apart two that differ by {RESOLUTION:.0%}, on the half of them that is not left for a promise; "
            "take more validation samples (of a folder, a larger second number in split=), or train the network "
            "longer first: the more accurate it is, the fewer it takes"
        )
    assert alone.outputs is not None
    first = next(iter(train_loader), None)
    samples, needed = 0 if first is None else len(train_loader) * len(first[1]), PER_CLASS * alone.outputs.shape[2]
    if samples < needed:
        raise InputError(
            f"about {samples} training samples cannot train branches for {alone.outputs.shape[2]} classes; it takes "
            f"{needed}, {PER_CLASS} a class"
        )


def _planted(
    backbone: nn.Module, example: Any, taps: Sequence[str] | None, score: Any
) -> tuple[CandidateNetwork, FlatGraph]:
    """The forest and its graph; of places found by itself those where the graph cannot be cut are passed over."""
    forest = attach_candidates(backbone, example, taps)
    flat = flatten(forest.net, example, score=score)
    faults = uncuttable(forest, flat)
    if faults and (taps is not None or len(faults) == len(forest.net.taps)):
        raise next(iter(faults.values()))
    if faults:
        return _planted(backbone, example, [tap for tap in forest.net.taps if tap not in faults], score)
    return forest, flat


def _design(
    forest: CandidateNetwork, judged: CandidateScores, times: StageTimes, found: ExitSet, most_loss: float
) -> Design:
    problem = judged.problem(found.chosen)
    cost, samples = problem.cost, len(problem.losses)
    each = cost.latency_us([True] * cost.num_exits)
    position = route(problem.scores, found.thresholds) - 1
    counts = np.bincount(position, minlength=cost.num_exits).astype(np.float64)
    mean = float(mean_cost(counts, each, samples))
    half = Z95 * math.hypot(each[position].std() / math.sqrt(samples), max(times.spread, _CLOCK) * mean)
    chosen = [forest.candidates[i] for i in found.chosen]
    return Design(
        taps=tuple(c.tap for c in chosen),
        branches=tuple(c.branch for c in chosen),
        thresholds=found.thresholds,
        us=mean,
        interval_us=(max(mean - half, 1e-3), mean + half),
        accuracy=float(1 - problem.losses[np.arange(samples), position].mean()),
        exit_share=tuple(float(c) / samples for c in counts),
        trunk_us=cost.trunk_us,
        branch_us=cost.branch_us,
        break_even=break_even(judged, found),
        oracle_us=least_us(each, problem.losses, most_loss * samples / len(judged.losses)),
    )


def _tried(forest: CandidateNetwork, judged: CandidateScores, times: StageTimes) -> tuple[CandidateResult, ...]:
    rows = []
    for i, candidate in enumerate(forest.candidates):
        cost: ExitCost = times.cost((i,))
        early, late = cost.latency_us([True, True])
        needed = (late - times.plain_us) / (late - early) if late > early else math.inf
        rows.append(
            CandidateResult(
                tap=candidate.tap,
                branch=candidate.branch,
                depth=candidate.depth,
                accuracy=float(1 - judged.losses[judged.tuning, i].mean()),
                us=float(early),
                added_us=float(late - times.plain_us),
                break_even=max(0.0, float(needed)) if needed <= 1 else None,
            )
        )
    return tuple(rows)
