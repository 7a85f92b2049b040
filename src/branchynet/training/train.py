"""Training every exit together, or the branches alone on a frozen backbone."""

import contextlib
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..arguments import check_seed, whole
from ..checking import check_loader, network
from ..errors import InputError
from ..files import locked
from ..net import BranchyNet
from .checkpoint import RunFolder
from .epoch import Bar, Trainer
from .history import History
from .session import accelerating, own_generators, prepared, seed_all, shared

Loss = Callable[[Tensor, Tensor], Tensor]


def joint_loss(
    outputs: Sequence[Tensor],
    target: Tensor,
    weights: Sequence[float] | None = None,
    loss: Loss = F.cross_entropy,
    distill: float = 0.0,
) -> Tensor:
    """The weighted sum of every exit's loss, to minimise in any training loop (paper, section III-B).

    Args:
        outputs: one tensor an exit, all of one shape: for classification logits `(B, C)`, or `(B, C, ...)`.
        target: what `loss` compares them with: for classification `(B,)` or `(B, ...)` int64 class indices.
        weights: one factor an exit, not negative; by default all 1.
        loss: ``loss(output, target) -> scalar``.
        distill: adds to each earlier exit's loss this many times its Kullback-Leibler divergence, in nats, from the
            last exit's softmax over axis 1, which itself gets no gradient by it (self-distillation, arXiv:1905.08094).

    Returns:
        A scalar tensor.

    Raises:
        InputError: a wrong number of weights or a negative one, outputs of different shapes, or a target that `loss`
            refuses.
    """
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    factors = (1.0,) * len(outputs) if weights is None else check_weights(weights)
    if len(factors) != len(outputs):
        raise InputError(f"weights {factors} are {len(factors)} for {len(outputs)} exits; give one weight an exit")
    last = outputs[-1]
    teacher = last.detach().softmax(dim=1) if distill else None
    total = last.new_zeros(())
    for n, (factor, output) in enumerate(zip(factors, outputs, strict=True), start=1):
        if output.shape != last.shape:
            raise InputError(
                f"exit {n} gives outputs of shape {tuple(output.shape)}, but the last exit {tuple(last.shape)}; "
                "give every branch the shape of the backbone's output"
            )
        try:
            part = loss(output, target)
        except (IndexError, ValueError, RuntimeError) as error:
            raise InputError(
                f"the loss of exit {n} cannot compare outputs {tuple(output.shape)} {output.dtype} with a target "
                f"{tuple(target.shape)} {target.dtype}: {error}{_hint_at_target(output, target)}"
            ) from error
        if teacher is not None and output is not last:
            log_p = output.log_softmax(dim=1)
            log_p = log_p.masked_fill(log_p == -math.inf, 0.0)  # a class that is ruled out has nothing to learn
            divergence = F.kl_div(log_p, teacher, reduction="none").sum(dim=1).mean()
            part = part + distill * divergence
        total = total + factor * part
    return total


def _hint_at_target(output: Tensor, target: Tensor) -> str:
    """What is most likely wrong with the labels of a classification, or nothing."""
    if output.dim() != 2:
        return ""
    classes = output.shape[1]
    if target.shape == (len(output), 1):
        return "; give one label per sample: target.squeeze(1)"
    if target.shape == output.shape and not target.is_floating_point():
        return "; give class indices: target.argmax(1)"
    if target.dim() == 1 and target.is_floating_point():
        return "; class indices are integers: target.long()"
    if target.dim() == 1 and len(target) and int(target.max()) >= classes:
        low, high = int(target.min()), int(target.max())
        return f"; labels lie in {low}..{high}, but outputs have {classes} classes (0..{classes - 1}): count from 0"
    return ""


def check_weights(weights: Sequence[float]) -> tuple[float, ...]:
    """The loss weights as floats. Raises `InputError` where one is negative or not finite, or all are 0."""
    try:
        factors = tuple(float(w) for w in weights)
    except TypeError:
        raise InputError(f"weights must be numbers, one per exit; got {weights!r}") from None
    if not all(math.isfinite(w) and w >= 0 for w in factors) or not any(factors):
        raise InputError(f"weights must be finite, not negative, and not all 0; got {factors}")
    return factors


@dataclass(frozen=True)
class Cosine:
    """A schedule: linear rise over the first `warmup` share of the steps, then a half cosine to 0, arXiv:1608.03983."""

    warmup: float = 0.05

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """The scheduler, to be stepped after every batch."""
        rise = max(1, round(self.warmup * total_steps))

        def factor(step: int) -> float:
            if step < rise:
                return (step + 1) / rise
            return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total_steps - rise)))

        return LambdaLR(optimizer, factor)


@dataclass(frozen=True)
class Constant:
    """A schedule: the optimizer's own learning rate throughout, as in the paper."""

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """The scheduler, to be stepped after every batch."""
        return LambdaLR(optimizer, lambda step: 1.0)


def adam(params: Any) -> Optimizer:
    """Adam with a step size of 0.001, the default optimizer."""
    return torch.optim.Adam(params, lr=1e-3)


def fit(
    net: nn.Module,
    train_loader: Any,
    val_loader: Any = None,
    *,
    epochs: int,
    weights: Sequence[float] | None = None,
    train: str = "all",
    loss: Loss = F.cross_entropy,
    distill: float = 0.0,
    optimizer: Callable[[Any], Optimizer] = adam,
    schedule: Callable[[Optimizer, int], LRScheduler] = Cosine(),
    seed: int = 0,
    mixed_precision: str = "no",
    device: str | torch.device | None = None,
    channels_last: bool = False,
    run: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> History:
    """Train every exit of `net` together, in place; a plain network is trained as one exit, so that baselines compare.

    With a `run` folder the state is kept after every epoch, and the same call after a kill goes on from there to the
    same weights, bit for bit on a CPU: generators are seeded from (seed, epoch), so the broken epoch starts again from
    its beginning. (A loader with ``persistent_workers`` keeps generators of its own, which nobody can seed.)

    Training starts from the weights that the network has. A network whose forward writes into its own parameters, such
    as ``nn.Embedding(max_norm=)``, is trained, and they change with ``train="branches"`` too; `record` warns of it, and
    `export` refuses it.

    Args:
        net: a `BranchyNet`, or any network that gives a tensor or a tuple of tensors.
        train_loader: yields `(inputs, target)` and has a length, such as a DataLoader. `inputs` is a tensor, a tuple of
            arguments or a dict of keyword arguments; `target` is `(B,)` int64 class indices, or what `loss` takes.
            Several processes share a DataLoader, or the one that a wrapper keeps as its attribute `batches`.
        val_loader: likewise; looked at after every epoch, never trained on.
        epochs: passes over the data.
        weights: one factor an exit in the joint loss; by default all 1.
        train: ``"all"``, or ``"branches"`` to leave the backbone exactly as it is: frozen and in eval mode.
        loss: ``loss(output, target) -> scalar``; for label smoothing
            ``functools.partial(F.cross_entropy, label_smoothing=0.1)``.
        distill: weight of self-distillation from the last exit, see `joint_loss`; for classes that exclude each other.
        optimizer: ``optimizer(parameters) -> Optimizer``.
        schedule: ``schedule(optimizer, total_steps) -> LRScheduler``, stepped after every batch: `Cosine()`,
            `Constant()` or your own.
        seed: for shuffling, dropout and augmentation.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"`` (which needs a GPU).
        device: by default what accelerate finds; ``"cpu"`` keeps off a GPU. `net` stays on that device.
        channels_last: train in channels-last memory order, up to 1.5 times faster for convolutions; the network must
            then not ``view`` feature maps (``flatten`` and ``reshape`` are fine). Weights come back in the usual order.
        run: a folder for ``checkpoint.safetensors``, ``training.safetensors`` and ``train.csv``; locked meanwhile.
        resume: go on with what `run` holds; False starts anew.
        progress: show a bar.

    Returns:
        The history of all epochs, those before a resume included.

    Raises:
        InputError: an argument or a batch that does not fit, or a `run` made with other settings: each worker of a
            loader draws its own random numbers, so another number of workers is another training.
        FileError: a `run` that cannot be read or written, that is of another network, or that another process is
            training in.
        BranchyNetError: the loss is not finite.
    """
    network(net)
    _check_makers(loss, optimizer, schedule)
    _check(net, train_loader, epochs, train, seed, mixed_precision)
    with (
        accelerating(mixed_precision, device) as accelerator,
        own_generators(accelerator.device),
        prepared(net.to(accelerator.device), train, channels_last),
        locked(run) if run is not None and accelerator.is_main_process else contextlib.nullcontext(),
    ):
        parameters = [p for p in net.parameters() if p.requires_grad]
        if not parameters:
            raise InputError("the network has no parameter that requires a gradient; nothing can be trained")
        model = net
        if accelerator.num_processes > 1:
            train_loader = shared(train_loader, accelerator, "train_loader")
            val_loader = None if val_loader is None else shared(val_loader, accelerator, "val_loader")
            gpus = None if accelerator.device.type == "cpu" else [accelerator.device]
            model = nn.parallel.DistributedDataParallel(net, device_ids=gpus)
        batches = len(train_loader)
        opt = optimizer(parameters)
        settings = {
            "epochs": epochs,
            "batches": batches,
            "batch_size": getattr(train_loader, "batch_size", None),
            "workers": getattr(train_loader, "num_workers", None),
            "processes": accelerator.num_processes,
            "weights": None if weights is None else check_weights(weights),
            "train": train,
            "loss": _named(loss),
            "distill": distill,
            "optimizer": f"{type(opt).__name__} {_named([{**g, 'params': None} for g in opt.param_groups])}",
            "schedule": _named(schedule),
            "seed": seed,
            "mixed_precision": mixed_precision,
            "channels_last": channels_last,
        }

        def objective(outputs: Sequence[Tensor], target: Tensor) -> Tensor:
            return joint_loss(outputs, target, weights, loss, distill)

        trainer = Trainer(model, opt, schedule(opt, epochs * batches), objective, accelerator, channels_last)
        folder = None if run is None else RunFolder(run, settings)
        rows = trainer.resume(folder, net, resume) if folder else []
        for epoch in range(len(rows) + 1, epochs + 1):
            seed_all(seed, epoch, accelerator.process_index, (train_loader, val_loader))
            bar = Bar(f"epoch {epoch}/{epochs}", batches, progress and accelerator.is_main_process)
            with bar:
                rows.append(trainer.epoch(epoch, train_loader, val_loader, bar))
            if folder and accelerator.is_main_process:
                folder.save(net, opt, rows, trainer.progress())
        accelerator.wait_for_everyone()
    return History(tuple(rows))


def _check_makers(
    loss: Loss, optimizer: Callable[[Any], Optimizer], schedule: Callable[[Optimizer, int], LRScheduler]
) -> None:
    """Functions are wanted that make the optimizer and the schedule, for the parameters that `fit` trains."""
    if isinstance(optimizer, Optimizer) or not callable(optimizer):
        named = type(optimizer).__name__ if isinstance(optimizer, Optimizer) else "Adam"
        raise InputError(
            f"optimizer must be a function of the parameters; got {type(optimizer).__name__}: give "
            f"functools.partial(torch.optim.{named}, lr=1e-3)"
        )
    if isinstance(schedule, LRScheduler) or not callable(schedule):
        raise InputError(
            f"schedule must be a function of the optimizer and the number of steps; got {type(schedule).__name__}: "
            "give Cosine(), Constant(), or lambda optimizer, steps: your own"
        )
    if isinstance(loss, type):
        raise InputError(
            f"loss must be a function (output, target) -> scalar; got the class {loss.__name__}: give {loss.__name__}()"
        )


def _check(net: nn.Module, train_loader: Any, epochs: int, train: str, seed: int, mixed_precision: str) -> None:
    whole("epochs", epochs, 1)
    check_seed(seed)
    if train not in ("all", "branches"):
        raise InputError(f"train must be 'all' or 'branches'; got {train!r}")
    if train == "branches" and not (isinstance(net, BranchyNet) and len(net.branches)):
        raise InputError(
            f"train='branches' needs a BranchyNet with branches; got {type(net).__name__}: attach some first"
        )
    if mixed_precision not in ("no", "bf16", "fp16"):
        raise InputError(f"mixed_precision must be 'no', 'bf16' or 'fp16'; got {mixed_precision!r}")
    check_loader("train_loader", train_loader)
    try:
        empty = len(train_loader) == 0
    except TypeError as error:
        raise InputError(f"train_loader must have a length, as the schedule is planned from it: {error}") from error
    if empty:
        raise InputError("train_loader has no batches; give it data, or drop_last=False")


def _named(value: Any) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
