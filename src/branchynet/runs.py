"""A run folder and the steps that fill it: train, choose, export, bench, report.

Every file is readable by hand or by a standard tool; each is written whole or not at all::

    config.json           what was asked for, and on what machine
    baseline/             the plain network, trained first: the warm start
    static/               the plain network, trained on for as many epochs as the branches: what we are compared with
    checkpoint.safetensors, training.safetensors, train.csv
    data.json             digests of the images that it was trained, chosen and tested on
    record-val.npz, record-test.npz, record-static.npz
    cost.json, choice.json, model.onnx, bench.json, report.html
    design-N/             another run, of the exits that `branchynet design` found best for batches of N
"""

import contextlib
import copy
import importlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .attaching import attach_heads
from .bench import bench
from .choosing import choose
from .cost import measure
from .data import ImageData, affine, flip_crop, load_data, loader, shift
from .decide import evaluate
from .errors import FileError, InputError, nearest
from .exit_record import ExitRecord
from .export import export
from .files import locked, read_json, write_json
from .fingerprint import fingerprint
from .fitting import fit_score
from .guarantee import halves
from .machine import environment
from .net import BranchyNet, evaluating
from .provenance import check_choice, check_data, check_design, keep_bench, keep_data
from .record import record
from .stored import read_entry
from .training.checkpoint import load_weights
from .training.train import fit
from .trust import signature, signed
from .types import PROMISED, Choice, ExitCost, Policy, score_name
from .zoo import NETWORKS

AUGMENTS = {
    "none": None,
    "shift": shift(2),
    "affine": affine(degrees=10, translate=2 / 28, scale=0.1),
    "flip-crop": flip_crop(4),
}
EVAL_BATCH = 500


@dataclass(frozen=True)
class Settings:
    """What `train_run` is to do.

    Attributes:
        network: a zoo network, or ``"package.module:function"`` for a function that returns a `BranchyNet`.
        data: a name that `load_data` knows.
        baseline_epochs: of the plain network, before the branches: the warm start; 0 for none.
        epochs: of joint training.
        static: also train the plain network on for `epochs`, to compare with; else the warm start is compared with.
        train: ``"all"`` or ``"branches"``.
        weights: one loss weight an exit; empty for all 1.
        augment: one of `AUGMENTS`.
        taps, heads: early exits instead of the network's own: where, and names as in `branchynet.heads`.
    """

    network: str = "b_lenet"
    data: str = "digits"
    baseline_epochs: int = 10
    epochs: int = 25
    static: bool = True
    train: str = "all"
    weights: tuple[float, ...] = ()
    distill: float = 0.0
    augment: str = "affine"
    batch_size: int = 128
    rate: float = 3e-3
    seed: int = 0
    mixed_precision: str = "no"
    taps: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()


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
        trust: let the function run that the folder names as its network, if it names one. A folder that was made on
            this machine, by this user, needs no trust; in one from elsewhere the function may do anything.

    Raises:
        FileError: the folder holds no run.
        InputError: the folder, made elsewhere, names a function, and `trust` is not given.
    """
    config = Path(path) / "config.json"
    if not config.is_file():
        raise FileError(f"{path} is no run folder (it has no config.json); make one with `branchynet train {path}`")
    settings = read_entry(config, "settings", Settings, f"`branchynet train {path}`")
    if ":" in settings.network and not trust and not signed(settings.network, read_json(config).get("signature")):
        raise InputError(
            f"{path} was not made here, and to open it would run the function {settings.network!r} that it names as "
            "its network; if you trust it, add --trust (in Python, open_run(..., trust=True))"
        )
    return Run(Path(path), settings)


def create_run(path: str | os.PathLike[str], settings: Settings) -> Run:
    """Make a run folder, or open it where it was made with the same settings.

    Raises:
        InputError: the folder holds a run with other settings, or a setting is unknown.
    """
    run = Run(Path(path), settings)
    if settings.augment not in AUGMENTS:
        raise InputError(f"unknown augment {settings.augment!r}{nearest(settings.augment, AUGMENTS)}")
    if (run.path / "config.json").exists():
        made = asdict(open_run(path, trust=True).settings)  # the caller names the same function, or is refused
        other = [f"{k} {made[k]!r}, not {v!r}" for k, v in asdict(settings).items() if made[k] != v]
        if other:
            raise InputError(f"{path} was made with {'; '.join(other)}: use these settings, or another folder")
    else:
        about = {"settings": asdict(settings), "environment": environment()}
        if ":" in settings.network:
            about["signature"] = signature(settings.network)
        write_json(run.path / "config.json", about)
    return run


def build_network(settings: Settings, data: ImageData) -> BranchyNet:
    """The untrained network of `Settings`. Raises `InputError` for one that cannot be had, or not read the images."""
    net, example = _named(settings.network, len(data.classes)), example_of(data)
    try:
        with torch.no_grad(), evaluating(net):
            net(example)
    except RuntimeError as error:
        raise InputError(
            f"{settings.network} cannot read the images of {data.name}, of shape {tuple(example.shape[1:])}: {error}"
        ) from error
    return attach_heads(net.backbone, settings.taps, settings.heads, example) if settings.taps else net


def _named(name: str, num_classes: int) -> BranchyNet:
    if name in NETWORKS:
        return NETWORKS[name](num_classes=num_classes)
    module, colon, function = name.partition(":")
    if not colon:
        raise InputError(
            f"unknown network {name!r}{nearest(name, NETWORKS)}; for your own, give 'package.module:function'"
        )
    try:
        net = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise InputError(f"cannot take the network from {name!r}: {error}; is the package installed?") from error
    if not isinstance(net, BranchyNet):
        raise InputError(f"{name} returned a {type(net).__name__}; it must return a BranchyNet (see attach)")
    return net


def train_run(run: Run, *, progress: bool = True) -> BranchyNet:
    """Train the baseline, the static network and all exits together, then record; goes on where it was stopped.

    Raises:
        FileError: another process is training in the folder.
    """
    first = os.environ.get("RANK", "0") == "0"  # of the processes that train together, one locks
    with locked(run.path) if first else contextlib.nullcontext():
        settings = run.settings
        data = load_data(settings.data)
        check_data(run.path, data)
        torch.manual_seed(settings.seed)
        net = build_network(settings, data)
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
    for name, split in (("val", data.val), ("test", data.test)):
        record(net, loader(split, EVAL_BATCH), progress=False).save(run.path / f"record-{name}.npz")


def fit_in(
    run: Run, folder: str, network: nn.Module, data: ImageData, epochs: int, seed: int, progress: bool, **more: Any
) -> None:
    """One training of a run, its state in a folder of the run's; `more` as `fit` takes it."""
    settings = run.settings
    if progress:
        print(f"{folder}: {epochs} epochs of {len(data.train)} images", flush=True)
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
    data = load_data(run.settings.data)
    net = build_network(run.settings, data)
    load_weights(net, weights)
    return net.eval(), data


def measure_run(run: Run, score: Any = "entropy") -> ExitCost:
    """The cost of every stage, with that score, at batch 1 and one thread: measured once, and kept.

    In ``cost.json``, or for a score other than entropy in ``cost-NAME.json``.
    """
    name = score_name(score)
    path = run.path / ("cost.json" if name == "entropy" else f"cost-{name}.json")
    if path.exists():
        return ExitCost.load(path)
    net, data = load_run(run)
    cost = measure(net, example_of(data), score=score)
    cost.save(path)
    return cost


def choose_run(run: Run, *, score: str | None = None, **constraint: Any) -> Choice:
    """Choose thresholds on the validation record; writes ``choice.json``. Arguments as in `choose`.

    `score` may also be ``"learned"`` (see `fit_score`): it is fitted on the half of the samples that finds candidates,
    and a promise is tested on the other; without a promise the thresholds are chosen on the other.
    """
    found = ExitRecord.load(run.file("record-val.npz", "train"))
    if constraint.get("confidence", 0.95) is not None and any(constraint.get(name) is not None for name in PROMISED):
        check_design(run.path)
    wanted: Any = score or "entropy"
    if wanted == "learned":
        tuning, rest = halves(found.samples)
        wanted = fit_score(found.take(tuning))
        if constraint.get("confidence", 0.95) is None:
            found = found.take(rest)
    choice = choose(found, measure_run(run, wanted), score=wanted, **constraint)
    choice.save(run.path / "choice.json")
    return choice


def export_run(run: Run, path: Path | None = None, **options: Any) -> Path:
    """Write ``model.onnx`` with the chosen thresholds; `options` as in `export`."""
    choice = Choice.load(run.file("choice.json", "choose"))
    net, data = load_run(run)
    check_choice(run.path, choice, fingerprint(net))
    limit, value = next(iter(choice.constraint.items()))
    told = f"none; chosen for {limit} {value:g} on {choice.outcome.samples} validation samples"
    return export(
        net,
        path or run.path / "model.onnx",
        policy=choice,
        example=example_of(data),
        labels=data.classes,
        preprocessing={"shape": list(data.shape), "scale": "pixels / 255", "resize": "bilinear"},
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
) -> list[dict[str, Any]]:
    """Time ``model.onnx`` beside the static network, in each engine; writes ``bench.json``."""
    model = run.file("model.onnx", "export")
    net, data = load_run(run)
    check_data(run.path, data, ["test"])
    images, labels = data.test.images.float() / 255, data.test.labels
    accuracy = evaluate(ExitRecord.load(run.file("record-static.npz", "train")), Policy()).accuracy
    rows = []
    for runtime, count in itertools.product(engines, threads):
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
            progress=print if progress else lambda message: None,
        )
    keep_bench(run.path, rows)
    return rows


def example_of(data: ImageData) -> torch.Tensor:
    """A few images, as the networks take them."""
    return data.val.images[:8].float() / 255
