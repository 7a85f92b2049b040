"""Losses and accuracies per epoch, stored as ``train.csv`` next to the weights."""

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
        seconds: wall time of the epoch, including validation.
        lr: learning rate of the first parameter group in its last step.
        train_loss: mean joint loss per sample during training.
        train_accuracy: `(N,)` accuracy of each exit during training; empty if targets are not class indices.
        val_loss: mean joint loss on the validation data; None without validation data.
        val_accuracy: `(N,)` accuracy of each exit on the validation data; empty without validation data.
    """

    epoch: int
    seconds: float
    lr: float
    train_loss: float
    train_accuracy: tuple[float, ...] = ()
    val_loss: float | None = None
    val_accuracy: tuple[float, ...] = ()

    def flat(self) -> dict[str, Any]:
        """Return one entry per column of ``train.csv``."""
        row: dict[str, Any] = {"epoch": self.epoch, "seconds": round(self.seconds, 3), "lr": self.lr}
        for part in ("train", "val"):
            row[f"{part}_loss"] = getattr(self, f"{part}_loss")
            row |= {f"{part}_accuracy_{n}": a for n, a in enumerate(getattr(self, f"{part}_accuracy"), start=1)}
        return row

    @classmethod
    def from_flat(cls, row: dict[str, Any]) -> "EpochRow":
        """Create a row from the result of `flat`; values may be text, as from a CSV reader."""
        train, val = (
            tuple(float(share) for name, share in row.items() if str(name).startswith(f"{part}_accuracy_"))
            for part in ("train", "val")
        )
        seconds, lr, train_loss = (float(row[name]) for name in ("seconds", "lr", "train_loss"))
        val_loss = None if row["val_loss"] in ("", None) else float(row["val_loss"])
        return cls(int(row["epoch"]), seconds, lr, train_loss, train, val_loss, val)


@dataclass(frozen=True)
class History:
    """The epochs of a training run, in order.

    Attributes:
        rows: one `EpochRow` per epoch.

    Example:
        >>> from branchynet.training.history import EpochRow
        >>> print(History((EpochRow(epoch=1, seconds=2.5, lr=0.001, train_loss=0.7, train_accuracy=(0.8, 0.9)),)))
        epoch 1: loss 0.7000, 80.00%, 90.00%
    """

    rows: tuple[EpochRow, ...]

    def __str__(self) -> str:
        """One line per epoch: loss and accuracies, on the validation data if there are any."""
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
        """Wall time of all epochs."""
        return sum(row.seconds for row in self.rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a CSV file atomically. Raises `FileError`."""
        columns = list(self.rows[0].flat()) if self.rows else ["epoch"]
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(row.flat() for row in self.rows)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "History":
        """Read a file that `save` wrote. Raises `FileError`."""
        try:
            with regular(path).open(newline="", encoding="utf-8") as stream:
                return cls(tuple(EpochRow.from_flat(row) for row in csv.DictReader(stream)))
        except (OSError, ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
            raise FileError(f"cannot read the training history {path}: {error!r}; train again with fit(...)") from error
