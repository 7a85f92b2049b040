"""What people look at: answers to image files, and the report of a run."""

from pathlib import Path
from typing import Any

import numpy as np

from ..data import ImageData
from ..deploy.loading import load
from ..design import Advice
from ..policy.evaluation import evaluate, frontier
from ..policy.exit_record import ExitRecord
from ..policy.prediction import Prediction
from ..policy.promise import tightest
from ..policy.record_scores import scores_of_record
from ..policy.values import Choice
from ..report import Gallery, RunReport, write_report
from ..stored import read_entry
from .provenance import bench_rows, check_data, check_report, outdated
from .run import Run, report_progress
from .settings import data_of
from .steps import measure_run

SHOWN = 24  # pictures a gallery
LIMITS = (0.005, 0.01, 0.02, 0.05, 0.1)  # of accuracy that one may want to promise; the first is the default of choose


def after_training(run: Run) -> list[str]:
    """What to tell when a run is trained: files of earlier weights, and the command that comes next.

    That command has a limit that the run's samples can carry.
    """
    samples = ExitRecord.load(run.file("record-val.npz", "train")).samples
    carried = tightest(samples, 0.05, "betting")
    limit = next((limit for limit in LIMITS if carried is not None and limit >= carried), None)
    how = " --no-promise" if limit is None else "" if limit == LIMITS[0] else f" --max-drop {limit:g}"
    old = outdated(run.path)
    told = [f"out of date, as they were made of earlier weights: {', '.join(old)}"] if old else []
    return [*told, f"trained; next: branchynet choose {run.path}{how}"]


def reason_run(run: Run, choice: Choice) -> str:
    """Why a choice of this run lets no sample leave early, in words; empty where it lets some."""
    design = f"\n`branchynet design {run.path}` looks for exits that pay"
    return choice.reason + design if choice.reason and not run.settings.taps else choice.reason


def bench_notes(run: Run) -> str:
    """Below the times of a run: the last exit's accuracy on test images, and what was promised beside it."""
    choice = Choice.load(run.file("choice.json", "choose"))
    outcome = evaluate(ExitRecord.load(run.file("record-test.npz", "train")), choice.policy)
    told = [
        f"on the test images the last exit alone has {outcome.last_accuracy:.2%}, with early exits "
        f"{outcome.accuracy:.2%}"
    ]
    if choice.promise is not None:
        told.append(
            f"promised beside the last exit, not the plain network: {choice.promise}; the test images show a drop of "
            f"{outcome.last_accuracy - outcome.accuracy:+.2%}"
        )
    return "\n".join(filter(None, [*told, run.settings.caveat]))


def report_run(run: Run, *, progress: bool = False) -> Path:
    """Write ``report.html`` and its curve as ``tradeoff.png``. Raises `FileError` where a step before is missing."""
    choice = Choice.load(run.file("choice.json", "choose"))
    val, test = (ExitRecord.load(run.file(f"record-{part}.npz", "train")) for part in ("val", "test"))
    cost = measure_run(run, choice.policy.score)
    data = data_of(run.settings)
    check_data(run.path, data, ["test"])
    engine = load(run.file("model.onnx", "export"))
    check_report(run.path, choice, val, test, engine)
    report_progress(progress, f"answering the {len(data.test)} test images, and drawing")
    answer = engine.answer_all(data.test.inputs().numpy())
    advised = run.path / "advice.json"
    tried = Advice.load(advised).tried if advised.exists() else ()
    path = run.path / "report.html"
    order = np.lexsort((answer.score, answer.exit))  # by exit, then the surest first
    report = RunReport(
        title=f"{run.settings.network} on {run.settings.data}",
        choice=choice,
        outcome=evaluate(test, choice, cost),
        record=test,
        scores=scores_of_record(test, choice.policy.score),
        curve=frontier(val, cost, score=choice.policy.score),
        cost=cost,
        bench=bench_rows(run.path),
        galleries=[
            _gallery("Left first: the surest answers", order[:SHOWN], data, answer),
            _gallery("Left last: the least sure answers", order[::-1][:SHOWN], data, answer),
        ],
        candidates=tried,
        taken=list(zip(run.settings.taps, run.settings.branches, strict=True)),
        facts={
            **read_entry(run.path / "config.json", "environment", dict[str, Any], "`branchynet train`"),
            "data": run.settings.data,
            "seed": run.settings.seed,
            **({"plain network": run.settings.caveat} if run.settings.caveat else {}),
        },
    )
    write_report(path, report, picture=run.path / "tradeoff.png")
    return path


def _gallery(title: str, rows: Any, data: ImageData, answer: Prediction) -> Gallery:
    images = data.test.images.numpy()[rows].transpose(0, 2, 3, 1)
    return Gallery(
        title=title,
        images=images[..., 0] if images.shape[3] == 1 else images,
        label=data.test.labels.numpy()[rows],
        predicted=answer.label[rows],
        exit=answer.exit[rows],
        score=answer.score[rows],
        names=data.classes,
    )
