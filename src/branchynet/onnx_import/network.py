"""A PyTorch network that computes the graph of an ONNX file."""

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GraphError, InputError, nearest
from .constants import is_few, is_size
from .names import module_names
from .numbers import Numbers, known
from .places import SIZES_ONLY, block_ends
from .steps import Step

_SHOWN = 12  # places for exits


@dataclass(frozen=True)
class OnnxGraph:
    """What is read from a file.

    Attributes:
        inputs: the names of the inputs, with their shapes; None for a free dimension, or for a shape that is not given.
        dtypes: the types of the inputs.
        outputs: the names of the outputs.
        steps: the nodes that the outputs need, in order.
        constants: the constants that these read, by name.
        trained: the constants that become parameters.
        fixed_batch: the batch size in the shapes of the inputs; None if it is free.
    """

    inputs: Mapping[str, tuple[int | None, ...] | None]
    dtypes: Mapping[str, torch.dtype]
    outputs: tuple[str, ...]
    steps: tuple[Step, ...]
    constants: Mapping[str, Tensor]
    trained: Set[str]
    fixed_batch: int | None


class OnnxNetwork(nn.Module):
    """The network of an ONNX file, from `from_onnx`.

    Every value of the file that is computed from the inputs is a submodule, under a valid name that is made from the
    value's; ``print(net)`` lists them. Parameters and buffers are in the submodule ``weights``.

    Attributes:
        input_names: the names of the inputs, in order.
        output_names: the names of the outputs.
        places: the values at the ends of blocks, where exits make sense; `attach` takes other values too.
        value_names: for each submodule, the name of its value in the file.
        input_shapes: the shapes of the inputs in the file, as in `OnnxGraph`.
        input_dtypes: the types of the inputs.
        fixed_batch: the batch size that the file fixes; None if it is free.
        source: the path of the file.
    """

    def __init__(self, graph: OnnxGraph, source: Path) -> None:
        super().__init__()
        self.source = source
        self.input_names = tuple(graph.inputs)
        self.output_names = graph.outputs
        self.fixed_batch = graph.fixed_batch
        self.weights = _Weights(graph.constants, graph.trained)
        self._steps, self.input_shapes, self.input_dtypes = graph.steps, dict(graph.inputs), dict(graph.dtypes)
        data, uses = set(graph.inputs), Counter(name for step in graph.steps for name in step.inputs)
        uses.update(graph.outputs)
        computed: list[str] = []
        for step in graph.steps:
            if step.operator not in SIZES_ONLY and data & set(step.inputs):
                data.update(step.outputs)
                computed += [name for n, name in enumerate(step.outputs) if name and (uses[name] or not n)]
        # "input" is the tap at the network's input
        self._names = module_names(computed, ("input", "weights", "value_names", *vars(OnnxNetwork), *vars(self)))
        self.value_names = {name: value for value, name in self._names.items()}
        self._sizes = {name for step in graph.steps for name in step.outputs} - data
        self._uses = uses
        ends = block_ends(graph.steps, graph.inputs, graph.outputs, graph.trained)
        self.places = tuple(name for name in ends if name in self._names)
        for step in graph.steps:
            for value in step.outputs:
                if value in self._names:
                    alone = len(step.outputs) == 1
                    self.add_module(self._names[value], OnnxNode(step) if alone else OnnxOutput(step, value))

        self._read = self._marks()

    def _marks(self) -> list[tuple[int, int]]:
        return [(t.data_ptr(), t._version) for t in (*self.parameters(), *self.buffers())]

    def as_read(self) -> bool:
        """Whether the weights are still those of the file: not trained, moved or copied."""
        return self._marks() == self._read

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """Return the output, or several as a dict by name.

        Args:
            inputs: the inputs in the order of the file, each with the batch first.
            named: the inputs by name, instead of by order.

        Raises:
            InputError: an input is missing, unknown or does not fit.
            GraphError: an operator cannot be imported in this use.
        """
        bound = self.bound(inputs, named)
        try:
            found = self._outputs(bound)
        except (InputError, GraphError) as error:
            raise type(error)(f"{self.source}: {error}") from error
        return found if len(found) > 1 else next(iter(found.values()))

    def _outputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values: dict[str, Any] = {**self.weights.values(), **inputs}
        left = self._uses.copy()
        for step in self._steps:
            given = [values[name] if name else None for name in step.inputs]
            if len(step.outputs) == 1 and step.outputs[0] in self._names:
                found = (self.get_submodule(self._names[step.outputs[0]])(*given),)
            else:
                found = step.run(given, self.training)
            for value, tensor in zip(step.outputs, found, strict=False):
                several = len(step.outputs) > 1 and value in self._names
                values[value] = self.get_submodule(self._names[value])(tensor) if several else tensor
            for name in step.inputs:  # values that nothing reads any more free their memory
                left[name] -= 1
                if name and not left[name]:
                    values.pop(name, None)
        return {name: _as_tensor(values[name]) for name in self.output_names}

    def extra_repr(self) -> str:
        """Return inputs, outputs, and some places for exits."""
        chosen = self.places[:: 1 + len(self.places) // _SHOWN]
        more = (
            f", and {len(self.places) - len(chosen)} between them (.places)" if len(chosen) < len(self.places) else ""
        )
        places = ", ".join(map(repr, chosen)) + more or "none found"
        inputs = ", ".join(self.input_names)
        return f"inputs: {inputs}\noutputs: {', '.join(self.output_names)}\nplaces for exits: {places}"

    def submodule_name(self, value: str) -> str:
        """Return the name of the submodule that computes a value of the file; ``"input"`` for the first input.

        Args:
            value: the name of the value in the file, or of the submodule itself.

        Raises:
            InputError: there is no such value (the nearest is suggested), or it is a constant, a size, or a further
                input.
        """
        if value in self._names:
            return self._names[value]
        if value in self.value_names or value in ("input", self.input_names[0]):
            return value if value in self.value_names else "input"
        if value in self.input_names:
            raise InputError(
                f"{value!r} is an input; of the inputs, only the first, {self.input_names[0]!r}, has a tap"
            )
        if value in self.weights.names:
            raise InputError(
                f"{value!r} is a constant of the file, such as a weight; name a value that a node computes"
            )
        if value in self._sizes:
            raise InputError(
                f"{value!r} is computed from sizes or weights alone and is the same for all samples; name a value that "
                "depends on the inputs"
            )
        hint = nearest(str(value), dict.fromkeys([*self._names, *self.value_names]))
        raise InputError(
            f"the file computes no value {value!r}{hint} (print(from_onnx(path)) lists all values and places)"
        )

    def bound(self, inputs: Sequence[Tensor], named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs of a call of `forward` by name. Raises `InputError` as `forward` does."""
        names = ", ".join(self.input_names)
        if len(inputs) > len(self.input_names):
            raise InputError(f"the file has the inputs {names}; got {len(inputs)} values")
        bound = dict(zip(self.input_names, inputs, strict=False))
        for name, value in named.items():
            if name not in self.input_names or name in bound:
                what = "twice" if name in bound else f"which is no input{nearest(name, self.input_names)}"
                raise InputError(f"the network was called with {name!r}, {what}; the file has the inputs {names}")
            bound[name] = value
        if missing := [name for name in self.input_names if name not in bound]:
            raise InputError(f"the network was called without {missing[0]!r}; the file has the inputs {names}")
        for name, value in bound.items():
            shape = self.input_shapes[name]
            if not isinstance(value, Tensor):
                raise InputError(f"the input {name!r} must be a tensor; got {type(value).__name__}")
            if shape is not None and value.dim() != len(shape):
                wanted = ", ".join("?" if size is None else str(size) for size in shape)
                raise InputError(f"the input {name!r} has shape {tuple(value.shape)}; the file needs ({wanted})")
        return bound


class OnnxNode(nn.Module):
    """A node of the graph with one output."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, *values: Any) -> Tensor:
        """Return the output for the values that the node reads; None for one that is left out."""
        return _as_tensor(self.step.run(values, self.training)[0])

    def extra_repr(self) -> str:
        """Return the operator, what it reads, and the value's name in the file."""
        return f"{self.step.operator}({', '.join(self.step.inputs)}) -> {self.step.outputs[0]}"


class OnnxOutput(nn.Module):
    """One output of a node with several. It returns its input, so that exits can read it."""

    def __init__(self, step: Step, value: str) -> None:
        super().__init__()
        self.step, self.value = step, value

    def forward(self, value: Tensor) -> Tensor:
        """Return the value."""
        return value

    def extra_repr(self) -> str:
        """Return the operator, what it reads, and the value's name in the file."""
        return f"{self.step.operator}({', '.join(self.step.inputs)}) -> {self.value}"


class _Weights(nn.Module):
    """The constants of a file: parameters, and buffers for those that are not trained."""

    def __init__(self, constants: Mapping[str, Tensor], trained: Set[str]) -> None:
        super().__init__()
        self.names = module_names(constants, ("names", "numbers"))
        self.numbers: dict[str, Numbers] = {}
        for value, name in self.names.items():
            tensor = constants[value]
            if value in trained:
                self.register_parameter(name, nn.Parameter(tensor))
                continue
            if is_few(tensor):
                self.numbers[value] = replace(known(tensor), tensor=None)
            if tensor.is_floating_point() or not is_size(tensor):
                self.register_buffer(name, tensor)

    def values(self) -> dict[str, Any]:
        """Return all constants by their names in the file."""
        found: dict[str, Any] = {}
        device = next((t.device for t in (*self.parameters(), *self.buffers())), torch.device("cpu"))
        for value, name in self.names.items():
            tensor, numbers = getattr(self, name, None), self.numbers.get(value)
            if numbers is not None:
                dtype = numbers.dtype if tensor is None else tensor.dtype
                found[value] = replace(numbers, tensor=tensor, device=device, dtype=dtype)
            else:
                found[value] = tensor
        return found


def _as_tensor(value: Any) -> Tensor:
    return value.as_tensor() if isinstance(value, Numbers) else value
