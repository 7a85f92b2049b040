"""Numbers that are known without the data: constants, sizes of tensors, and numbers computed from these.

Operators such as Reshape read sizes from tensors. As Python numbers, or torch's symbols for them, they leave the batch
free when the network is exported; as tensors, they would fix it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True, eq=False)
class Numbers:
    """An array of Python numbers or torch's symbols.

    Attributes:
        array: the numbers, an array of objects.
        dtype: the type that the array has as a tensor.
        device: the device that it has as a tensor.
        tensor: the same as a tensor, for a constant of the file.
    """

    array: np.ndarray
    dtype: torch.dtype
    device: torch.device
    tensor: Tensor | None = None

    def flat(self) -> list[Any]:
        """Return all numbers in order."""
        return list(self.array.reshape(-1))

    def fixed(self) -> bool:
        """Whether no number is a symbol."""
        return not any(isinstance(one, _SYMBOLS) for one in self.flat())

    def made(self, array: Any, dtype: torch.dtype | None = None) -> "Numbers":
        """Return other numbers on this device, by default of this type."""
        return Numbers(objects(array), dtype or self.dtype, self.device)

    def as_tensor(self) -> Tensor:
        """Return the numbers as a tensor."""
        if self.tensor is not None:
            return self.tensor
        if self.fixed():
            return torch.tensor(self.array.tolist(), dtype=self.dtype, device=self.device)
        scalars = [torch.scalar_tensor(one, dtype=self.dtype, device=self.device) for one in self.flat()]
        return torch.stack(scalars).reshape(self.array.shape)


def objects(values: Any) -> np.ndarray:
    """Return an array of objects."""
    return values if isinstance(values, np.ndarray) and values.dtype == object else np.array(values, dtype=object)


def known(tensor: Tensor) -> Numbers:
    """Return the numbers in a constant tensor."""
    return Numbers(objects(tensor.tolist()).reshape(tuple(tensor.shape)), tensor.dtype, tensor.device, tensor)


def elementwise(function: Callable[..., Any], dtype: torch.dtype | None = None) -> Callable[..., Numbers]:
    """Return a function of any count of numbers that broadcasts `function` of two, or of one if there is only one."""

    def of(first: Numbers, *others: Numbers, **_: Any) -> Numbers:
        if not others:
            return first.made(np.frompyfunc(function, 1, 1)(first.array), dtype)
        array = first.array
        for other in others:
            array = np.frompyfunc(function, 2, 1)(array, other.array)
        return first.made(array, dtype)

    return of


def sizes_of(shape: Sequence[Any], device: torch.device) -> Numbers:
    """Return sizes of a tensor."""
    return Numbers(objects(list(shape)), torch.int64, device)
