"""Free the batch size of a file that fixes it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import GraphError, InputError, first_line
from .network import OnnxNetwork
from .steps import Step

REMEDY = (
    "export it again with a free batch dimension (PyTorch: torch.onnx.export(..., dynamic_shapes={'input': {0: "
    "torch.export.Dim('batch')}})), or give the PyTorch network itself"
)

LENGTHS = (
    "export it again with free dimensions (PyTorch: torch.onnx.export(..., dynamo=True, dynamic_shapes={'input': {0: "
    "torch.export.Dim('batch'), 1: torch.export.Dim('length')}})), give an example of the lengths that it was exported "
    "with, or give the PyTorch network itself"
)
_SIZES = "invalid for input of size|must match"  # what torch says of sizes that do not fit


def free_batch(
    steps: Sequence[Step], constants: dict[str, Tensor], inputs: Sequence[str], batch: int
) -> tuple[Step, ...]:
    """Free the batch size in the steps that fix it in a constant; `check_batch` tests the result.

    - A Reshape to constant sizes then infers its first size, which is the batch, alone or merged with heads or windows.
      If it infers another size already, it copies the batch from its input.
    - In a file for one sample, constants that are concatenated with data, such as class tokens, are repeated.
    """
    data, found = set(inputs), []
    for step in steps:
        depends = bool(data & set(step.inputs))
        if depends:
            data.update(step.outputs)
        shape = constants.get(step.inputs[1]) if step.operator == "Reshape" and step.inputs[0] in data else None
        first = None if shape is None else _first(shape.tolist(), batch)
        if first is not None and shape is not None:
            free = f"{step.inputs[1]}/{step.outputs[0]}"
            constants[free] = torch.cat([torch.full_like(shape[:1], first), shape[1:]])
            step = replace(step, inputs=(step.inputs[0], free), attributes={})
        if step.operator == "Concat" and batch == 1 and step.attributes["axis"] != 0:
            step = replace(step, attributes={**step.attributes, "broadcast": 1})
        found.append(step)
    return tuple(found)


def _first(shape: list[int], batch: int) -> int | None:
    """Return the first size of a Reshape for any batch size; None if it is right already, or unknown."""
    if 0 in shape:
        return None
    if -1 not in shape:
        return -1 if shape else None
    return 0 if shape[0] == batch else None


@torch.no_grad()
def check_batch(network: OnnxNetwork, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check that a network computes any batch size, and, if its file fixes the batch size, every sample alone.

    Args:
        network: in eval mode.
        args: one batch of inputs.
        kwargs: further inputs by name.

    Raises:
        GraphError: it does not, or its nodes hold a batch size or length that these inputs do not have.
    """
    given = (*args, *kwargs.values())
    if not all(isinstance(one, Tensor) and one.dim() for one in given):
        return  # `attach` refuses these

    def outputs(*chosen: int) -> list[Tensor]:
        take = list(chosen)
        returned = network(*(t[take] for t in args), **{name: t[take] for name, t in kwargs.items()})
        return list(returned.values()) if isinstance(returned, dict) else [returned]

    first, last = 0, max((len(one) for one in given), default=1) - 1  # a row twice still shows sizes that do not fit
    fixed = f"the file fixes the batch size at {network.fixed_batch}"
    try:
        both, alone = outputs(first, last), [outputs(first), outputs(last)]
    except InputError as error:
        if others := _other_sizes(network, args, kwargs):
            raise GraphError(
                f"the file fixes the sizes of its inputs ({others}; {first_line(error)}): {LENGTHS}"
            ) from error
        if network.fixed_batch is not None:
            raise GraphError(
                f"{fixed}, and not only in the shape of its input ({first_line(error)}): {REMEDY}"
            ) from error
        if not re.search(_SIZES, str(error)):
            return  # `attach` raises it with a hint
        cause = first_line(error)
        raise GraphError(f"a node of the file fixes a batch size or length ({cause}): {LENGTHS}") from error
    if network.fixed_batch is None:
        return
    for n, together in enumerate(both):
        apart = [one[n] for one in alone]
        # float32 sums in another order for another batch size; mixed samples differ by far more than a thousandth
        if together.shape[0] != 2 or not all(
            torch.allclose(together[row].double(), one[0].double(), 1e-3, 1e-3 * _largest(one), equal_nan=True)
            for row, one in enumerate(apart)
        ):
            raise GraphError(f"{fixed}, and mixes samples at any other: {REMEDY}")


def _largest(value: Tensor) -> float:
    return float(value.double().abs().nan_to_num(0, 0, 0).max())


def _other_sizes(network: OnnxNetwork, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Say which sizes, except the batch, differ from those of the inputs in the file; empty if none does."""
    for name, value in {**dict(zip(network.input_names, args, strict=False)), **kwargs}.items():
        shape = network.input_shapes.get(name) or ()
        for dim, (size, wanted) in enumerate(zip(value.shape, shape, strict=False)):
            if dim and wanted is not None and size != wanted:
                return f"dimension {dim} of {name!r} is {wanted} there and {size} in the example"
    return ""
