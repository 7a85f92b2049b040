"""Design exits for a trained run: advise, train, choose, export, measure and compare with the prediction.

The folder of a design, ``RUN/design-BATCH``, is itself a run folder, so every verb works on it. For a runtime other
than ONNX Runtime on the CPU it is ``RUN/design-BATCH-RUNTIME``. It holds these additional files::

    asked.json            the arguments of the designer
    advice.json           the candidates and predictions, written before a design is trained
    warm.safetensors      the best design, with branches trained on the frozen network
    prediction.json       the predicted latency of the trained design, written before it is measured
    comparison.json       the measured latency and accuracy

``RUN/candidates`` holds the training of all candidates on the frozen network; every batch size uses it.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..argument_checks import check_fraction
from ..data import ImageData
from ..design import Advice, SearchOptions, advise
from ..design.advising import DISTILL
from ..errors import FileError, InputError
from ..files import copy_file, read_json, write_json
from ..nn.fingerprint import fingerprint
from ..nn.network import BranchyNet
from ..nn.weights import load_weights, save_weights
from ..policy.choosing import nearest_to
from ..policy.evaluation import evaluate
from ..policy.exit_record import ExitRecord
from ..policy.values import Policy
from ..profiling.benchmark import bench
from ..profiling.cost import measure
from ..profiling.recording import record
from ..profiling.target import Target
from ..progress import report_progress
from ..training.history import History
from .provenance import check_data, keep_bench, keep_data
from .run import Run, configure, create_run, loaders
from .settings import build_network, data_of, example_of
from .steps import export_run, fit_options, train_exits

TIMING_S = 10.0
_IMPROVES = 0.98  # last validation loss / the one before it; below this, more epochs help


@dataclass(frozen=True)
class Comparison:
    """The predicted and the measured performance of a design; times are microseconds per sample.

    The trained design is predicted from its validation record before it is timed. The predicted speed-up is relative to
    the plain network measured at the same time, so it stays valid if the machine becomes faster or slower.
    """

    network: str
    batch: int
    threads: int
    taps: tuple[str, ...]
    branches: tuple[str, ...]
    advised_us: float  # predicted with branches trained on the frozen network
    predicted_us: float  # predicted for the trained design
    predicted_speedup: float
    measured_us: float  # this and the next two are measured together, with every operation timed
    plain_us: float
    limit_us: float
    accuracy: float  # on test images
    plain_accuracy: float
    exit_share: tuple[float, ...]
    reached: bool  # whether some thresholds reach the validation accuracy; otherwise the most accurate are used

    @property
    def speedup(self) -> float:
        """Measured speed-up over the plain network."""
        return self.plain_us / self.measured_us

    @property
    def error(self) -> float:
        """Relative error of the prediction: above 0 if the measured time is longer."""
        return self.measured_us / self.predicted_us - 1

    def __str__(self) -> str:
        """The comparison in words."""
        held = "" if self.reached else " (no thresholds reach its validation accuracy; these are the most accurate)"
        return (
            f"measured {self.measured_us:.1f} us per sample, {self.error:+.0%} relative to the predicted "
            f"{self.predicted_us:.1f}; speed-up {self.speedup:.2f}x over the plain network ({self.plain_us:.1f} us), "
            f"predicted {self.predicted_speedup:.2f}x; test accuracy {self.accuracy:.2%}, plain network "
            f"{self.plain_accuracy:.2%}{held}"
        )


def design_run(
    base: Run,
    target: Target = Target(),
    *,
    max_drop: float = 0.0,
    num_exits: int = 4,
    epochs: int = 3,
    final_epochs: int = 0,
    anyway: bool = False,
    progress: bool = True,
) -> tuple[Advice, Comparison | None]:
    """Find, train, export and time exits for the plain network of a trained run; resumes if it was interrupted.

    Arguments are as in `advise` and `SearchOptions`. The chosen exits are trained for as many epochs as `base`,
    with `anyway` even if exits are not worth it.

    Returns:
        The advice; and the comparison, or None if exits are not worth it.

    Raises:
        InputError, GraphError: as `advise`; or the folder holds a design with other arguments.
        FileError: the run is not trained, or has no plain network.
    """
    check_fraction("max_drop", max_drop)
    SearchOptions(epochs, final_epochs)  # raises before any data is read
    base.file("record-plain.npz", "train")
    data = data_of(base.settings)
    check_data(base.path, data)
    folder = design_folder(base.path, target)
    asked = {
        "threads": target.threads,
        "max_drop": max_drop,
        "exits": num_exits,
        "epochs": epochs,
        "final_epochs": final_epochs,
    }
    advice = _advised(base, data, folder, target, asked, progress)
    if not advice.design.taps or not (advice.worth or anyway):
        return advice, None
    exits = {"taps": advice.design.taps, "branches": advice.design.branches}
    settings = replace(base.settings, **exits, distill=DISTILL, loss_weights=(), train="all")
    run = create_run(folder, settings)
    keep_data(folder, data)
    net = build_network(settings, data)
    configure(run)
    load_weights(net, folder / "warm.safetensors")
    net.selected_on = tuple(filter(None, [advice.selected_on]))
    train_exits(run, net, data, progress)
    copy_file(base.path / "record-plain.npz", folder / "record-plain.npz")
    return advice, _compared(base, run, net, data, advice, max_drop, progress)


def next_steps(folder: Path, num_exits: int, epochs: int, final_epochs: int) -> str:
    """Suggest options of `design_run` that may change the verdict that exits are not worth it; empty if none may."""
    path = folder.parent
    histories = [History.load(file).rows for file in sorted((path / "candidates").rglob("train.csv"))]
    losses = [[row.val_loss for row in rows if row.val_loss is not None] for rows in histories]
    improving = any(len(loss) < 2 or loss[-1] < _IMPROVES * loss[-2] for loss in losses)
    longer = max(2 * epochs, 3) if improving else max(epochs, 3)
    options = [
        *([f"--epochs {longer}"] if longer > epochs else []),
        *([f"--final-epochs {longer}"] if improving and final_epochs < longer else []),
        *(["--num-exits 4"] if num_exits < 4 else []),
    ]
    if not options:
        return ""
    still = "the candidates were still improving: " if improving else ""
    return f"{still}more may change this; remove {folder} and run `branchynet design {path} {' '.join(options)}`"


def design_folder(run: Path, target: Target) -> Path:
    """The folder of a run's design for a target."""
    name = f"design-{target.batch_size}"
    return run / (name if target.runtime == "onnxruntime" else f"{name}-{target.runtime}")


def _advised(base: Run, data: ImageData, folder: Path, target: Target, asked: dict[str, Any], progress: bool) -> Advice:
    """Load the advice in the folder, or make it; `asked` is the content of ``asked.json``."""
    path = folder / "advice.json"
    settings = base.settings
    plain = _plain_network(base, data, "warm-start" if settings.warm_start_epochs else "plain")
    if path.exists():
        made = read_json(folder / "asked.json")
        if made != asked:
            raise InputError(f"{folder} was designed with {made}, not {asked}: ask for the same, or remove the folder")
        advice = Advice.load(path)
        if advice.fingerprint != fingerprint(plain):
            raise FileError(
                f"{path} is advice on other weights than those of {base.path}; remove {folder} and "
                f"{base.path / 'candidates'}, and run `branchynet design {base.path}` again"
            )
        return advice
    train, val = loaders(settings, data)
    advice = advise(
        plain,
        train,
        val,
        example_of(data),
        target,
        max_drop=asked["max_drop"],
        num_exits=asked["exits"],
        run=base.path / "candidates",
        progress=progress,
        search=SearchOptions(asked["epochs"], asked["final_epochs"]),
        options=fit_options(settings, settings.seed),
    )
    assert advice.network is not None
    save_weights(advice.network, folder / "warm.safetensors")
    write_json(folder / "asked.json", asked)
    advice.save(path)  # last: its presence shows that the other files are complete
    return advice


def _compared(
    base: Run, run: Run, net: BranchyNet, data: ImageData, advice: Advice, max_drop: float, progress: bool
) -> Comparison:
    """Choose thresholds at the plain network's accuracy, predict the latency, then export and time the file."""
    _, val = loaders(run.settings, data)
    plain = _plain_network(base, data, "plain" if base.settings.plain else "warm-start")
    report_progress(progress, "recording the plain network, and measuring the cost of the trained design")
    wanted = evaluate(record(plain, val, progress=False), Policy()).accuracy - max_drop
    cost = measure(net, example_of(data), advice.target, seconds=TIMING_S, progress=False)
    choice, reached = nearest_to(ExitRecord.load(run.path / "record-val.npz"), cost, wanted)
    choice.save(run.path / "choice.json")
    cost.save(run.path / "cost.json")
    assert choice.outcome.mean_us is not None and cost.plain_us is not None
    predicted = {
        "us": choice.outcome.mean_us,
        "speedup": cost.plain_us / choice.outcome.mean_us,
        "advised_us": advice.design.us,
        "val_accuracy": choice.outcome.accuracy,
    }
    write_json(run.path / "prediction.json", predicted)
    model = export_run(run, free="none" if advice.batch_size == 1 else "batch", progress=progress)
    plain_accuracy = evaluate(ExitRecord.load(run.path / "record-plain.npz"), Policy()).accuracy
    (row,) = bench(
        model,
        net,
        (data.test.inputs(), data.test.labels),
        advice.target,
        about={"network": run.settings.network, "plain_accuracy": plain_accuracy},
        progress=progress,
    )
    keep_bench(run.path, [row])
    found = Comparison(
        network=run.settings.network,
        batch=advice.batch_size,
        threads=advice.threads,
        taps=advice.design.taps,
        branches=advice.design.branches,
        advised_us=advice.design.us,
        predicted_us=predicted["us"],
        predicted_speedup=predicted["speedup"],
        measured_us=row["branchy_us"],
        plain_us=row["plain_us"],
        limit_us=row["limit_us"],
        accuracy=row["accuracy_branchy"],
        plain_accuracy=plain_accuracy,
        exit_share=tuple(row["exit_share"]),
        reached=reached,
    )
    write_json(run.path / "comparison.json", asdict(found))
    return found


def _plain_network(base: Run, data: ImageData, name: str) -> nn.Module:
    """A trained plain network of the run. Raises `FileError` if the run trained none."""
    path = base.path / name / "checkpoint.safetensors"
    if not path.exists():
        raise FileError(
            f"{base.path} has no {name}/ network to design exits for; train the run with --warm-start-epochs above 0"
        )
    net = build_network(replace(base.settings, taps=()), data).backbone
    load_weights(net, path)
    return net
