"""From a trained network to an `ExitRecord`: every exit's answer for every sample of a data set."""

from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from .errors import InputError
from .net import evaluating
from .training.feed import batches, exits_of
from .types import ExitRecord


def record(
    net: nn.Module, loader: Any, *, device: str | torch.device | None = None, progress: bool = True
) -> ExitRecord:
    """Run `net` over a data set once and keep every exit's logits, in eval mode and without gradients.

    Args:
        net: a `BranchyNet`, or any network, which then has one exit; modes are put back after.
        loader: yields `(inputs, target)`, target `(B,)` int64 class indices. Do not shuffle where the order matters.
        device: where to run; by default where `net` is. `net` stays there.
        progress: show a bar.

    Returns:
        outputs `(S, N, C)` float32 and labels `(S,)` int64.

    Raises:
        InputError: no batch, exits of different shapes, outputs that are not `(B, C)`, or a NaN or infinite output.
    """
    if device is not None:
        net.to(device)
    where = next((t.device for t in (*net.parameters(), *net.buffers())), torch.device("cpu"))
    outputs, labels = [], []
    shown = track(loader, "recording", console=Console(stderr=True), disable=not progress)
    with torch.no_grad(), evaluating(net):
        for inputs, target in batches(shown, where):
            exits = exits_of(net, inputs)
            shapes = [tuple(exit.shape) for exit in exits]
            if len(set(shapes)) > 1 or len(shapes[-1]) != 2:
                told = ", ".join(f"exit {n}: {shape}" for n, shape in enumerate(shapes, start=1))
                raise InputError(
                    f"every exit must give logits of one shape (batch, classes), but they are {told}; give every "
                    "branch as many classes as the backbone has, or for other tasks build ExitRecord.from_scores"
                )
            outputs.append(torch.stack([exit.float() for exit in exits], dim=1).cpu().numpy())
            labels.append(target.cpu().numpy())
    if not outputs:
        raise InputError("the loader gave no batch; there is nothing to record")
    return ExitRecord(outputs=np.concatenate(outputs), labels=np.concatenate(labels))
