"""Trace one forward pass of a network: what each operation reads, what each submodule returns, and what it costs.

The trace contains only tensors and operations, so it works for any architecture.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from ..errors import GraphError
from .unsupported import scripted_submodule

aten = torch.ops.aten
# Operations that show which dimension of their input holds the features: the second, or the last.
_SECOND = {"convolution", "native_batch_norm", "_native_batch_norm_legit_no_training", "native_group_norm",
           "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "upsample_nearest2d",
           "upsample_bilinear2d"}  # fmt: skip
_LAST = {"native_layer_norm", "addmm", "mm"}


@dataclass(frozen=True)
class Layout:
    """Sizes and strides of a tensor, to compare views of the same memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """One operation of a forward pass.

    Attributes:
        name: the name of the operation.
        read: number and layout of each value that it read.
        gave: layout of its output, if any.
        data: whether its output depends on inputs.
        weighed: whether its output depends on parameters. With `data`, it is a feature, not only a mask or a weight.
        macs: multiply-accumulates so far, including this operation.
    """

    name: str
    read: tuple[tuple[int, Layout], ...]
    gave: Layout | None
    data: bool
    weighed: bool
    macs: float


@dataclass(frozen=True)
class ModuleOutput:
    """The output of a submodule.

    Attributes:
        name: the name of the submodule.
        features: the tensor that the function for reading this tap returns from the output; None if it finds none.
        node: the number of the operation that computed it.
        time: the position in the trace: how many operations had run when the submodule returned.
    """

    name: str
    features: Tensor | None
    node: int
    time: int


class Trace(TorchDispatchMode):
    """The operations of one forward pass, in order. A view counts as the tensor that it is a view of.

    Attributes:
        operations: all operations, by number; inputs and parameters are included.
        moments: the outputs of submodules, in the order in which they return.
    """

    supports_higher_order_operators = True  # they are dispatched here, and refused by name

    def __init__(self, parameters: Iterable[Tensor], inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.moments: list[ModuleOutput] = []
        self._latest: dict[int, int] = {}  # memory address -> the operation that wrote it last
        self._kept: list[Any] = []  # keeps tensors alive, because freed addresses are reused
        for parameter in parameters:
            self._add("parameter", (), [parameter], weighed=True)
        for given in inputs:
            self._add("input", (), [given], data=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and record it."""
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            raise GraphError(
                f"the network holds torch's {func.name()!r}, control flow that depends on tensor values or an operator "
                "that takes functions; its graph must be the same for all samples: use torch.where"
            )
        out = func(*args, **kwargs)
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        known = {_memory(t) for t in read}
        fresh = made if func._schema.is_mutable else [t for t in made if _memory(t) not in known]  # others are views
        reads = tuple((self.node(t), _layout(t)) for t in read)
        self._add(func._overloadpacket.__name__, reads, fresh, macs=_macs(func, args, kwargs, out))
        return out

    def node(self, tensor: Tensor) -> int:
        """Return the number of the operation that last wrote this tensor's memory."""
        found = self._latest.get(_memory(tensor))
        return self._add("constant", (), [tensor]) if found is None else found

    def _add(
        self,
        name: str,
        read: tuple[tuple[int, Layout], ...],
        made: Sequence[Tensor],
        *,
        data: bool = False,
        weighed: bool = False,
        macs: float = 0.0,
    ) -> int:
        parents = [self.operations[n] for n, _ in read]
        data, weighed = data or any(p.data for p in parents), weighed or any(p.weighed for p in parents)
        before = self.operations[-1].macs if self.operations else 0.0
        number = len(self.operations)
        gave = _layout(made[0]) if made else None
        self.operations.append(Operation(name, read, gave, data, weighed, before + macs))
        for tensor in made:
            self._latest[_memory(tensor)] = number
            self._kept.append(tensor)
        return number

    def needed_until(self, output: int) -> dict[int, int]:
        """For every operation that `output` depends on, return the last such operation that reads it."""
        until = {output: len(self.operations)}
        for number in range(output, -1, -1):
            if number in until:
                for parent, _ in self.operations[number].read:
                    if parent != number:
                        until[parent] = max(until.get(parent, 0), number)
        return until

    def feature_dim(self, moment: ModuleOutput) -> int | None:
        """Return the dimension that holds the features of a submodule's output, inferred from its next readers."""
        assert moment.features is not None
        shape, views = tuple(moment.features.shape), {moment.node: _layout(moment.features)}
        for number, operation in enumerate(self.operations[moment.time :], moment.time):
            for read, layout in operation.read:
                if read not in views:
                    continue
                dims = _matched(views[read], layout)
                place = 1 if operation.name in _SECOND else -1 if operation.name in _LAST else None
                if place is not None and len(layout.shape) > 1:
                    found = dims.get(place % len(layout.shape))
                    if found is not None and found > 0:
                        return found
                gave = operation.gave
                if gave is not None and gave.shape == layout.shape and number not in views:
                    strides = {dims[d]: gave.stride[d] for d in dims}  # followed through what changes no shape
                    views[number] = Layout(shape, tuple(strides.get(d, 0) for d in range(len(shape))))
        return None


@contextmanager
def tracing(backbone: nn.Module, inputs: Iterable[Any], tensor: Callable[[str, Any], Tensor | None]) -> Iterator[Trace]:
    """Trace the forward passes of `backbone` in the block.

    Args:
        backbone: the network; the trace distinguishes its parameters from other constants.
        inputs: the inputs of the forward pass.
        tensor: returns the tensor in a named submodule's output, or None.
    """
    survey = Trace(backbone.parameters(), [t for t in tree_leaves(list(inputs)) if isinstance(t, Tensor)])

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def returned(_module: nn.Module, _args: Any, output: Any) -> None:
            features = tensor(name, output)
            node = -1 if features is None else survey.node(features)
            survey.moments.append(ModuleOutput(name, features, node, len(survey.operations)))

        return returned

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in backbone.named_modules()
        if name and scripted_submodule(backbone, name) is None
    ]
    try:
        with survey:
            yield survey
    finally:
        for handle in handles:
            handle.remove()


def _matched(known: Layout, view: Layout) -> dict[int, int]:
    """Map dimensions of `view` to dimensions of `known`, a view of the same memory."""
    places = {key: d for d, key in enumerate(zip(known.shape, known.stride, strict=True)) if key[0] > 1}
    return {d: places[key] for d, key in enumerate(zip(view.shape, view.stride, strict=True)) if key in places}


def _layout(tensor: Tensor) -> Layout:
    return Layout(tuple(tensor.shape), tensor.stride() if tensor.layout is torch.strided else ())


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _macs(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    packet = func._overloadpacket
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:  # missing in the registry
        return sdpa_flop_count(*(tuple(t.shape) for t in args[:3])) / 2
    if packet in (aten.mkldnn_rnn_layer, aten._cudnn_rnn):  # also missing: a step uses all weights of input and state
        weights = args[1] if isinstance(args[1], (list, tuple)) else args[1:3]
        return args[0].shape[0] * args[0].shape[1] * float(sum(w.numel() for w in weights if w.dim() == 2))
    return flop_registry[packet](*args, **kwargs, out_val=out) / 2 if packet in flop_registry else 0.0
