"""Read an ONNX file as a PyTorch network."""

import os
from collections.abc import Sequence
from pathlib import Path

from ..argument_checks import instance
from ..errors import BranchyNetError, FileError, first_line
from .network import OnnxNetwork
from .reading import read_graph


def from_onnx(path: str | os.PathLike[str], *, outputs: Sequence[str] | None = None) -> OnnxNetwork:
    """Read an ONNX file as a PyTorch network with trainable weights.

    Every value that the file computes from its inputs becomes a submodule, so it can be a tap of `attach`.
    ``print(net)`` lists them, and ``net.places`` holds those at the ends of blocks. Floats that operators read as
    weights become parameters, and so do other constants of more than one float, except masks (tables with infinities or
    numbers beyond 1e4), exponents, and running statistics. A file does not say which constants were trained: freeze
    others with ``net.get_parameter(name).requires_grad_(False)``.

    Batch norms use the running statistics of the file, in training too. Dropout nodes drop in training only; most
    exporters remove them. Operator sets from 7 on can be read.

    Args:
        path: the ``.onnx`` file. Weights in further files are read from its folder.
        outputs: names of values to return, such as the one before a softmax at the end; by default the outputs of the
            file that are floats.

    Returns:
        An `OnnxNetwork`. Its forward takes the inputs of the file, in order or by name, and returns one tensor, or a
        dict of several. If the file fixes the batch size, it is freed; `attach` checks that this was possible.

    Raises:
        FileError: the file, or a further file with its weights, is missing or damaged; or the file is not an ONNX file.
        GraphError: the file has an operator that cannot be imported, is quantized, has control flow, or is a file of
            `export` with exits inside.
        InputError: `outputs` names a value that the file does not compute.

    Example:
        >>> import torch
        >>> from branchynet import export, from_onnx
        >>> from torch import nn
        >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(5, 4)
        >>> net = from_onnx(export(net, "plain.onnx", policy=None, example=x))
        >>> net(x).shape, sum(p.numel() for p in net.parameters())
        (torch.Size([5, 3]), 67)
    """
    instance("path", path, (str, os.PathLike), "give the path of the ONNX file, as of onnx.save(model, path)")
    try:
        return OnnxNetwork(read_graph(path, outputs), source=Path(path))
    except BranchyNetError as error:
        raise type(error)(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except MemoryError:
        raise
    except Exception as error:
        raise FileError(
            f"{path} is not a valid ONNX file ({type(error).__name__}: {first_line(error)}); it may be damaged: "
            "write it again"
        ) from error
