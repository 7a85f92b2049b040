"""Choose how the parts of a network are opened in a runtime, and name the device that runs them."""

from typing import Any

import torch
from torch import nn

from ..environment import processor
from ..policy.scores import Score
from .onnx_parts import onnx_parts
from .parts import Parts
from .target import Target
from .torch_parts import torch_parts


def network_parts(
    net: nn.Module, example: Any, score: Score, target: Target, precision: str, calibration: Any, dynamic: bool = True
) -> Parts:
    """Return the parts of a network for the runtime of a target.

    Args:
        net: the network.
        example: one batch of inputs.
        score: the score, which every exit computes.
        target: its runtime decides between ONNX files and PyTorch.
        precision: as for `export`; in PyTorch, as for `TorchEngine`.
        calibration: as for `export`.
        dynamic: whether the batch size of files is free.

    Raises:
        InputError: a precision or a device that the runtime does not have.
        GraphError: the network cannot be exported, cut or converted.
    """
    if target.reads_files:
        return onnx_parts(net, example, score, precision, calibration, dynamic)
    return torch_parts(net, example, score, precision, target)


def device_name(target: Target) -> str:
    """Return the name of the processor or GPU that runs a target."""
    if not target.runtime.endswith("cuda"):
        return processor()
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "NVIDIA GPU"
