"""Refuse programs that ONNX files cannot hold, or that runtimes cannot compute, before the slow conversion."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ..errors import GraphError
from .torch_flat import place_of
from .torch_program import name_of, readable_path

_COMPUTED = {torch.float16, torch.float32, torch.float64, torch.bool, torch.uint8, torch.uint16, torch.uint32}
_COMPUTED |= {torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64}
_ALTERNATIVE = "or run the network in PyTorch, with branchynet.deploy.torch_engine.TorchEngine"


def check_writable(exported: torch.export.ExportedProgram, inputs: Sequence[str]) -> None:
    """Check that a program can be written as an ONNX file that a runtime opens.

    Args:
        exported: the program, before conversion.
        inputs: the names of its inputs.

    Raises:
        GraphError: an input is complex; a dtype is one that ONNX Runtime cannot compute, such as bfloat16; or an LSTM
            projects its state.
    """
    signature = exported.graph_signature
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names = {node: f"the weight {readable_path(path)!r}" for node, path in stored.items()}
    names |= {node: f"the input {name!r}" for node, name in zip(signature.user_inputs, inputs, strict=True)}
    for node in exported.graph.nodes:
        if not node.users or node.op == "output":
            continue
        _check_types(node, names.get(node.name, f"{name_of(node)!r}{place_of(node)}"))
        if node.target is torch.ops.aten.lstm.input:
            _check_lstm(node)


def _check_types(node: fx.Node, what: str) -> None:
    for value in tree_leaves(node.meta.get("val")):
        dtype = value.dtype if isinstance(value, Tensor) else torch.float32
        name = str(dtype).removeprefix("torch.")
        if dtype.is_complex and node.op == "placeholder":
            raise GraphError(
                f"{what} is {name}, and files cannot hold complex numbers: give the network real and imaginary parts, "
                f"{_ALTERNATIVE}"
            )
        if not dtype.is_complex and dtype not in _COMPUTED:
            raise GraphError(
                f"{what} is {name}, in which ONNX Runtime and OpenVINO cannot compute on a CPU: export "
                f"a copy in another type (copy.deepcopy(net).float(), with an example of float32), {_ALTERNATIVE}"
            )


def _check_lstm(node: fx.Node) -> None:
    states: Any = node.args[1]
    hidden, cell = (state.meta["val"].shape[-1] for state in states)
    if hidden != cell:
        raise GraphError(
            f"the LSTM{place_of(node)} projects its state from {cell} to {hidden} (proj_size={hidden}), which ONNX's "
            f"LSTM does not: leave proj_size out and put an nn.Linear after it, {_ALTERNATIVE}"
        )
