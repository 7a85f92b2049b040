"""The report of a run, and the notes that the commands print below their results."""

from pathlib import Path
from typing import Any

import numpy as np

from ..data import ImageData
from ..deploy.loading import load
from ..design import Advice
from ..policy.evaluation import evaluate, frontier
from ..policy.exit_record import ExitRecord
from ..policy.prediction import Prediction
from ..policy.promise import tightest_limit
from ..policy.record_scores import scores_of_record
from ..policy.values import Choice
from ..progress import report_progress
from ..report import Gallery, RunReport, write_report
from ..stored_values import read_entry
from .provenance import bench_rows, check_data, check_report, outdated
from .run import Run
from .settings import data_of
from .steps import measure_run

SHOWN = 24  # images per gallery
LIMITS = (0.005, 0.01, 0.02, 0.05, 0.1)  # drops of accuracy; the first is the default of `branchynet choose`


def after_training(run: Run) -> list[str]:
    """The lines after training: outdated files, and the next command with a limit that the run can promise."""
    samples = ExitRecord.load(run.file("record-val.npz", "train")).samples
    carried = tightest_limit(samples, 0.05, "betting")
    limit = next((limit for limit in LIMITS if carried is not None and limit >= carried), None)
    how = " --no-promise" if limit is None else "" if limit == LIMITS[0] else f" --max-drop {limit:g}"
    old = outdated(run.path)
    lines = [f"out of date, made with earlier weights: {', '.join(old)}"] if old else []
    return [*lines, f"trained; next: branchynet choose {run.path}{how}"]


def reason_run(run: Run, choice: Choice) -> str:
    """Why no sample leaves early with a choice of this run; empty if some do."""
    design = f"\n`branchynet design {run.path}` looks for exits that pay"
    return choice.reason + design if choice.reason and not run.settings.taps else choice.reason


def bench_notes(run: Run) -> str:
    """The notes below the times of a run: test accuracy of the last exit and with early exits, and the promise."""
    choice = Choice.load(run.file("choice.json", "choose"))
    outcome = evaluate(ExitRecord.load(run.file("record-test.npz", "train")), choice.policy)
    lines = [
        f"test accuracy of the last exit alone {outcome.last_accuracy:.2%}, with early exits {outcome.accuracy:.2%}"
    ]
    if choice.promise is not None:
        lines.append(
            f"promised relative to the last exit, not to the plain network: {choice.promise}; the drop on the test "
            f"images is {outcome.last_accuracy - outcome.accuracy:+.2%}"
        )
    return "\n".join(filter(None, [*lines, run.settings.caveat]))


def report_run(run: Run, *, progress: bool = False) -> Path:
    """Write ``report.html`` and its curve as ``tradeoff.png``. Raises `FileError` if an earlier step is missing."""
    choice = Choice.load(run.file("choice.json", "choose"))
    val, test = (ExitRecord.load(run.file(f"record-{part}.npz", "train")) for part in ("val", "test"))
    cost = measure_run(run, choice.policy.score)
    data = data_of(run.settings)
    check_data(run.path, data, ["test"])
    engine = load(run.file("model.onnx", "export"))
    check_report(run.path, choice, val, test, engine)
    report_progress(progress, f"predicting the {len(data.test)} test images, and drawing")
    answer = engine.answer_all(data.test.inputs().numpy())
    advised, path = run.path / "advice.json", run.path / "report.html"
    order = np.lexsort((answer.score, answer.exit))  # by exit, then by score, most confident first
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
            _gallery("Left first: the most confident predictions", order[:SHOWN], data, answer),
            _gallery("Left last: the least confident predictions", order[::-1][:SHOWN], data, answer),
        ],
        candidates=Advice.load(advised).tried if advised.exists() else (),
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
    shown = images[..., 0] if images.shape[3] == 1 else images
    found = (data.test.labels.numpy(), answer.label, answer.exit, answer.score)
    return Gallery(title, shown, *(values[rows] for values in found), names=data.classes)
