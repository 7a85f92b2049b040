"""A run folder and the steps that fill it: train, choose, export, bench, report.

Every file is readable by hand or by a standard tool; each is written whole or not at all::

    config.json           what was asked for, and on what machine
    baseline/             the plain network, trained first: the warm start
    static/               the plain network, trained on for as many epochs as the branches: what we are compared with
    checkpoint.safetensors, training.safetensors, train.csv
    data.json             digests of the images that it was trained, chosen and tested on
    record-val.npz, record-test.npz, record-static.npz
    cost.json, choice.json, model.onnx, bench.json, report.html, tradeoff.png
    design-N/             another run, of the exits that `branchynet design` found best for batches of N
"""

import contextlib
import copy
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .bench import bench
from .choosing import check_call, choose
from .cost import measure
from .data import ImageData, loader
from .data.sets import FOLDER
from .decide import evaluate
from .engine.exported import model_metadata
from .engine.onnx import RUNTIMES
from .errors import BranchyNetError, FileError, InputError, counted, nearest
from .exit_record import ExitRecord
from .export import export
from .files import check_folder, locked, write_json
from .fingerprint import fingerprint
from .fitting import fit_score
from .guarantee import halves
from .machine import environment
from .net import BranchyNet
from .provenance import check_choice, check_data, check_design, check_model, keep_bench, keep_data
from .record import record
from .scores import resolve
from .settings import AUGMENTS, Settings, build_network, check_settings, data_of, example_of
from .stored import read_entry
from .training.checkpoint import load_weights
from .training.history import History
from .training.train import fit
from .trust import check_trust, remember
from .types import Choice, ExitCost, Policy, score_name
from .zoo import NETWORKS

EVAL_BATCH = 500
_MAY_GROW = ("epochs", "static")


@dataclass(frozen=True)
class Run:
    """A run folder and the settings that made it."""

    path: Path
    settings: Settings

    def file(self, name: str, made_by: str) -> Path:
        """The path of one of its files. Raises `FileError`, naming the command that makes it, where it is not there."""
        path = self.path / name
        if not path.is_file():
            raise FileError(f"{self.path} has no {name} yet; run `branchynet {made_by} {self.path}` first")
        return path


def open_run(path: str | os.PathLike[str], *, trust: bool = False) -> Run:
    """The run in a folder.

    Args:
        path: the folder.
        trust: let the function run that the folder names as its network, if it names one; this is remembered. A folder
            that this user made here needs no trust, until it is moved or copied, or the function's module changes in
            the current folder. In a folder from elsewhere the function may do anything.

    Raises:
        FileError: the folder holds no run.
        InputError: the folder names a function, is not trusted to run it, and `trust` is not given.
    """
    settings = _settings_in(path)
    if ":" in settings.network:
        check_trust(path, settings.network, trust)
    return Run(Path(path), settings)


def _settings_in(path: str | os.PathLike[str]) -> Settings:
    """The settings that a folder holds. Raises `FileError`."""
    check_folder(path)
    config = Path(path) / "config.json"
    if not config.is_file():
        raise FileError(f"{path} is no run folder (it has no config.json); make one with `branchynet train {path}`")
    return read_entry(config, "settings", Settings, f"`branchynet train {path}`")


def create_run(path: str | os.PathLike[str], settings: Settings) -> Run:
    """A run to be trained in a folder: a new one, or what is there with the same settings. Writes nothing yet.

    A run that has not trained an epoch may be given other settings. One that has may be given more epochs, a plain
    network to compare with, and the new place of a folder of images that has moved.

    Raises:
        InputError: the folder holds a run that trained with other settings, or a setting is out of range.
        DataError: the settings name a folder of images that is not there.
    """
    check_settings(settings)
    check_folder(path)
    settings = settings.placed
    if (Path(path) / "config.json").exists() and _trained(Path(path)):
        made = asdict(_settings_in(path))
        if made["data"].startswith(FOLDER) and settings.data.startswith(FOLDER):
            made["data"] = settings.data  # it may have moved: `check_data` compares the images themselves
        other = [
            f"{k} {made[k]!r}, not {v!r}"
            for k, v in asdict(settings).items()
            if made[k] != v and not (k in _MAY_GROW and v > made[k])
        ]
        if other:
            raise InputError(
                f"{path} was trained with {'; '.join(other)}: use these settings, or another folder (a trained run "
                "takes more epochs, but no other change)"
            )
    return Run(Path(path), settings)


def _trained(path: Path) -> bool:
    """Whether a folder holds an epoch of training."""
    histories = (path / part / "train.csv" for part in (".", "baseline", "static"))
    return any(History.load(file).rows for file in histories if file.exists())


def configure(run: Run) -> None:
    """Write the configuration of a run that is about to train, where it is another than the folder's."""
    if ":" in run.settings.network:
        remember(run.path, run.settings.network)
    if not _trained(run.path) or _settings_in(run.path) != run.settings:
        write_json(run.path / "config.json", {"settings": asdict(run.settings), "environment": environment()})


def train_run(run: Run, *, progress: bool = True) -> BranchyNet:
    """Train the baseline, the static network and all exits together, then record; goes on where it was stopped.

    Raises:
        FileError: another process is training in the folder.
    """
    settings = run.settings
    data = data_of(settings)
    torch.manual_seed(settings.seed)
    net = build_network(settings, data)
    tell(progress, str(data))
    first = os.environ.get("RANK", "0") == "0"  # of the processes that train together, one locks
    with locked(run.path) if first else contextlib.nullcontext():
        check_data(run.path, data)
        configure(run)
        keep_data(run.path, data)
        if settings.baseline_epochs:
            fit_in(run, "baseline", net.backbone, data, settings.baseline_epochs, settings.seed, progress)
        static = copy.deepcopy(net.backbone)
        if settings.static:
            fit_in(run, "static", static, data, settings.epochs, settings.seed + 1, progress)
        train_exits(run, net, data, progress)
        record(static, loader(data.test, EVAL_BATCH), progress=False).save(run.path / "record-static.npz")
        return net


def train_exits(run: Run, net: BranchyNet, data: ImageData, progress: bool) -> None:
    """Train all exits of `net` together as the settings say, and record them; goes on where it was stopped."""
    settings = run.settings
    more = {"weights": settings.weights or None, "train": settings.train, "distill": settings.distill}
    fit_in(run, ".", net, data, settings.epochs, settings.seed + 1, progress, **more)
    tell(progress, "recording what every exit answers")
    for name, split in (("val", data.val), ("test", data.test)):
        found = record(net, loader(split, EVAL_BATCH), progress=False)
        found.save(run.path / f"record-{name}.npz")
        for old in run.path.glob("cost*.json"):  # costs of the weights before these are measured anew when asked for
            if ExitCost.load(old).network != found.network:
                old.unlink(missing_ok=True)


def tell(progress: bool, line: str) -> None:
    """Say on standard error what begins now, in a log file as soon as on a terminal."""
    if progress:
        print(line, file=sys.stderr, flush=True)


def fit_in(
    run: Run, folder: str, network: nn.Module, data: ImageData, epochs: int, seed: int, progress: bool, **more: Any
) -> None:
    """One training of a run, its state in a folder of the run's; `more` as `fit` takes it."""
    settings = run.settings
    what = "all exits" if folder == "." else f"the plain network ({folder})"
    tell(progress, f"training {what}: {counted(epochs, 'epoch')} of {len(data.train)} images")
    train, val = loaders(settings, data)
    fit(
        network,
        train,
        val,
        epochs=epochs,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=settings.rate),
        seed=seed,
        mixed_precision=settings.mixed_precision,
        channels_last=settings.network in NETWORKS,  # a network of the user's may not bear it
        run=run.path / folder,
        progress=progress,
        **more,
    )


def loaders(settings: Settings, data: ImageData) -> tuple[Any, Any]:
    """What trains, augmented and shuffled, and what validates."""
    augment = AUGMENTS[settings.augment]
    return loader(data.train, settings.batch_size, shuffle=True, augment=augment), loader(data.val, EVAL_BATCH)


def load_run(run: Run) -> tuple[BranchyNet, ImageData]:
    """The trained network of a run, and its data."""
    weights = run.file("checkpoint.safetensors", "train")
    data = data_of(run.settings)
    net = build_network(run.settings, data)
    load_weights(net, weights)
    return net.eval(), data


def measure_run(run: Run, score: Any = "entropy", *, again: bool = False, progress: bool = False) -> ExitCost:
    """The cost of every stage, with that score, at batch 1 and one thread: measured once, and kept.

    In ``cost.json``, or for a score other than entropy in ``cost-NAME.json``; `again` measures anew.
    """
    name = score_name(score)
    path = run.path / ("cost.json" if name == "entropy" else f"cost-{name}.json")
    if path.exists() and not again:
        return ExitCost.load(path)
    net, data = load_run(run)
    tell(progress, "measuring what every stage costs, until the times are steady: seconds, or a minute")
    cost = measure(net, example_of(data), score=score)
    cost.save(path)
    return cost


def choose_run(
    run: Run, *, score: str | None = None, remeasure: bool = False, progress: bool = False, **constraint: Any
) -> Choice:
    """Choose thresholds on the validation record; writes ``choice.json``. Arguments as in `choose`.

    `score` may also be ``"learned"`` (see `fit_score`): it is fitted on the half of the samples that finds candidates,
    and a promise is tested on the other; without a promise the thresholds are chosen on the other.
    """
    found = ExitRecord.load(run.file("record-val.npz", "train"))
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
    """Write ``model.onnx`` with the chosen thresholds; `options` as in `export`."""
    choice = Choice.load(run.file("choice.json", "choose"))
    net, data = load_run(run)
    check_choice(run.path, choice, fingerprint(net))
    limit, value = next(iter(choice.constraint.items()))
    told = f"none; chosen for {limit} {value:g} on {choice.outcome.samples} validation samples"
    tell(progress, "exporting, and comparing the file with PyTorch")
    return export(
        net,
        path or run.path / "model.onnx",
        policy=choice,
        example=example_of(data),
        labels=data.classes,
        preprocessing=data.preprocessing,
        promise=told if choice.promise is None else None,
        **options,
    )


def bench_run(
    run: Run,
    *,
    batches: Sequence[int],
    threads: Sequence[int],
    engines: Sequence[Any] = ("onnxruntime",),
    progress: bool = True,
) -> tuple[list[dict[str, Any]], dict[str, BranchyNetError]]:
    """Time ``model.onnx`` beside the static network, in one engine after the other; ``bench.json`` grows with each.

    Returns:
        The rows; and for each engine that failed, why.

    Raises:
        InputError: an unknown engine.
        BranchyNetError: what the first engine failed for, where all did.
    """
    for name in engines:
        if name not in RUNTIMES:
            raise InputError(f"unknown engine {name!r}{nearest(name, RUNTIMES)}")
    if not (engines and batches and threads):
        raise InputError("give one batch size, one number of threads and one engine at least")
    model = run.file("model.onnx", "export")
    check_model(run.path, model_metadata(model))
    net, data = load_run(run)
    check_data(run.path, data, ["test"])
    images, labels = data.test.inputs(), data.test.labels
    plain = ExitRecord.load(run.file("record-static.npz", "train"))
    accuracy = evaluate(plain, Policy()).accuracy if run.settings.plain_epochs else None
    rows, faults = [], {}
    for runtime in engines:
        try:
            for count in threads:
                rows += bench(
                    model,
                    net,
                    images,
                    labels,
                    network=run.settings.network,
                    accuracy_static=accuracy,
                    batches=batches,
                    threads=count,
                    runtime=runtime,
                    progress=lambda line, name=runtime: tell(progress, f"timing in {name}: {line}"),
                )
        except BranchyNetError as error:
            faults[runtime] = error
        if rows:
            keep_bench(run.path, rows)
    if not rows:
        raise next(iter(faults.values()))
    return rows, faults
