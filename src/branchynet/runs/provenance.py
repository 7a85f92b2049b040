"""Check that the files of a run were made from the same data, weights and thresholds.

``data.json`` holds a digest of each part of the images. Records, costs, choices and exported files hold the fingerprint
of their network; a choice holds the digest of its record, and ``bench.json`` that of the timed file.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import ImageData
from ..data.datasets import FOLDER
from ..deploy.engine import Engine
from ..deploy.onnx_file import model_metadata
from ..design import Advice
from ..environment import environment
from ..errors import DataError, FileError
from ..files import read_json, write_json
from ..policy.exit_record import ExitRecord
from ..policy.values import Choice
from ..report.html import BENCH_COLUMNS
from ..stored_values import read_entry

PARTS = ("train", "val", "test")
_FILE = "data.json"


def keep_data(run: Path, data: ImageData) -> None:
    """Write the digests of the images that a run uses."""
    digests = {part: getattr(data, part).digest for part in PARTS}
    write_json(run / _FILE, {"name": data.name, "digests": digests})


def check_data(run: Path, data: ImageData, parts: Sequence[str] = PARTS) -> None:
    """Raise `DataError` if these parts of the data differ from those that the run was made with."""
    if not any((run / part / "train.csv").exists() for part in (".", "warm-start", "plain")):
        return  # nothing has been made yet
    if not (run / _FILE).exists():
        if data.name.startswith(FOLDER):
            raise DataError(
                f"{run} has no {_FILE}: its images were split in another way, so the test images may include training "
                f"images; train again into a new folder: `branchynet train NEW --data {data.name}`"
            )
        return
    made = read_entry(run / _FILE, "digests", dict[str, str], "train")
    for part in parts:
        if made.get(part) != getattr(data, part).digest:
            raise DataError(
                f"the {part} images of {data.name} are not those that {run} was made with; restore them, or train "
                f"again into a new folder: `branchynet train NEW --data {data.name}`"
            )


def check_design(run: Path) -> None:
    """Raise `FileError` for a design that was selected on all validation samples, which leaves none for a promise."""
    path = run / "advice.json"
    if path.exists() and not Advice.load(path).selected_on:
        raise FileError(
            f"{path} does not name the samples that selected the design: an older version used all validation "
            f"samples, which leaves none to test a promise. Remove {run} and run `branchynet design {run.parent}` "
            "again, or choose without a promise (--no-promise)"
        )


def _recorded(run: Path) -> str | None:
    """The fingerprint of the network that was recorded; None without a record."""
    path = run / "record-val.npz"
    return ExitRecord.load(path).network if path.exists() else None


def _chosen(run: Path, current: str | None) -> tuple[Choice | None, bool]:
    """The choice of a run, if there is one, and whether it was made for the `current` weights."""
    path = run / "choice.json"
    choice = Choice.load(path) if path.exists() else None
    return choice, choice is not None and choice.network in (None, current)


def check_choice(run: Path, choice: Choice, network: str) -> None:
    """Raise `FileError` if a choice was made for weights with a fingerprint other than `network`."""
    if choice.network not in (None, network):
        verb = "choose" if _recorded(run) == network else "train"
        raise FileError(
            f"{run / 'choice.json'} was chosen for other weights ({choice.network}) than the current ones ({network}); "
            f"run `branchynet {verb} {run}` again"
        )


def check_model(run: Path, about: Mapping[str, Any]) -> None:
    """Raise `FileError` if ``model.onnx`` was made with other weights or thresholds than the run has now.

    `about` is the metadata of the file.
    """
    current, path = _recorded(run), run / "model.onnx"
    choice, fits = _chosen(run, current)
    if not _same_weights(about, current):
        steps = f"`branchynet choose {run}` and " * (not fits) + f"`branchynet export {run}`"
        raise FileError(f"{path} was made with other weights than {run} has now: run {steps} again")
    if choice is not None and about.get("policy") not in (None, choice.policy.to_json()):
        raise FileError(
            f"{path} has other thresholds than {run / 'choice.json'} has now: run `branchynet export {run}` again"
        )


def outdated(run: Path) -> list[str]:
    """The names of a run's files that were made with other weights than it has now, in the order of the steps."""
    current, model = _recorded(run), run / "model.onnx"
    choice, fits = _chosen(run, current)
    old = ["choice.json"] * (choice is not None and not fits)
    if model.exists() and not _same_weights(model_metadata(model), current):
        old += ["model.onnx", *(name for name in ("bench.json", "report.html") if (run / name).exists())]
    return old


def _same_weights(about: Mapping[str, Any], current: str | None) -> bool:
    made = about.get("network")
    return None in (made, current) or made == current or str(made).startswith(f"{current}-")  # int8 of it


def keep_bench(run: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write ``bench.json``, with the digest of the timed file."""
    write_json(run / "bench.json", {"environment": environment(), "model": _digest(run / "model.onnx"), "rows": rows})


def bench_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of ``bench.json``; empty without it. Raises `FileError` if a row lacks a column."""
    path = run / "bench.json"
    again = f"`branchynet bench {run}`"
    rows = read_entry(path, "rows", list[dict[str, Any]], again) if path.exists() else []
    for row in rows:
        if missing := sorted(BENCH_COLUMNS.keys() - row.keys()):
            raise FileError(f"{path} has rows without {', '.join(missing)}; run {again} again")
    return rows


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_report(run: Path, choice: Choice, val: ExitRecord, test: ExitRecord, model: Engine) -> None:
    """Raise `FileError` if a file of a report was not made from the others; it names the command that recreates it."""

    def check(name: str, verb: str, *same: tuple[Any, Any]) -> None:
        if any(None not in pair and pair[0] != pair[1] for pair in same):
            raise FileError(
                f"{run / name} was not made from the other files of this run; run `branchynet {verb} {run}` again"
                + ", or remove it" * (verb == "bench")
            )

    check("record-val.npz", "train", (val.network, test.network))
    check("choice.json", "choose", (choice.network, val.network))
    about = model.metadata
    policy = {} if model.policy is None else model.policy.to_json()
    check(
        "model.onnx",
        "export",
        (about.get("network"), choice.network),
        (policy, choice.policy.to_json()),
        (about.get("chosen_on"), choice.record_digest),
    )
    if (timed := run / "bench.json").exists():
        about = read_json(timed)
        check("bench.json", "bench", (isinstance(about, dict) and about.get("model", ""), _digest(run / "model.onnx")))
