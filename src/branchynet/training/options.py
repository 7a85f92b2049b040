"""Rarely changed options of `fit`, as one value."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..argument_checks import check_seed, instance
from ..errors import InputError
from ..nn.checks import resolve_device
from .schedules import Cosine

PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True)
class FitOptions:
    """Rarely changed options of `fit`: ``fit(net, loader, epochs=20, options=FitOptions(seed=1))``.

    Attributes:
        seed: for shuffling, dropout and augmentation.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"`` (which needs a GPU).
        device: by default the device that accelerate chooses; ``"cpu"`` uses no GPU. The network stays on the device.
        channels_last: train in channels-last memory order, up to 1.5 times faster for convolutions. The network must
            not ``view`` feature maps (``flatten`` and ``reshape`` work). Afterwards weights have the default order.
        compile: compile the parts of the network between exits, and the branches, with `torch.compile`. This takes a
            minute or more before the first step, and steps are then faster, mostly on a GPU.
        schedule: ``schedule(optimizer, total_steps) -> LRScheduler``, stepped after every batch: `Cosine()`,
            `Constant()` or your own.
        resume: continue from the state in `run`; False starts again.

    Raises:
        InputError: an unknown value, or a device that this machine does not have.

    Example:
        >>> FitOptions(seed=1).mixed_precision
        'no'
    """

    seed: int = 0
    mixed_precision: str = "no"
    device: str | torch.device | None = None
    channels_last: bool = False
    compile: bool = False
    schedule: Callable[[Optimizer, int], LRScheduler] = Cosine()
    resume: bool = True

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.mixed_precision not in PRECISIONS:
            raise InputError(f"mixed_precision must be 'no', 'bf16' or 'fp16'; got {self.mixed_precision!r}")
        instance("compile", self.compile, bool, "give True or False")
        if self.device is not None:
            resolve_device(self.device)
        if isinstance(self.schedule, LRScheduler) or not callable(self.schedule):
            raise InputError(
                "schedule must be a function of the optimizer and the number of steps; got "
                f"{type(self.schedule).__name__}: give Cosine(), Constant(), or your own function (optimizer, "
                "total_steps) -> scheduler"
            )
