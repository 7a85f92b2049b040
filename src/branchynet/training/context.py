"""Set device, random number generators and modes for a training run, and restore them after it."""

import contextlib
import copy
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from ..errors import InputError
from ..nn.calls import INPUT
from ..nn.checks import resolve_device
from ..nn.network import BranchyNet


@contextlib.contextmanager
def accelerating(mixed_precision: str, device: str | torch.device | None) -> Iterator[Accelerator]:
    """Yield an accelerator with these settings, and leave an accelerator of the caller unchanged."""
    wanted = None if device is None else resolve_device(device)
    # accelerate keeps precision and device in process-wide dicts, and refuses to change them.
    shared = [AcceleratorState._shared_state]
    if not torch.distributed.is_initialized():
        shared.append(PartialState._shared_state)
    before = [dict(state) for state in shared]
    first = not PartialState._shared_state
    for state in shared:
        state.clear()
    try:
        try:
            accelerator = Accelerator(mixed_precision=mixed_precision, cpu=wanted is not None and wanted.type == "cpu")
        except (ValueError, ImportError, RuntimeError) as error:
            if first:  # its initialization is incomplete
                PartialState._shared_state.clear()
            what = "accelerate" if mixed_precision == "no" else f"mixed_precision={mixed_precision!r}"
            raise InputError(f"{what} does not work on this machine: {error}") from error
        if mixed_precision == "fp16" and accelerator.scaler is None:
            raise InputError(f"mixed_precision='fp16' needs a GPU, not {str(accelerator.device)!r}; use 'bf16' or 'no'")
        found = accelerator.device
        if wanted is not None and (wanted.type != found.type or (wanted.index or 0) != (found.index or 0)):
            raise InputError(
                f"device={str(device)!r} is not available: accelerate offers {str(found)!r}; choose among GPUs with "
                "CUDA_VISIBLE_DEVICES"
            )
        yield accelerator
    finally:
        for state, content in zip(shared, before, strict=True):
            state.clear()
            state.update(content)


@contextlib.contextmanager
def own_generators(device: torch.device) -> Iterator[None]:
    """Restore the caller's random number generators after the block."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def prepared(net: nn.Module, train: str, channels_last: bool) -> Iterator[None]:
    """Set modes, gradient flags and memory order for the training, and restore them after it."""
    modes = [(module, module.training) for module in net.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in net.parameters()]
    net.train()
    if train == "branches" and isinstance(net, BranchyNet):
        net.backbone.requires_grad_(False).eval()
    if channels_last:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag).grad = None
        if channels_last:
            net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


@contextlib.contextmanager
def compiled(net: nn.Module) -> Iterator[None]:
    """Run the parts of a network between exits as compiled functions within the block.

    The outputs of taps leave through hooks, which a compiled function would fix, so no part holds a tap inside.
    """
    parts = {id(part): part for part in _parts(net, ())}.values()
    before = [part.__dict__.get("forward") for part in parts]
    try:
        for part in parts:
            part.forward = torch.compile(part.forward)
        yield
    finally:
        for part, own in zip(parts, before, strict=True):
            part.__dict__.pop("forward", None)  # absent if torch.compile has failed
            if own is not None:
                part.forward = own


def _parts(module: nn.Module, taps: Sequence[str]) -> Iterator[nn.Module]:
    """Yield the largest submodules that hold none of the `taps`, which are names within the module."""
    if isinstance(module, BranchyNet):
        yield from _parts(module.backbone, [tap for tap in module.taps if tap != INPUT])
        for branch in module.branches:
            yield from _parts(branch, ())
    elif taps or type(module).forward is nn.Module.forward or any(isinstance(m, BranchyNet) for m in module.modules()):
        for name, child in module.named_children():
            yield from _parts(child, [tap.removeprefix(f"{name}.") for tap in taps if tap.startswith(f"{name}.")])
    else:
        yield module


def sharded_loader(loader: Any, accelerator: Accelerator, name: str) -> Any:
    """Return this process's share of the loader `name`.

    The loader is a DataLoader, or a wrapper that iterates the DataLoader in its attribute `batches`, such as
    `branchynet.data.ProgressiveLoader`. Raises `InputError` for others, and if accelerate cannot share it.
    """
    if not isinstance(loader, DataLoader):
        if not isinstance(getattr(loader, "batches", None), DataLoader):
            raise InputError(
                f"{name} is a {type(loader).__name__}, but {accelerator.num_processes} processes can share only a "
                "DataLoader, or a wrapper with one as its attribute `batches`: put the data into a DataLoader, or "
                "train in one process"
            )
        copied = copy.copy(loader)
        copied.batches = sharded_loader(loader.batches, accelerator, f"{name}.batches")
        return copied
    try:
        found = accelerator.prepare_data_loader(loader)
        if not isinstance(loader.dataset, IterableDataset):
            len(found)
        return found
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"accelerate cannot share {name} among {accelerator.num_processes} processes ({error}); give a DataLoader "
            "with a batch_size, or train in one process"
        ) from error


def seed_all(seed: int, epoch: int, process: int, loaders: Sequence[Any]) -> None:
    """Seed every generator from (seed, epoch), so an epoch can run again without stored generator states."""
    shared, local = (
        int(np.random.SeedSequence(key).generate_state(1)[0]) for key in ((seed, epoch), (seed, epoch, process))
    )
    random.seed(local)
    np.random.seed(local)
    torch.manual_seed(local)
    for loader in (*loaders, *(getattr(loader, "batches", None) for loader in loaders)):
        inner = getattr(loader, "batch_sampler", None)
        for holder in (loader, getattr(loader, "sampler", None), inner, getattr(inner, "sampler", None)):
            generator, set_epoch = getattr(holder, "generator", None), getattr(holder, "set_epoch", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(shared)
            if callable(set_epoch):
                set_epoch(epoch)
