"""How a training went, epoch by epoch; kept as ``train.csv`` beside the weights."""

import csv
import os
from dataclasses import dataclass
from typing import Any

from ..errors import FileError
from ..files import regular, replacing


@dataclass(frozen=True)
class EpochRow:
    """One epoch of training.

    Attributes:
        epoch: from 1.
        seconds: wall time of the epoch, validation included.
        lr: learning rate of the first parameter group in its last step.
        train_loss: mean joint loss a sample, while training.
        train_accuracy: `(N,)` share of right answers of each exit, while training; empty where targets are no class
            indices.
        val_loss: mean joint loss on the validation data, or None without them.
        val_accuracy: `(N,)` share of right answers on them; empty without them.
    """

    epoch: int
    seconds: float
    lr: float
    train_loss: float
    train_accuracy: tuple[float, ...] = ()
    val_loss: float | None = None
    val_accuracy: tuple[float, ...] = ()

    def flat(self) -> dict[str, Any]:
        """One entry a column of ``train.csv``; exits are numbered from 1."""
        row: dict[str, Any] = {"epoch": self.epoch, "seconds": round(self.seconds, 3), "lr": self.lr}
        for part in ("train", "val"):
            row[f"{part}_loss"] = getattr(self, f"{part}_loss")
            row |= {f"{part}_accuracy_{n}": a for n, a in enumerate(getattr(self, f"{part}_accuracy"), start=1)}
        return row

    @classmethod
    def from_flat(cls, row: dict[str, Any]) -> "EpochRow":
        """The inverse of `flat`; values may be text, as a CSV reader gives them."""
        exits = range(1, len(row) + 1)
        accuracy = {
            f"{part}_accuracy": tuple(float(row[name]) for n in exits if (name := f"{part}_accuracy_{n}") in row)
            for part in ("train", "val")
        }
        return cls(
            epoch=int(row["epoch"]),
            seconds=float(row["seconds"]),
            lr=float(row["lr"]),
            train_loss=float(row["train_loss"]),
            val_loss=None if row["val_loss"] in ("", None) else float(row["val_loss"]),
            **accuracy,
        )


@dataclass(frozen=True)
class History:
    """The epochs of a training, in order.

    Attributes:
        rows: one `EpochRow` an epoch.
    """

    rows: tuple[EpochRow, ...]

    def __str__(self) -> str:
        """One line per epoch: the loss and each exit's share of right answers, on the validation data where given."""
        return "\n".join(
            f"epoch {row.epoch}: loss {row.train_loss if row.val_loss is None else row.val_loss:.4f}"
            + "".join(f", {share:.2%}" for share in row.val_accuracy or row.train_accuracy)
            for row in self.rows
        )

    @property
    def last(self) -> EpochRow:
        """The last epoch's row."""
        return self.rows[-1]

    @property
    def seconds(self) -> float:
        """Wall time of all epochs together."""
        return sum(row.seconds for row in self.rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as CSV, whole or not at all. Raises `FileError`."""
        columns = list(self.rows[0].flat()) if self.rows else ["epoch"]
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(row.flat() for row in self.rows)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "History":
        """Read what `save` wrote. Raises `FileError`."""
        try:
            with regular(path).open(newline="", encoding="utf-8") as stream:
                return cls(tuple(EpochRow.from_flat(row) for row in csv.DictReader(stream)))
        except (OSError, ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
            raise FileError(f"cannot read the training history {path}: {error!r}; train again with fit(...)") from error
