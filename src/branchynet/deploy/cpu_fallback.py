"""Check that ONNX Runtime runs a graph where the caller asked for, because it continues on the CPU if it cannot."""

import os
import re
import warnings
from collections.abc import Sequence
from typing import Any

from ..errors import InputError

_RECORD = "session.record_ep_graph_assignment_info"
# Operators whose place matters. ONNX Runtime computes shapes on the CPU on purpose.
_HEAVY = re.compile(r"Conv|MatMul|Gemm|Attention|Einsum|LSTM|GRU|RNN|Pool|Norm|Softmax|Resize")
_CPU = "CPUExecutionProvider"


def missing_provider(name: str, available: Sequence[str]) -> InputError:
    """Return the error for a provider that this build of ONNX Runtime does not have."""
    remedy = ""
    if name in ("CUDAExecutionProvider", "TensorrtExecutionProvider"):
        remedy = ": for an NVIDIA GPU, install onnxruntime-gpu instead of onnxruntime"
    return InputError(f"ONNX Runtime here has no {name!r}; it has {list(available)}{remedy}")


def record_fallback(options: Any, provider: str) -> None:
    """Let a session with these options remember where its nodes run."""
    if provider != _CPU:
        options.add_session_config_entry(_RECORD, "1")


def check_fallback(session: Any, provider: str, path: str | os.PathLike[str]) -> None:
    """Raise `InputError` if a session does not use a provider; warn if it runs expensive nodes on the CPU instead."""
    if provider not in session.get_providers():  # it continues without, with a line in its log
        raise InputError(
            f"ONNX Runtime cannot use {provider!r} on this machine, only {session.get_providers()}; its log names the "
            "missing part, such as a driver that is too old, or libraries of CUDA or cuDNN that are not installed"
        )
    if provider == _CPU or not hasattr(session, "get_provider_graph_assignment_info"):
        return
    placed = [
        (part.ep_name, node.op_type)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    heavy = [operator for name, operator in placed if name == _CPU and _HEAVY.search(operator)]
    if heavy:
        warnings.warn(
            f"{path} runs {len(heavy)} of its {len(placed)} nodes on the CPU instead of {provider} "
            f"({', '.join(sorted(set(heavy)))}), so values travel between both: export it in a precision that the "
            "provider computes in, or use a newer ONNX Runtime",
            stacklevel=4,
        )
