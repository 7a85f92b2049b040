"""Train and validate one epoch, with running totals and a progress bar."""

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import BranchyNetError, FileError, InputError
from ..nn.batches import batch_exits, batches
from ..nn.calls import evaluating
from ..nn.checks import READ_ONCE
from ..nn.output_warnings import warn_of_probabilities
from .checkpoint import RunFolder
from .history import EpochRow

REFRESH_S = 0.5  # time between readings of the running loss, each of which waits for the device
LINE_S = 60.0  # time between lines in a log file, which has no bar


class Trainer:
    """Train and validate epochs."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler,
        objective: Callable[[Sequence[Tensor], Tensor], Tensor],
        accelerator: Accelerator,
        channels_last: bool,
    ) -> None:
        self.model, self.optimizer, self.schedule, self.objective = model, optimizer, schedule, objective
        self.accelerator, self.channels_last = accelerator, channels_last
        self.steps = 0
        self.checked = False  # whether outputs are logits

    def progress(self) -> dict[str, Any]:
        """Return the state other than weights and optimizer, as JSON values."""
        scaler = self.accelerator.scaler
        return {"steps": self.steps, "scaler": scaler.state_dict() if scaler else None}

    def resume(self, folder: RunFolder, net: nn.Module, resume: bool) -> list[EpochRow]:
        """Resume from `folder`, or write its first state; return the finished epochs. Raises as `RunFolder.load`."""
        stored = folder.load(net, self.optimizer) if resume else None
        self.accelerator.wait_for_everyone()
        if stored is None:
            if self.accelerator.is_main_process:
                # Also before the first epoch, because a caller may draw other initial weights at a resume.
                folder.save(net, self.optimizer, [], self.progress())
            return []
        rows, progress = stored
        steps, most = progress.get("steps"), len(rows) * folder.settings["batches"]
        if type(steps) is not int or not 0 <= steps <= most:
            raise FileError(
                f"{folder.training} reports {steps!r} steps in {len(rows)} epochs of {folder.settings['batches']} "
                "batches; choose another run folder, or FitOptions(resume=False) to start again"
            )
        if progress["grown"]:  # the schedule has changed, so its learning rates are computed again
            for group in self.optimizer.param_groups:
                group["lr"] = group.get("initial_lr", group["lr"])
        groups = [dict(group) for group in self.optimizer.param_groups]
        with warnings.catch_warnings():  # torch expects a step of the optimizer before each of these
            warnings.simplefilter("ignore", UserWarning)
            # The steps are replayed, because JSON cannot store the state of some schedulers.
            for _ in range(steps):
                self.schedule.step()
        if not progress["grown"]:
            for group, restored in zip(self.optimizer.param_groups, groups, strict=True):
                group.update(restored)
        self.steps = steps
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(progress["scaler"])
        return rows

    def epoch(self, epoch: int, train_loader: Any, val_loader: Any, bar: "ProgressBar") -> EpochRow:
        """Train on every batch once, then validate. Raises `BranchyNetError` if the loss is not finite."""
        start = time.perf_counter()
        tally = EpochTotals(f"in epoch {epoch}")
        lr = 0.0
        for inputs, target in batches(train_loader, self.accelerator.device, self.channels_last):
            outputs, value = self._forward(inputs, target)
            if not self.checked and _are_classes(outputs[-1], target):
                warn_of_probabilities(outputs, level=4)
            self.checked = True
            lr = float(self.optimizer.param_groups[0]["lr"])
            self._step(value)
            tally.add(value.detach(), outputs, target)
            bar.advance(tally)
        train_loss, train_accuracy = tally.read(self.accelerator)
        bar.show(train_loss, train_accuracy)
        val_loss, val_accuracy = self._validate(epoch, val_loader) if val_loader is not None else (None, ())
        return EpochRow(epoch, time.perf_counter() - start, lr, train_loss, train_accuracy, val_loss, val_accuracy)

    def _step(self, value: Tensor) -> None:
        self.optimizer.zero_grad()
        scaler = self.accelerator.scaler
        if scaler is None:
            value.backward()
            self.optimizer.step()
        else:
            before = scaler.get_scale()
            scaler.scale(value).backward()
            scaler.step(self.optimizer)
            scaler.update()
            if scaler.get_scale() < before:  # the gradients overflowed, and the scaler skipped the step
                return
        self.schedule.step()
        self.steps += 1

    def _validate(self, epoch: int, loader: Any) -> tuple[float, tuple[float, ...]]:
        tally = EpochTotals(f"on the validation data after epoch {epoch}")
        with torch.no_grad(), evaluating(self.model):
            for inputs, target in batches(loader, self.accelerator.device, self.channels_last):
                outputs, value = self._forward(inputs, target)
                tally.add(value, outputs, target)
        return tally.read(self.accelerator)

    def _forward(self, inputs: Any, target: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        with self.accelerator.autocast():
            outputs = batch_exits(self.model, inputs)
        outputs = tuple(o.float() if o.dtype in (torch.float16, torch.bfloat16) else o for o in outputs)
        return outputs, self.objective(outputs, target)


class EpochTotals:
    """The running loss and the right answers per exit, kept on the device because reading waits for it."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.losses: list[Tensor] = []
        self.sizes: list[int] = []
        self.right: Tensor | None = None
        self.answers: Tensor | int = 0

    def add(self, loss: Tensor, outputs: tuple[Tensor, ...], target: Tensor) -> None:
        """Count one batch, without waiting for the device."""
        self.losses.append(loss)
        self.sizes.append(len(target))
        if not _are_classes(outputs[-1], target):
            return
        right = torch.stack([(o.detach().argmax(dim=1) == target).sum() for o in outputs])
        self.right = right if self.right is None else self.right + right
        # The loss ignores other targets, such as the -100 of cross_entropy.
        self.answers = self.answers + ((target >= 0) & (target < outputs[-1].shape[1])).sum()

    def read(self, accelerator: Accelerator | None = None) -> tuple[float, tuple[float, ...]]:
        """Return the mean loss per sample and the accuracies `(N,)`, over all processes if `accelerator` is given.

        Raises:
            BranchyNetError: a loss is not finite; the message names the first such batch.
            InputError: there was no batch.
        """
        if not self.losses:
            raise InputError(
                f"the loader yielded no batch {self.where}; give it data, or drop_last=False ({READ_ONCE})"
            )
        losses = torch.stack(self.losses).double().cpu()
        wrong = (~losses.isfinite()).nonzero()
        if len(wrong):
            first = int(wrong[0])
            raise BranchyNetError(
                f"the loss is {losses[first].item()} {self.where}, batch {first + 1}; lower the learning rate, clip "
                "or check the data, and train in another run folder (or FitOptions(resume=False))"
            )
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        right = [] if self.right is None else self.right.tolist()
        totals = [float(losses @ sizes), float(sizes.sum()), float(self.answers), *right]
        sums = torch.tensor(totals, dtype=torch.float64)
        if accelerator is not None and accelerator.num_processes > 1:
            sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()  # type: ignore[union-attr]
        loss_sum, samples, answers, *right = sums.tolist()
        return loss_sum / samples, tuple(r / answers for r in right if answers)


class ProgressBar:
    """A progress bar over the batches of one epoch, which stays on the screen; nothing if not `visible`.

    A log file gets lines instead: one per minute, and one at the end of the epoch.
    """

    def __init__(self, title: str, total: int, visible: bool) -> None:
        columns = (
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            "{task.fields[totals]}",
        )
        # Without auto_refresh, because rich's thread would compete with the training.
        self.bar = Progress(*columns, console=Console(stderr=True), auto_refresh=False, disable=not visible)
        self.task = self.bar.add_task(title, total=total, totals="")
        self.title, self.total, self.done = title, total, 0
        self.shown = self.written = time.monotonic()

    def __enter__(self) -> "ProgressBar":
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if not self.bar.disable:  # rich 13 prints an empty line for a bar that it never drew
            self.bar.stop()

    def advance(self, tally: EpochTotals) -> None:
        """Count one batch. Twice per second, read the totals, which also finds a loss that is not finite."""
        self.done += 1
        if time.monotonic() - self.shown > REFRESH_S:
            self.show(*tally.read())

    def show(self, loss: float, accuracies: tuple[float, ...]) -> None:
        """Draw the loss and the accuracies."""
        right = "  ".join(["  right", *(f"{a:.2%}" for a in accuracies)]) if accuracies else ""
        self.bar.update(self.task, completed=self.done, totals=f"loss {loss:.4f}{right}", refresh=True)
        self.shown = time.monotonic()
        out = self.bar.console
        if not (self.bar.disable or out.is_terminal) and self.shown - self.written > LINE_S and self.done < self.total:
            out.print(f"{self.title}: {self.done} of {self.total} batches, loss {loss:.4f}{right}", highlight=False)
            self.written = self.shown


def _are_classes(output: Tensor, target: Tensor) -> bool:
    """Return whether targets are class indices `(B, ...)` for outputs `(B, C, ...)`, which have an accuracy."""
    if target.is_floating_point() or output.dim() < 2 or output.shape[1] < 2:
        return False
    return target.shape == output.shape[:1] + output.shape[2:]
