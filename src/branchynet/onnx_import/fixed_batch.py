"""Free the batch size of a file that fixes it."""

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


def free_batch(
    steps: Sequence[Step], constants: dict[str, Tensor], inputs: Sequence[str], batch: int
) -> tuple[Step, ...]:
    """Write the batch size as a free one where a step fixes it in a constant; `check_batch` tests the result.

    - A Reshape to constant sizes infers the first, which holds the batch, alone or merged with heads or windows. If it
      infers another already, it copies the batch from its input.
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
    """Check that a network from a file with a fixed batch size computes every sample alone.

    Args:
        network: in eval mode.
        args: one batch of inputs.
        kwargs: further inputs by name.

    Raises:
        GraphError: it does not, or cannot compute another batch size.
    """
    if network.fixed_batch is None:
        return
    rows = max((len(t) for t in (*args, *kwargs.values())), default=0)

    def outputs(*chosen: int) -> list[Tensor]:
        take = list(chosen)
        returned = network(*(t[take] for t in args), **{name: t[take] for name, t in kwargs.items()})
        return list(returned.values()) if isinstance(returned, dict) else [returned]

    first, last = 0, rows - 1  # a single row twice still shows sizes that do not fit
    fixed = f"the file fixes the batch size at {network.fixed_batch}"
    try:
        both, alone = outputs(first, last), [outputs(first), outputs(last)]
    except InputError as error:
        raise GraphError(f"{fixed}, and not only in the shape of its input ({first_line(error)}): {REMEDY}") from error
    for n, together in enumerate(both):
        apart = [one[n] for one in alone]
        # float32 sums in another order for another batch size; mixed samples differ by far more than a thousandth
        if together.shape[0] != 2 or not all(
            torch.allclose(together[row].double(), one[0].double(), 1e-3, 1e-3 * float(one.double().abs().max()))
            for row, one in enumerate(apart)
        ):
            raise GraphError(f"{fixed}, and mixes samples at any other: {REMEDY}")
