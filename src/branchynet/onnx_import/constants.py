"""Constants of an ONNX file: which are trained, and which are numbers."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from ..errors import FileError
from .dtypes import dtype_of
from .operators import OPERATORS
from .steps import Step

_MASK = 1e4  # tables with numbers this large are masks
_FEW, _MOST = 64, 4096  # floats, and integers, that may be numbers; larger constants are tensors only


def tensor_of(proto: onnx.TensorProto) -> Tensor:
    """Return a constant as a tensor. Raises `FileError` if it is damaged, and `GraphError` for a type torch lacks."""
    dtype = dtype_of(proto.data_type)
    try:
        array = numpy_helper.to_array(proto)
    except (ValueError, TypeError) as error:
        raise FileError(f"the constant {proto.name!r} is damaged ({error}); write the file again") from error
    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))  # a copy: the array may be read-only


def trained(constants: dict[str, Tensor], steps: Iterable[Step]) -> set[str]:
    """Return the names of the constants that become parameters.

    These are floats that an operator reads as its weights, and other floats of more than one element, such as biases
    that are added; except running statistics, exponents, and tables that hold infinities or numbers beyond 1e4, which
    are masks.
    """
    found = set()
    for step in steps:
        operator = OPERATORS[step.operator]
        never = {*operator.fixed, *operator.numbers}
        for place, name in enumerate(step.inputs):
            value = constants.get(name)
            if value is None or not value.is_floating_point() or place in never:
                continue
            if place in operator.weights or (value.numel() > 1 and not _is_mask(value)):
                found.add(name)
    return found


def _is_mask(value: Tensor) -> bool:
    return not bool((value.abs() < _MASK).all())


def is_few(value: Tensor) -> bool:
    """Whether a constant is also held as numbers."""
    return value.numel() <= (_FEW if value.is_floating_point() else _MOST)


def is_size(value: Tensor) -> bool:
    """Whether a constant is held as numbers alone: few integers, such as sizes, axes and positions."""
    return not value.is_floating_point() and value.numel() <= _FEW


def untied(steps: Sequence[Step], constants: dict[str, Tensor], parameters: set[str]) -> tuple[Step, ...]:
    """Give each use of a parameter with equal elements, such as the ones and zeros of new norms, its own parameter.

    Exporters store equal weights once. In a file of an untrained network, all norms are therefore tied to each other,
    and to running statistics, which get a buffer. Weights whose elements differ are equal on purpose, such as an
    embedding that is also the head, and stay tied.
    """
    seen: set[str] = set()
    found = []
    for step in steps:
        inputs = list(step.inputs)
        for place, name in enumerate(inputs):
            fixed = place in OPERATORS[step.operator].fixed
            if name not in parameters or not (fixed or bool((constants[name] == constants[name].view(-1)[:1]).all())):
                continue
            if fixed or name in seen:
                inputs[place] = f"{name}/{step.outputs[0]}/{place}"
                constants[inputs[place]] = constants[name].clone()
            if not fixed:
                parameters.add(inputs[place])
                seen.add(name)
        found.append(replace(step, inputs=tuple(inputs)))
    return tuple(found)
