"""Train all exits together, or the branches alone on a frozen backbone."""

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ..argument_checks import function, whole
from ..errors import InputError
from ..files import locked
from ..losses import Loss, check_loss_weights, joint_loss
from ..nn.checks import check_loader, check_network, check_train_loader
from ..nn.network import BranchyNet
from .checkpoint import RunFolder
from .context import accelerating, compiled, own_generators, prepared, seed_all, sharded_loader
from .history import History
from .options import FitOptions
from .schedules import adam
from .trainer import ProgressBar, Trainer


def fit(
    net: nn.Module,
    train_loader: Any,
    val_loader: Any = None,
    *,
    epochs: int,
    loss_weights: Sequence[float] | None = None,
    loss: Loss = F.cross_entropy,
    distill: float = 0.0,
    train: str = "all",
    optimizer: Callable[[Any], Optimizer] = adam,
    run: str | os.PathLike[str] | None = None,
    progress: bool = True,
    options: FitOptions = FitOptions(),
) -> History:
    """Train every exit of `net` together, in place. A plain network is trained as one exit.

    With a `run` folder, `fit` stores its state after every epoch. If it is killed, the same call resumes there and
    reaches the same weights, bit for bit on a CPU. Generators are seeded from (seed, epoch), so the interrupted epoch
    runs again from its beginning. (A loader with ``persistent_workers`` has generators that `fit` cannot seed.)

    Training starts from the current weights. A network that writes into its parameters in `forward`, such as
    ``nn.Embedding(max_norm=)``, changes them even with ``train="branches"``; `record` warns of it, and `export` refuses
    it.

    Args:
        net: a `BranchyNet`, or any network that returns a tensor or a tuple of tensors.
        train_loader: yields `(inputs, target)` and has a length, such as a DataLoader. `inputs` is a tensor, a tuple of
            arguments or a dict of keyword arguments; `target` is `(B,)` int64 class indices, or what `loss` takes.
            Several processes need a DataLoader, or a wrapper with one as its attribute `batches`.
        val_loader: likewise; evaluated after every epoch.
        epochs: passes over the data.
        loss_weights: one factor per exit in the joint loss; by default all 1.
        loss: ``loss(output, target) -> scalar``; for label smoothing
            ``functools.partial(F.cross_entropy, label_smoothing=0.1)``.
        distill: weight of self-distillation from the last exit, see `joint_loss`; for classes that exclude each other.
        train: ``"all"``, or ``"branches"`` to keep the backbone unchanged: frozen and in eval mode.
        optimizer: ``optimizer(parameters) -> Optimizer``.
        run: a folder for ``checkpoint.safetensors``, ``training.safetensors`` and ``train.csv``, locked meanwhile.
        progress: show a progress bar.
        options: seed, precision, device, memory order, compilation, schedule, and whether to resume; see `FitOptions`.

    Returns:
        The history of all epochs, including those before a resume.

    Raises:
        InputError: an argument or a batch that does not fit, or a `run` with other settings. They include the number
            of workers, because each worker draws its own random numbers.
        FileError: a `run` that cannot be read or written, is of another network, or is in use by another process.
        BranchyNetError: the loss is not finite.

    Example:
        >>> import torch
        >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> inputs, labels = torch.randn(64, 4), torch.randint(3, (64,))
        >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, labels), batch_size=16)
        >>> net = attach(backbone, at=["1"], example=inputs)
        >>> history = fit(net, loader, epochs=2, progress=False)
        >>> len(history.rows), len(history.last.train_accuracy)  # 2 epochs, 2 exits
        (2, 2)
    """
    check_network(net)
    check_train_loader(train_loader)
    if val_loader is not None:
        check_loader("val_loader", val_loader, again=True)
    _check(net, epochs, loss, train, optimizer)
    with (
        accelerating(options.mixed_precision, options.device) as accelerator,
        own_generators(accelerator.device),
        prepared(net.to(accelerator.device), train, options.channels_last),
        compiled(net) if options.compile else contextlib.nullcontext(),
        locked(run) if run is not None and accelerator.is_main_process else contextlib.nullcontext(),
    ):
        parameters = [p for p in net.parameters() if p.requires_grad]
        if not parameters:
            raise InputError("the network has no parameter that requires a gradient; nothing can be trained")
        model = net
        if accelerator.num_processes > 1:
            train_loader = sharded_loader(train_loader, accelerator, "train_loader")
            val_loader = None if val_loader is None else sharded_loader(val_loader, accelerator, "val_loader")
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
            "loss_weights": None if loss_weights is None else check_loss_weights(loss_weights),
            "train": train,
            "loss": _named(loss),
            "distill": distill,
            "optimizer": f"{type(opt).__name__} {_named([{**g, 'params': None} for g in opt.param_groups])}",
            "schedule": _named(options.schedule),
            "seed": options.seed,
            "mixed_precision": options.mixed_precision,
            "channels_last": options.channels_last,
            **({"compile": True} if options.compile else {}),
        }
        objective = partial(joint_loss, loss_weights=loss_weights, loss=loss, distill=distill)
        schedule = options.schedule(opt, epochs * batches)
        trainer = Trainer(model, opt, schedule, objective, accelerator, options.channels_last)
        folder = None if run is None else RunFolder(run, settings)
        rows = trainer.resume(folder, net, options.resume) if folder else []
        for epoch in range(len(rows) + 1, epochs + 1):
            seed_all(options.seed, epoch, accelerator.process_index, (train_loader, val_loader))
            with ProgressBar(f"epoch {epoch}/{epochs}", batches, progress and accelerator.is_main_process) as bar:
                rows.append(trainer.epoch(epoch, train_loader, val_loader, bar))
            if folder and accelerator.is_main_process:
                folder.save(net, opt, rows, trainer.progress())
        accelerator.wait_for_everyone()
    return History(tuple(rows))


def _check(net: nn.Module, epochs: int, loss: Loss, train: str, optimizer: Callable[[Any], Optimizer]) -> None:
    if isinstance(optimizer, Optimizer) or not callable(optimizer):
        named = type(optimizer).__name__ if isinstance(optimizer, Optimizer) else "Adam"
        raise InputError(
            f"optimizer must be a function of the parameters; got {type(optimizer).__name__}: give "
            f"functools.partial(torch.optim.{named}, lr=1e-3)"
        )
    function("loss", loss, "(output, target) -> scalar")
    whole("epochs", epochs, 1)
    if train not in ("all", "branches"):
        raise InputError(f"train must be 'all' or 'branches'; got {train!r}")
    if train == "branches" and not (isinstance(net, BranchyNet) and len(net.branches)):
        raise InputError(
            f"train='branches' needs a BranchyNet with branches; got {type(net).__name__}: attach some first"
        )


def _named(value: Any) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
