"""Find the exits that make a trained network fastest."""

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

from ..argument_checks import check_fraction
from ..errors import FileError, InputError
from ..files import check_folder, write_json
from ..nn.checks import check_loader, check_train_loader
from ..nn.fingerprint import fingerprint
from ..nn.network import BranchyNet
from ..policy.evaluation import evaluate
from ..policy.exit_record import ExitRecord
from ..policy.exit_rule import route
from ..policy.explanation import chance
from ..policy.record_scores import scores_of_record
from ..policy.risk_tests import halves
from ..policy.sample_digests import sketch
from ..policy.scores import resolve
from ..policy.search import mean_cost
from ..policy.values import Z95, Floats, Policy
from ..profiling.network_parts import device_name, network_parts
from ..profiling.parts import Parts
from ..profiling.recording import record
from ..profiling.target import Target, check_target
from ..stored_values import read_entry
from ..training.loop import fit
from ..training.options import FitOptions
from .advice import Advice, CandidateResult, Design
from .candidates import CandidateNetwork, attach_candidates
from .exit_search import CandidateScores, ExitSet, break_even, least_us, search_exit_sets
from .options import SearchOptions
from .part_times import StageTimes, time_stages, uncuttable

RESOLUTION = 0.05  # smallest difference in accuracy that half of the validation samples must show
PER_CLASS = 20  # training samples per class that branches need
ALIKE = 0.01  # relative difference in time below which fewer exits are better
LR, DISTILL = 3e-3, 0.5
PLACES = 4  # places for further training, unless a design may have more early exits
_CLOCK = 0.03  # relative difference of medians between runs on a busy machine


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
    """Find the exits that make a trained network fastest at an accuracy, and predict their times.

    `advise` attaches branches of several sizes at the input and at up to eight other places, times every part in the
    target's runtime, and trains all branches together on the frozen network. On the recorded outputs, it tries sets of
    exits with every threshold: all single exits, all pairs, and larger sets that extend the best ones.

    Args:
        backbone: a trained network that gives logits `(B, C)`; it is not changed.
        train_loader: yields `(inputs, target)` with `(B,)` int64 class indices, to train branches.
        val_loader: yields validation samples in the same form, not shuffled; not the test set. One half is used to
            choose the design; the other is left for the promise of `choose` on a record of all samples in this order.
        example: one batch of inputs, real ones if possible.
        target: the batch size, the threads and the runtime, on which the best design depends.
        max_drop: largest loss of validation accuracy against the network without exits; by default 0.
        min_accuracy: smallest validation accuracy; give it instead of `max_drop`.
        num_exits: the largest number of exits of a design, including the network's own.
        run: a folder for the training of the branches: a stopped search resumes, and a search for another target
            uses the same branches.
        progress: show progress bars and messages.
        search: places to try, the score, and the duration of training and timing.
        options: options of `fit` for the branches; the device also records.

    Returns:
        The advice. Its ``network`` is the best design, with branches trained on the frozen network; train it further
        with `fit`.

    Raises:
        InputError: an untrained network, too few samples (the message says how many are needed), a limit above the
            network's accuracy, or an argument that does not fit.
        GraphError: no place where the network can be cut, or a given place where it cannot; the message names the
            value that prevents it.

    Example:
        >>> import torch
        >>> from branchynet import SearchOptions, advise
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False))
        >>> x = torch.randn(256, 4)
        >>> loader = [(x, net(x).argmax(dim=1))]
        >>> search = SearchOptions(epochs=1, taps=["0"], seconds=0.1)
        >>> print(advise(net, loader, loader, x, search=search, progress=False))
        Do not bother: ...
    """
    say: Callable[[str], None] = partial(print, flush=True, file=sys.stderr) if progress else lambda line: None
    check_target(target)
    _check(train_loader, val_loader, num_exits, max_drop, min_accuracy, run)
    validation = record(backbone, val_loader, device=options.device, progress=progress)
    alone = validation.take(halves(validation.samples)[0])
    accuracy = evaluate(alone, Policy()).accuracy
    _check_trained(alone, accuracy)
    limit = accuracy - (max_drop or 0.0) if min_accuracy is None else min_accuracy
    _check_data(alone, validation.samples, accuracy, limit, train_loader)
    say("looking for places for exits")
    torch.manual_seed(options.seed)
    pool, parts = _candidate_pool(backbone, example, search.taps, resolve(search.score), target)
    places = f"{len(pool.candidates)} branches at {len(pool.net.taps)} places"
    say(f"timing {places} in {target.runtime}: {search.seconds:.0f} s, after the export")
    times = time_stages(pool, parts, example, target, search.seconds)

    def learned(net: BranchyNet, epochs: int, name: str) -> tuple[Floats, Floats]:
        """Train the branches of a network, and return its scores and losses `(S, N)`."""
        fit(
            net,
            train_loader,
            epochs=epochs,
            train="branches",
            distill=DISTILL,
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=LR),
            run=None if run is None else Path(run) / name,
            progress=progress,
            options=options,
        )
        found = record(net, val_loader, device=options.device, progress=progress)
        net.cpu()
        return scores_of_record(found, search.score), found.losses.astype(np.float64)

    say(f"training {places}, {search.epochs} epochs")
    recorded = CandidateScores(*learned(pool.net, search.epochs, "branches"), times.taps, times.cost)
    most = (1 - limit) * validation.samples
    best, least = search_exit_sets(recorded, most, num_exits, say)
    if search.final_epochs and np.isfinite(least).any():
        name = f"final-{target.runtime}-batch-{target.batch_size}-threads-{target.threads}-{search.score}-{limit:.4f}"
        path = None if run is None else Path(run) / name / "finalists.json"
        kept = _finalists(path, recorded, least, max(PLACES, num_exits - 1))
        say(f"training {len(kept)} of them further, {search.final_epochs} epochs")
        scores, losses = learned(pool.of(kept), search.final_epochs, name)
        recorded = recorded.replaced(kept, scores[:, :-1], losses[:, :-1])
        best, _ = search_exit_sets(recorded, most, num_exits, say, among=kept)
    designs = tuple(_design(pool, recorded, times, one, most) for one in best)
    fastest = next(n for n, d in enumerate(designs) if d.us <= (1 + ALIKE) * min(design.us for design in designs))
    network, known = pool.network(best[fastest].chosen), validation.sample_digests
    selected_on = "" if known is None else sketch(known[recorded.tuning])
    network.selected_on = (*network.selected_on, *filter(None, [selected_on]))
    return Advice(
        **asdict(target),
        device=device_name(target),
        score=search.score,
        plain_us=times.plain_us,
        accuracy=accuracy,
        min_accuracy=limit,
        samples=alone.samples,
        designs=designs,
        tried=_tried(pool, recorded, times),
        best=fastest,
        fingerprint=fingerprint(backbone),
        selected_on=selected_on,
        network=network,
    )


def _check(
    train_loader: Any,
    val_loader: Any,
    num_exits: int,
    max_drop: float | None,
    min_accuracy: float | None,
    run: str | os.PathLike[str] | None,
) -> None:
    check_train_loader(train_loader)
    check_loader("val_loader", val_loader, again=True)
    if num_exits < 2:
        raise InputError(f"num_exits must be at least 2, the network's own included; got {num_exits}")
    if max_drop is not None and min_accuracy is not None:
        raise InputError("give max_drop or min_accuracy, not both")
    check_fraction("max_drop", max_drop or 0.0)
    if run is not None:
        check_folder(run)


def _finalists(path: Path | None, recorded: CandidateScores, least: Floats, places: int) -> list[int]:
    """Return the candidates to train further, in running order. A file keeps them, so that training can resume.

    For each of the `places` in the best sets, these are the branch of the fastest set and the most accurate branch,
    which is large and gains most from training. `least` holds the microseconds of the best set with each candidate.
    """
    if path is not None and path.exists():
        kept = read_entry(path, "candidates", list[int], "design")
        if not kept or min(kept) < 0 or max(kept) >= len(recorded.taps):
            raise FileError(f"{path} names candidates {kept} of {len(recorded.taps)}; remove it and design again")
        return kept
    taps, wrong = np.array(recorded.taps), recorded.losses[recorded.tuning, :-1].mean(axis=0)
    useful = [int(i) for i in np.argsort(least, kind="stable") if np.isfinite(least[i])]
    kept = set()
    for tap in list(dict.fromkeys(taps[useful]))[:places]:
        here = [i for i in useful if taps[i] == tap]
        kept |= {here[0], min(here, key=lambda i: wrong[i])}
    if path is not None:
        write_json(path, {"candidates": sorted(kept)})
    return sorted(kept)


def _check_trained(alone: ExitRecord, accuracy: float) -> None:
    """Raise `InputError` if the network is no more accurate than always predicting the most common class."""
    assert alone.labels is not None
    most = chance(alone.labels)
    if accuracy <= most.limit:
        raise InputError(
            f"the network's accuracy on the validation samples is {accuracy:.1%}, and always predicting the most "
            f"common class gives {most.share:.1%}: train it longer, because the best exits depend on what it learns"
        )


def _check_data(alone: ExitRecord, samples: int, accuracy: float, limit: float, train_loader: Any) -> None:
    """Raise `InputError` for too few validation `samples` or training samples, or an accuracy below the limit."""
    needed = math.ceil(Z95**2 * max(1 - accuracy, 0.01) / RESOLUTION**2)
    if alone.samples < needed:
        raise InputError(
            f"{samples} validation samples cannot rank designs: at {accuracy:.1%} accuracy, {2 * needed} are needed to "
            f"distinguish designs that differ by {RESOLUTION:.0%}, because half of them are left for a promise; give "
            "more validation samples (for a folder, a larger second number in split=); a more accurate network needs "
            "fewer: train it longer"
        )
    assert alone.outputs is not None
    first = next(iter(train_loader), None)
    samples, needed = 0 if first is None else len(train_loader) * len(first[1]), PER_CLASS * alone.outputs.shape[2]
    if samples < needed:
        raise InputError(
            f"about {samples} training samples cannot train branches for {alone.outputs.shape[2]} classes; give at "
            f"least {needed}, {PER_CLASS} per class"
        )
    if limit > accuracy:
        raise InputError(
            f"the network has {accuracy:.2%} accuracy on the validation samples, less than the limit of {limit:.2%}: "
            "exits do not gain accuracy; lower the limit, or train it longer"
        )


def _candidate_pool(
    backbone: nn.Module, example: Any, taps: Sequence[str] | None, score: Any, target: Target
) -> tuple[CandidateNetwork, Parts]:
    """Return all candidates on the trunk, and their parts, without places where it cannot be cut, unless given."""
    pool = attach_candidates(backbone, example, taps)
    parts = network_parts(pool.net, example, score, target, "float32", None)
    faults = uncuttable(pool, parts)
    if faults and (taps is not None or len(faults) == len(pool.net.taps)):
        raise next(iter(faults.values()))
    if faults:
        return _candidate_pool(backbone, example, [tap for tap in pool.net.taps if tap not in faults], score, target)
    return pool, parts


def _design(
    pool: CandidateNetwork, recorded: CandidateScores, times: StageTimes, found: ExitSet, most_loss: float
) -> Design:
    problem = recorded.problem(found.chosen)
    cost, samples = problem.cost, len(problem.losses)
    each = cost.latency_us([True] * cost.num_exits)
    position = route(problem.scores, found.thresholds) - 1
    counts = np.bincount(position, minlength=cost.num_exits).astype(np.float64)
    mean = float(mean_cost(counts, each, samples))
    half = Z95 * math.hypot(each[position].std() / math.sqrt(samples), max(times.spread, _CLOCK) * mean)
    chosen = [pool.candidates[i] for i in found.chosen]
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
        break_even=break_even(recorded, found),
        oracle_us=least_us(each, problem.losses, most_loss * samples / len(recorded.losses)),
    )


def _tried(pool: CandidateNetwork, recorded: CandidateScores, times: StageTimes) -> tuple[CandidateResult, ...]:
    rows = []
    for i, candidate in enumerate(pool.candidates):
        early, late = times.cost((i,)).latency_us([True, True])
        needed = (late - times.plain_us) / (late - early) if late > early else math.inf
        rows.append(
            CandidateResult(
                **vars(candidate),
                accuracy=float(1 - recorded.losses[recorded.tuning, i].mean()),
                us=float(early),
                added_us=float(late - times.plain_us),
                break_even=max(0.0, float(needed)) if needed <= 1 else None,
            )
        )
    return tuple(rows)
