"""What the files of a run were made from: each names it, and what does not belong together is refused by name.

``data.json`` holds a digest of the training, validation and test images of a run. Records, costs, choices and exported
files carry the fingerprint of their network; a choice names the record that chose, and ``bench.json`` the file timed.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .data import ImageData
from .data.sets import FOLDER
from .design import Advice
from .engine.exported import Engine
from .errors import DataError, FileError
from .exit_record import ExitRecord
from .files import write_json
from .stored import read_entry
from .types import Choice

PARTS = ("train", "val", "test")
_FILE = "data.json"


def keep_data(run: Path, data: ImageData) -> None:
    """Write which images a run is made with."""
    digests = {part: getattr(data, part).digest for part in PARTS}
    write_json(run / _FILE, {"name": data.name, "digests": digests})


def check_data(run: Path, data: ImageData, parts: Sequence[str] = PARTS) -> None:
    """Raises `DataError` where these parts of the data are not those that the run was made with."""
    if not (run / _FILE).exists():
        if data.name.startswith(FOLDER):
            raise DataError(
                f"{run} has no {_FILE}: its images were split in another way, so that those to test on now may have been "
                f"trained on; train again into a new folder: `branchynet train NEW --data {data.name}`"
            )
        return
    made = read_entry(run / _FILE, "digests", dict[str, str], "train")
    for part in parts:
        if made.get(part) != getattr(data, part).digest:
            raise DataError(
                f"the {part} images of {data.name} are not those that {run} was made with; put these back, or train "
                f"again into a new folder: `branchynet train NEW --data {data.name}`"
            )


def model_digest(path: Path) -> str:
    """SHA-256 of an exported file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_design(run: Path, record: ExitRecord) -> None:
    """Raises `FileError` for a design that was selected on all validation samples, which leaves none for a promise."""
    path = run / "advice.json"
    if path.exists() and not record.selected_on and not Advice.load(path).selected_on:
        raise FileError(
            f"{path} is of an earlier version, which selected the design on all validation samples, so that none are "
            f"left to test a promise: remove {run} and run `branchynet design {run.parent}` again, or take --no-promise"
        )


def check_report(run: Path, choice: Choice, val: ExitRecord, test: ExitRecord, model: Engine, bench: Any) -> None:
    """What a report puts together belongs together.

    Args:
        run: the folder.
        choice: of thresholds.
        val, test: records of both parts.
        model: the exported file.
        bench: what ``bench.json`` holds, or None.

    Raises:
        FileError: a file was made from others than those there; the command that makes it again is named.
    """

    def check(name: str, verb: str, *same: tuple[Any, Any]) -> None:
        if any(None not in pair and pair[0] != pair[1] for pair in same):
            raise FileError(
                f"{run / name} was not made from the other files there; run `branchynet {verb} {run}` again"
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
    if bench is not None:
        check("bench.json", "bench", (str(bench.get("model")), model_digest(run / "model.onnx")))
