"""Record the outputs of every exit for every sample of a data set."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from ..argument_checks import function
from ..deploy.engine import Engine
from ..errors import InputError
from ..nn.batches import batch_exits, batches, tensors_in
from ..nn.calls import evaluating
from ..nn.checks import (
    KEEP_PARAMETERS,
    READ_ONCE,
    changed,
    check_loader,
    check_network,
    device_of,
    resolve_device,
    written,
)
from ..nn.fingerprint import fingerprint
from ..nn.output_warnings import warn_of_probabilities
from ..policy.exit_record import ExitRecord
from ..policy.record_scores import is_named
from ..policy.sample_digests import Digests, digests
from ..policy.scores import Score, resolve
from ..policy.values import Floats, Ints, score_name

Loss = Callable[[Tensor, Tensor], Tensor]


def record(
    net: nn.Module | Engine,
    loader: Any,
    *,
    loss: Loss | None = None,
    score: str | Score | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> ExitRecord:
    """Run `net` once over a data set, in eval mode and without gradients, and keep the outputs of every exit.

    Without `loss`, for classification, the record keeps the logits, from which any score can be computed later. With
    `loss`, for any task, it keeps one loss and one score per sample and exit.

    Args:
        net: a `BranchyNet`, or any network, which counts as one exit; or an `Engine` of a flat file (exported with
            ``policy=None``), for example to record the int8 network.
        loader: yields `(inputs, target)` with target `(B,)` int64 class indices, or what `loss` takes. Do not shuffle
            if the order matters.
        loss: ``loss(output, target) -> (B,)`` in [0, 1], 0 for a perfect output; output `(B, C, ...)` float32. Accuracy
            is then 1 - mean loss. For segmentation see `branchynet.losses`.
        score: with `loss`, the score to keep: a name in `branchynet.policy.scores` (by default entropy), or a
            callable.
        device: where to run; by default where `net` is. `net` is moved there. An `Engine` runs where it was loaded.
        progress: show a progress bar.

    Returns:
        A record with outputs `(S, N, C)` float32 and labels `(S,)` int64; with `loss`, scores `(S, N)` and losses
        `(S, N)` float32.

    Raises:
        InputError: no batch; exits of different shapes; outputs that are not `(B, C)`, or a NaN or infinite one; with
            `loss`, a loss or score that is not `(B,)`, or a loss outside [0, 1].

    Warns:
        UserWarning: the exits give probabilities, or the network changes its parameters in forward.

    Example:
        >>> import torch
        >>> from branchynet import BranchyNet, record
        >>> from torch import nn
        >>> net = BranchyNet(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), {"1": nn.Linear(8, 3)})
        >>> loader = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> record(net, loader, progress=False).outputs.shape
        (8, 2, 3)
    """
    if score is not None and loss is None:
        raise InputError(
            f"score={score_name(score)!r} is for records with loss=; from logits any score can be computed later: give "
            "it to choose(..., score=) or Policy"
        )
    if loss is not None:
        function("loss", loss, "(output, target) -> (B,)")
    if isinstance(net, Engine):
        net = _EveryExit(net, device)
    check_network(net)
    check_loader("loader", loader)
    if device is not None:
        net.to(resolve_device(device))
    where = device_of(net)
    score = "entropy" if score is None else score
    scored = resolve(score)
    firsts = _Rows()
    seconds: list[Any] = []  # labels or losses
    seen: list[Digests | None] = []
    shown = track(loader, "recording", console=Console(stderr=True)) if progress else loader
    before = written(net.named_parameters())
    with torch.no_grad(), evaluating(net):
        for inputs, target in batches(shown, where):
            exits = tuple(exit.float() for exit in batch_exits(net, inputs))
            if not seen and (loss is None or is_named(score)):
                warn_of_probabilities(exits)
            first, second = _logits(exits, target) if loss is None else _losses(exits, target, scored, loss)
            firsts.add(first)
            seconds.append(second)
            seen.append(_digests(inputs, len(target)))
        name = changed(before, written(net.named_parameters()))
    if name is not None:
        warnings.warn(
            f"the network changes its parameter {name!r} in forward, so the record depends on the order of the "
            f"samples, and export refuses the network: {KEEP_PARAMETERS}",
            stacklevel=2,
        )
    if not seen:
        raise InputError(
            f"the loader gave no batch, so there is nothing to record: give one with samples ({READ_ONCE})"
        )
    first, second = firsts.whole(), np.concatenate(seconds)
    source = net.engine.metadata.get("network") if isinstance(net, _EveryExit) else fingerprint(net)
    known = None if any(part is None for part in seen) else np.concatenate([p for p in seen if p is not None])
    about: dict[str, Any] = {"network": source, "inputs": known, "selected_on": getattr(net, "selected_on", ())}
    if loss is None:
        return ExitRecord(outputs=first, labels=second, **about)
    return ExitRecord.from_scores(first, second, score, **about)


class _Rows:
    """Rows in one array that grows in place by an eighth, so memory holds them about once."""

    def __init__(self) -> None:
        self._rows: Floats | None = None
        self._used = 0

    def add(self, rows: Floats) -> None:
        """Append `rows` (B, ...)."""
        if self._rows is None:
            self._rows = np.empty_like(rows)
        end = self._used + len(rows)
        if end > len(self._rows):
            self._resize(max(end, len(self._rows) + len(self._rows) // 8))
        self._rows[self._used : end] = rows
        self._used = end

    def whole(self) -> Floats:
        """Return all rows."""
        self._resize(self._used)
        assert self._rows is not None
        return self._rows

    def _resize(self, rows: int) -> None:
        assert self._rows is not None
        self._rows.resize((rows, *self._rows.shape[1:]), refcheck=False)  # nothing else holds it


def _digests(inputs: Any, samples: int) -> Digests | None:
    """Return the digests of one batch's inputs; None unless they are tensors with one row per sample."""
    values = list(tensors_in(inputs))
    if not values or any(value.dim() == 0 or len(value) != samples or not value.numel() for value in values):
        return None
    rows = [value.detach().cpu().contiguous().reshape(samples, -1).view(torch.uint8).numpy() for value in values]
    return digests(*rows)


class _EveryExit(nn.Module):
    """Wraps the engine of a flat file as a network."""

    def __init__(self, engine: Engine, device: object) -> None:
        super().__init__()
        if engine.policy is not None:
            raise InputError(
                "this file has early exits, so not every exit sees every sample: record from a file exported with "
                "policy=None, then choose and export with the policy"
            )
        if device is not None:
            raise InputError(f"an engine runs where it was loaded; got device={str(device)!r}: leave it out")
        self.engine = engine
        self.selected_on = tuple(engine.metadata.get("selected_on", ()))

    def forward(self, *inputs: Tensor, **keywords: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(output) for output in self.engine.outputs(*inputs, **keywords)[1:])


def _logits(exits: Sequence[Tensor], target: Tensor) -> tuple[Floats, Ints]:
    """Return logits `(B, N, C)` and labels `(B,)` of one batch."""
    shapes = [tuple(exit.shape) for exit in exits]
    if len(set(shapes)) == 1 and len(shapes[-1]) > 2:
        raise InputError(
            f"outputs {shapes[-1]} have positions, so they need a loss in [0, 1]: give loss=, such as "
            "branchynet.losses.pixel_error"
        )
    if len(set(shapes)) > 1 or len(shapes[-1]) != 2:
        raise InputError(
            f"all exits must give logits of one shape (batch, classes), but they are {_listed(shapes)}; give every "
            "branch as many classes as the backbone has, or for other tasks give loss= (or ExitRecord.from_scores)"
        )
    if target.is_floating_point() or target.shape != exits[-1].shape[:1]:
        raise InputError(
            f"labels must be integers, one per sample, for outputs {shapes[-1]}; got {target.dtype} of shape "
            f"{tuple(target.shape)}: for regression or several labels per sample give loss="
        )
    return torch.stack(list(exits), dim=1).cpu().numpy(), target.cpu().numpy()


def _losses(exits: tuple[Tensor, ...], target: Tensor, score: Score, loss: Loss) -> tuple[Floats, Floats]:
    """Return scores and losses `(B, N)` of one batch."""
    shapes = [tuple(exit.shape) for exit in exits]
    if len(set(shapes)) > 1 or len(shapes[-1]) < 2:
        raise InputError(
            f"all exits must give outputs of one shape (B, C, ...), but they are {_listed(shapes)}; give every branch "
            "the shape of the backbone's output, and one number per sample as (B, 1): unsqueeze(1)"
        )
    for n, exit in enumerate(exits, start=1):
        if exit.isnan().any():  # argmax would return a class for NaN
            raise InputError(f"exit {n} gives NaN, which has no loss: lower the learning rate or drop that sample")
    scores = [score(exits[:n]) for n in range(1, len(exits) + 1)]
    losses = [loss(exit, target) for exit in exits]
    for name, values in (("score", scores), ("loss", losses)):
        for n, value in enumerate(values, start=1):
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            if given != shapes[-1][:1]:
                raise InputError(
                    f"{name}= gives {given} for outputs {shapes[-1]} at exit {n}; it must give one number per sample, "
                    f"{shapes[-1][:1]}: take the mean over all dimensions but the first"
                )
    table = torch.stack([value.float() for value in losses], dim=1).cpu()
    outside = (~((table >= 0) & (table <= 1))).nonzero()  # also NaN
    if len(outside):
        row, n = outside[0].tolist()
        raise InputError(
            f"loss= gives {table[row, n].item():.4g} at exit {n + 1}; losses must lie in [0, 1], where 0 is perfect: "
            "map an error e >= 0 to e / (e + scale), or clamp it"
        )
    return torch.stack([value.float() for value in scores], dim=1).cpu().numpy(), table.numpy()


def _listed(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(f"exit {n}: {shape}" for n, shape in enumerate(shapes, start=1))
