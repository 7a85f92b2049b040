"""Fingerprints of networks, so that records, costs and choices of different networks are not mixed."""

import hashlib

import torch
from torch import nn

from ..policy.sample_digests import averaged_fingerprint
from .unsupported import check_weights


def fingerprint(net: nn.Module) -> str:
    """Return ``structure-weights``: a short digest of the names, shapes and taps, and one of the values.

    The first differs between architectures with other parameters, buffers or taps, the second also between training
    runs. Buffers that ``state_dict()`` omits count too. For an averaged network see `averaged_fingerprint`. Raises
    `GraphError` like `check_weights`.
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
