"""From a trained run to a designed one: advise, train on, choose again, export, measure, compare.

The design's folder, ``RUN/design-BATCH``, is a run folder itself, so that every verb works on it; for other runtimes
than ONNX Runtime on the CPU it is ``RUN/design-BATCH-RUNTIME``. More files are::

    asked.json            what was asked of the designer
    advice.json           what was found, and predicted, before anything was built
    warm.safetensors      the best design with its branches so far
    prediction.json       what the trained design should take, written before it is measured
    comparison.json       what it takes

``RUN/candidates`` keeps the training of all candidates on the frozen network, which serves every batch size.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..arguments import check_fraction
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
from ..training.history import History
from ..training.options import FitOptions
from ..zoo import NETWORKS
from .provenance import check_data, keep_bench, keep_data
from .run import Run, configure, create_run, loaders, report_progress
from .settings import build_network, data_of, example_of
from .steps import export_run, train_exits

TIMING_S = 10.0
_IMPROVES = 0.98  # of the last epoch's validation loss to the one before, below which more epochs help


@dataclass(frozen=True)
class Comparison:
    """A design, what was predicted of it, and what it does.

    Attributes:
        network, batch, threads: what was designed for.
        taps, branches: of the early exits.
        advised_us: predicted microseconds a sample with branches trained on the frozen network.
        predicted_us, predicted_speedup: from the trained design's answers on validation, before it was timed; the
            second beside the plain network of that moment, so that it holds where the machine's pace has changed.
        measured_us, plain_us, limit_us: timed together, everything inside the clock.
        accuracy, plain_accuracy: on test: with exits, and of the network without, trained for as long.
        reached: whether thresholds of the network's own validation accuracy were found; else the most accurate ones
            stand here.
    """

    network: str
    batch: int
    threads: int
    taps: tuple[str, ...]
    branches: tuple[str, ...]
    advised_us: float
    predicted_us: float
    predicted_speedup: float
    measured_us: float
    plain_us: float
    limit_us: float
    accuracy: float
    plain_accuracy: float
    exit_share: tuple[float, ...]
    reached: bool

    @property
    def speedup(self) -> float:
        """Measured, beside the network without exits."""
        return self.plain_us / self.measured_us

    @property
    def error(self) -> float:
        """By how much of it the measured time is beyond the prediction, or short of it."""
        return self.measured_us / self.predicted_us - 1

    def __str__(self) -> str:
        """The comparison in words."""
        held = "" if self.reached else " (its validation accuracy was not reached; these are the best thresholds)"
        return (
            f"measured {self.measured_us:.1f} us a sample, {self.error:+.0%} beside the predicted "
            f"{self.predicted_us:.1f}; {self.speedup:.2f}x faster than {self.plain_us:.1f} without exits, predicted "
            f"{self.predicted_speedup:.2f}x; test accuracy {self.accuracy:.2%}, without exits "
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
    """Find, train, export and time the exits that suit a trained run's network; goes on where it was stopped.

    Args:
        base: a trained run; its plain network is what exits are designed for, and what they are compared with.
        target: what the design is for: the batch size, the threads and the runtime of the deployed file.
        max_drop: accuracy on validation at most so far below the plain network's.
        num_exits: the most the design may have, the network's own included.
        epochs: for all candidate branches together; all exits are then trained for as long as the run's were.
        final_epochs: as `advise` takes it.
        anyway: go on with a design that is not worth it.
        progress: show bars and tell what is being done.

    Returns:
        The advice; and the comparison, or None where exits are not worth it.

    Raises:
        InputError, GraphError: as `advise`; a design in this folder with another limit.
        FileError: the run is not trained, or has no plain network.
    """
    check_fraction("max_drop", max_drop)
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
    settings = replace(
        base.settings,
        taps=advice.design.taps,
        branches=advice.design.branches,
        distill=DISTILL,
        loss_weights=(),
        train="all",
    )
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
    """What may change a verdict that exits are not worth it: options below their defaults, branches that still improve.

    `folder` is the design's, inside the run's; the others are as `design_run` took them.
    """
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
    """Where a run's design for a batch size and a runtime lies."""
    name = f"design-{target.batch_size}"
    return run / (name if target.runtime == "onnxruntime" else f"{name}-{target.runtime}")


def _advised(base: Run, data: ImageData, folder: Path, target: Target, asked: dict[str, Any], progress: bool) -> Advice:
    """The advice in the folder, or a new one; `asked` is what ``asked.json`` keeps."""
    path = folder / "advice.json"
    settings = base.settings
    plain = build_network(replace(settings, taps=()), data).backbone
    load_weights(plain, _plain(base, "warm-start" if settings.warm_start_epochs else "plain"))
    if path.exists():
        made = read_json(folder / "asked.json")
        if made != asked:
            raise InputError(f"{folder} was designed with {made}, not {asked}: ask for the same, or remove the folder")
        advice = Advice.load(path)
        if advice.fingerprint != fingerprint(plain):
            raise FileError(
                f"{path} is advice on other weights than those there; remove {folder} and {base.path / 'candidates'}, "
                "and design again"
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
        options=FitOptions(
            seed=settings.seed,
            mixed_precision=settings.mixed_precision,
            channels_last=settings.network in NETWORKS,
        ),
    )
    assert advice.network is not None
    save_weights(advice.network, folder / "warm.safetensors")
    write_json(folder / "asked.json", asked)
    advice.save(path)  # last: with it, all is there
    return advice


def _compared(
    base: Run, run: Run, net: BranchyNet, data: ImageData, advice: Advice, max_drop: float, progress: bool
) -> Comparison:
    """Choose at the plain network's accuracy, predict, then export and time."""
    _, val = loaders(run.settings, data)
    plain = build_network(replace(base.settings, taps=()), data).backbone
    load_weights(plain, _plain(base, "plain" if base.settings.plain else "warm-start"))
    report_progress(progress, "recording what the plain network answers, and measuring what the trained design costs")
    wanted = evaluate(record(plain, val, progress=False), Policy()).accuracy - max_drop
    cost = measure(net, example_of(data), advice.target, seconds=TIMING_S)
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
    model = export_run(run, batch=1 if advice.batch_size == 1 else "dynamic", progress=progress)
    plain_accuracy = evaluate(ExitRecord.load(run.path / "record-plain.npz"), Policy()).accuracy
    (row,) = bench(
        model,
        net,
        (data.test.inputs(), data.test.labels),
        advice.target,
        about={"network": run.settings.network, "plain_accuracy": plain_accuracy},
        progress=lambda line: report_progress(progress, f"timing the file in {advice.runtime}: {line}"),
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


def _plain(base: Run, name: str) -> Path:
    """The weights of a plain network of the run. Raises `FileError` where it trained none."""
    path = base.path / name / "checkpoint.safetensors"
    if not path.exists():
        raise FileError(
            f"{base.path} has no {name}/ network to design exits for; train the run with --warm-start-epochs above 0"
        )
    return path
