"""The steps that fill a run folder: train, choose, export and bench.

Every file is readable by hand or with a standard tool, and is written atomically::

    config.json           the settings and the machine
    warm-start/           the plain network, trained first
    plain/                the plain network, trained for as many more epochs as the exits, to compare with
    checkpoint.safetensors, training.safetensors, train.csv
    data.json             digests of the training, validation and test images
    record-val.npz, record-test.npz, record-plain.npz
    cost.json, choice.json, model.onnx, bench.json, report.html, tradeoff.png
    design-N/             another run, with the exits that `branchynet design` found for batches of N
"""

import contextlib
import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import ImageData, loader
from ..deploy.exporting import export
from ..deploy.onnx_file import model_metadata
from ..errors import BranchyNetError, InputError, counted
from ..files import locked
from ..nn.fingerprint import fingerprint
from ..nn.network import BranchyNet
from ..policy.choosing import check_call, choose
from ..policy.evaluation import evaluate
from ..policy.exit_cost import ExitCost
from ..policy.exit_record import ExitRecord
from ..policy.risk_tests import halves
from ..policy.score_fitting import fit_score
from ..policy.scores import SCORES, resolve
from ..policy.values import Choice, Policy, score_name
from ..profiling.benchmark import bench
from ..profiling.cost import measure
from ..profiling.recording import record
from ..profiling.target import Target
from ..progress import report_progress
from ..training.loop import fit
from ..training.options import FitOptions
from ..zoo import NETWORKS
from .provenance import check_choice, check_data, check_design, check_model, keep_bench, keep_data
from .run import EVAL_BATCH, Run, configure, load_run, loaders
from .settings import Settings, build_network, data_of, example_of


def train_run(run: Run, *, progress: bool = True) -> BranchyNet:
    """Train the warm start, the plain network and all exits, then record them; resumes if it was interrupted.

    Raises `FileError` if another process is training in the folder.
    """
    settings = run.settings
    data = data_of(settings)
    torch.manual_seed(settings.seed)
    net = build_network(settings, data)
    report_progress(progress, str(data))
    first = os.environ.get("RANK", "0") == "0"  # in distributed training, one process locks the folder
    with locked(run.path) if first else contextlib.nullcontext():
        check_data(run.path, data)
        configure(run)
        keep_data(run.path, data)
        if settings.warm_start_epochs:
            fit_in(run, "warm-start", net.backbone, data, settings.warm_start_epochs, settings.seed, progress)
        plain = copy.deepcopy(net.backbone)
        if settings.plain:
            fit_in(run, "plain", plain, data, settings.epochs, settings.seed + 1, progress)
        train_exits(run, net, data, progress)
        record(plain, loader(data.test, EVAL_BATCH), progress=False).save(run.path / "record-plain.npz")
        return net


def train_exits(run: Run, net: BranchyNet, data: ImageData, progress: bool) -> None:
    """Train all exits of `net` jointly and record them; resumes if it was interrupted."""
    settings = run.settings
    more = {"loss_weights": settings.loss_weights or None, "train": settings.train, "distill": settings.distill}
    fit_in(run, ".", net, data, settings.epochs, settings.seed + 1, progress, **more)
    report_progress(progress, "recording the outputs of every exit")
    for name, split in (("val", data.val), ("test", data.test)):
        found = record(net, loader(split, EVAL_BATCH), progress=False)
        found.save(run.path / f"record-{name}.npz")
        for old in run.path.glob("cost*.json"):  # costs of earlier weights; `measure_run` measures again on demand
            if ExitCost.load(old).network != found.network:
                old.unlink(missing_ok=True)


def fit_in(
    run: Run, folder: str, network: nn.Module, data: ImageData, epochs: int, seed: int, progress: bool, **more: Any
) -> None:
    """Train one network of a run, with its state in a subfolder; `more` are arguments of `fit`."""
    settings = run.settings
    what = "all exits" if folder == "." else f"the plain network ({folder})"
    report_progress(progress, f"training {what}: {counted(epochs, 'epoch')} of {len(data.train)} images")
    train, val = loaders(settings, data)
    fit(
        network,
        train,
        val,
        epochs=epochs,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=settings.lr),
        run=run.path / folder,
        progress=progress,
        options=fit_options(settings, seed),
        **more,
    )


def fit_options(settings: Settings, seed: int) -> FitOptions:
    """The options of `fit` for networks of a run."""
    channels_last = settings.network in NETWORKS  # a user's network may use `view`
    return FitOptions(
        seed=seed,
        mixed_precision=settings.mixed_precision,
        channels_last=channels_last,
        compile=settings.compile,
    )


def measure_run(run: Run, score: Any = "entropy", *, again: bool = False, progress: bool = False) -> ExitCost:
    """Load the cost of every stage with a score, at batch 1 and one thread; if there is none or `again`, measure it.

    The file is ``cost.json``, or ``cost-NAME.json`` for a score other than entropy.
    """
    name = score_name(score)
    path = run.path / ("cost.json" if name == "entropy" else f"cost-{name}.json")
    if path.exists() and not again:
        return ExitCost.load(path)
    net, data = load_run(run)
    report_progress(progress, "measuring the cost of every stage until the times are steady (up to a minute)")
    cost = measure(net, example_of(data), score=score, progress=False)
    cost.save(path)
    return cost


def choose_run(
    run: Run, *, score: str | None = None, remeasure: bool = False, progress: bool = False, **constraint: Any
) -> Choice:
    """Choose thresholds on the validation record and write ``choice.json``. Arguments as in `choose`.

    `score` may also be ``"learned"`` (see `fit_score`). It is fitted on the half of the samples on which `choose`
    searches; the promise is tested on the other half. Without a promise, thresholds are chosen on the other half.
    """
    found = ExitRecord.load(run.file("record-val.npz", "train"))
    if score not in (None, "learned", *SCORES):
        raise InputError(f"unknown score {score!r}: it is one of {', '.join([*SCORES, 'learned'])}")
    wanted: Any = "entropy" if score is None else score
    if wanted != "learned":
        resolve(wanted)
    if check_call(found, **constraint):
        check_design(run.path)
    if wanted == "learned":
        tuning, rest = halves(found.samples)
        wanted = fit_score(found.take(tuning))
        if constraint.get("confidence", 0.95) is None:
            found = found.take(rest)
    cost = measure_run(run, wanted, again=remeasure, progress=progress)
    choice = choose(found, cost, score=wanted, **constraint)
    choice.save(run.path / "choice.json")
    return choice


def export_run(run: Run, path: Path | None = None, *, progress: bool = False, **options: Any) -> Path:
    """Export ``model.onnx``, or the folder ``stages``, with the chosen thresholds; `options` as in `export`."""
    choice = Choice.load(run.file("choice.json", "choose"))
    net, data = load_run(run)
    check_choice(run.path, choice, fingerprint(net))
    report_progress(progress, "exporting, and comparing the file with PyTorch")
    return export(
        net,
        path or run.path / ("stages" if options.get("layout") == "stages" else "model.onnx"),
        policy=choice,
        example=example_of(data),
        labels=data.classes,
        preprocessing=data.preprocessing,
        **options,
    )


def bench_run(
    run: Run,
    *,
    batches: Sequence[int],
    threads: Sequence[int],
    runtimes: Sequence[Any] = ("onnxruntime",),
    progress: bool = True,
) -> tuple[list[dict[str, Any]], dict[str, BranchyNetError]]:
    """Time ``model.onnx`` and the plain network in each runtime, and write ``bench.json`` after each.

    Returns the rows, and the error of each runtime that failed. If every runtime failed, raises the first one's error.
    """
    targets = {name: [[Target(size, count, name) for size in batches] for count in threads] for name in runtimes}
    if not (runtimes and batches and threads):
        raise InputError("give at least one batch size, one number of threads and one runtime")
    model = run.file("model.onnx", "export")
    check_model(run.path, model_metadata(model))
    net, data = load_run(run)
    check_data(run.path, data, ["test"])
    test = data.test.inputs(), data.test.labels
    plain = ExitRecord.load(run.file("record-plain.npz", "train"))
    accuracy = evaluate(plain, Policy()).accuracy if run.settings.plain_epochs else None
    about = {"network": run.settings.network, "plain_accuracy": accuracy}
    rows, faults = [], {}
    for runtime, groups in targets.items():
        try:
            for group in groups:
                rows += bench(
                    model,
                    net,
                    test,
                    group,
                    about=about,
                    progress=progress,
                )
        except BranchyNetError as error:
            faults[runtime] = error
        if rows:
            keep_bench(run.path, rows)
    if not rows:
        raise next(iter(faults.values()))
    return rows, faults
