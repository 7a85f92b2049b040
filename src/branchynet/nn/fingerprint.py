"""Telling networks apart, so that what was recorded, measured and chosen of one is not mixed with another's."""

import hashlib

import torch
from torch import nn

from ..policy.digests import averaged_fingerprint
from .readable import check_weights


def fingerprint(net: nn.Module) -> str:
    """``structure-weights``: two short digests, of what parameters and buffers there are, and of what they hold.

    The first tells architectures apart, wherever they differ in what they hold or where they are tapped; the second
    also two trainings of one. Buffers count even where ``state_dict()`` leaves them out. Averaged answers are another
    network's, see `averaged_fingerprint`. Raises `GraphError` as `check_weights`.
    """
    check_weights(net)
    structure, weights = hashlib.sha256(repr(getattr(net, "taps", ())).encode()), hashlib.sha256()
    held = {**dict(net.named_buffers(remove_duplicate=False)), **net.state_dict()}
    for name, value in sorted(held.items()):
        if not isinstance(value, torch.Tensor):
            continue
        structure.update(f"{name} {tuple(value.shape)}\n".encode())
        weights.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    found = f"{structure.hexdigest()[:12]}-{weights.hexdigest()[:12]}"
    mean = getattr(net, "_averaging", None)
    return found if mean is None else averaged_fingerprint(found, *mean)
