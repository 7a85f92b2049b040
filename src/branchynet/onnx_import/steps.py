"""One node of an ONNX graph as a step that torch computes."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import GraphError, InputError, first_line
from .numbers import Numbers
from .operators import OPERATORS


@dataclass(frozen=True)
class Step:
    """One node.

    Attributes:
        operator: the name of its operator in `OPERATORS`.
        inputs: the names of the values that it reads; empty for one that is left out.
        outputs: the names of its values.
        attributes: its attributes by name.
        opset: the version of the operator set.
    """

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    opset: int

    def run(self, values: Sequence[Any], training: bool = False) -> tuple[Any, ...]:
        """Compute the outputs from tensors and `Numbers`, None for one that is left out.

        Raises:
            GraphError: the operator cannot be imported in this use.
            InputError: torch cannot compute it for values of these shapes.
        """
        try:
            returned = self._run(values, training)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a damaged file may hold anything
            if torch.compiler.is_compiling():  # the exporter's own errors
                raise
            if isinstance(error, GraphError):
                raise GraphError(f"{self.described()}: {error}") from error
            shapes = ", ".join(_shape(value) for value in values if value is not None)
            cause = first_line(error)
            if not isinstance(error, (RuntimeError, TypeError, ValueError, IndexError)):
                cause = f"{type(error).__name__}: {cause}"  # such as an unknown mode, or a stride of zero
            raise InputError(f"{self.described()} cannot read {shapes} ({cause})") from error
        return returned if isinstance(returned, tuple) else (returned,)

    def _run(self, values: Sequence[Any], training: bool) -> Any:
        operator, given = OPERATORS[self.operator], [v for v in values if v is not None]
        more = {"opset": self.opset, "training": training, "outputs": len(self.outputs)}
        if operator.on_numbers is not None and given and all(isinstance(v, Numbers) for v in given):
            found = operator.on_numbers(*values, **self._keywords(operator.on_numbers, more))
            if found is not NotImplemented:
                return found
        ready = [self._ready(value, place) for place, value in enumerate(values)]
        return operator.run(*ready, **self._keywords(operator.run, more))

    def _keywords(self, function: Any, more: Mapping[str, Any]) -> dict[str, Any]:
        wanted = _parameters(function)
        return {**self.attributes, **{name: value for name, value in more.items() if name in wanted}}

    def _ready(self, value: Any, place: int) -> Any:
        operator = OPERATORS[self.operator]
        if value is None or (isinstance(value, Numbers) and place in operator.either):
            return value
        if place in operator.numbers:
            if isinstance(value, Numbers):
                return value.flat()
            raise GraphError(
                f"its input {self.inputs[place]!r} is computed from the data, but must be known before; the graph must "
                "be the same for all samples: export the network without that"
            )
        return value.as_tensor() if isinstance(value, Numbers) else value

    def described(self) -> str:
        """Return the operator and the value that it computes."""
        return f"{self.operator}, which computes {self.outputs[0]!r},"


_KNOWN: dict[Any, frozenset[str]] = {}


def _parameters(function: Any) -> frozenset[str]:
    """Return the names of a function's keyword parameters; none for a function of torch itself."""
    if function not in _KNOWN:
        try:
            found = inspect.signature(function).parameters.values()
        except ValueError:
            found = ()
        _KNOWN[function] = frozenset(p.name for p in found if p.kind is p.KEYWORD_ONLY)
    return _KNOWN[function]


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else str(value.array.tolist())
