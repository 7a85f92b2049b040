"""Compare an imported network with ONNX Runtime."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import torch
from torch import Tensor

from ..errors import GraphError, first_line
from ..onnx_files import read_model
from .network import OnnxNetwork

# Largest difference, as a share of the largest number of a value. PyTorch and ONNX Runtime round sums in another order;
# over some hundred layers that grows to a thousandth in float32. A wrong operator changes far more.
TOLERANCE = 3e-3
HALF_TOLERANCE = 1e-1  # float16 rounds 8,000 times as coarsely, but ONNX Runtime computes much of it in float32
_DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64"}


@torch.no_grad()
def check_answers(network: OnnxNetwork, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Compare a network with its file in ONNX Runtime; warn if the runtime cannot compute the file.

    A network whose weights have changed since they were read, or were moved, is not compared.

    Args:
        network: in eval mode.
        args: one batch of inputs.
        kwargs: further inputs by name.

    Raises:
        GraphError: an output differs by more than `TOLERANCE`; it names the first value of the file that does.
    """
    if not network.as_read():
        return
    inputs = network.bound(args, kwargs)
    if network.fixed_batch:
        inputs = {name: t[torch.arange(network.fixed_batch) % len(t)] for name, t in inputs.items()}
    ours = _ours(network, inputs)
    try:
        theirs = _theirs(network, inputs, network.output_names)
    except Exception as error:  # the runtime's errors have no common class
        warnings.warn(
            f"ONNX Runtime cannot compute {network.source} for the example ({first_line(error)}), so the imported "
            "network is not compared with it: compare some answers yourself",
            stacklevel=3,
        )
        return
    wrong = _first_wrong(network.output_names, ours, theirs)
    if wrong is None:
        return
    values = [name for name in network.value_names.values() if name in ours]
    try:
        found = _first_wrong(values, ours, _theirs(network, inputs, values))
    except Exception:  # the output is named instead
        found = None
    name, how = found or wrong
    raise GraphError(
        f"{network.source}: the imported network gives other numbers than ONNX Runtime, first in {name!r} ({how}); "
        "export the network again without the node that computes it, or give the PyTorch network itself"
    )


def _ours(network: OnnxNetwork, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the outputs and all values that are submodules."""
    found: dict[str, Tensor] = {}
    hooks = [
        network.get_submodule(name).register_forward_hook(lambda _m, _i, y, value=value: found.update({value: y}))
        for name, value in network.value_names.items()
    ]
    try:
        network(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _theirs(network: OnnxNetwork, inputs: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return values of the file in ONNX Runtime, without its rewrites."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    source = onnx.load(network.source, format="protobuf", load_external_data=False)
    file: str | bytes = str(network.source)
    if missing := set(names) - {one.name for one in source.graph.output}:
        model = read_model(network.source)
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name in missing)
        file = model.SerializeToString()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    kinds = {one.name: one.type for one in session.get_inputs()}
    feeds = {
        name: t.numpy().astype(_DTYPES.get(kinds[name], kinds[name].removeprefix("tensor(").rstrip(")")))
        for name, t in inputs.items()
        if name in kinds
    }
    returned: list[Any] = list(session.run(list(names), feeds))
    return dict(zip(names, returned, strict=True))


def _first_wrong(
    names: Iterable[str], ours: Mapping[str, Tensor], theirs: Mapping[str, np.ndarray]
) -> tuple[str, str] | None:
    """Return the first value that differs, and how; None if all agree."""
    for name in names:
        if how := _difference(ours[name].numpy(), theirs[name]):
            return name, how
    return None


def _difference(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Say how two values differ; empty if they agree."""
    if ours.shape != theirs.shape:
        return f"its shape is {ours.shape} instead of {theirs.shape}"
    if not ours.size:
        return ""
    if theirs.dtype.kind != "f":  # rounding may flip a few
        share = float(np.mean(ours != theirs))
        return f"{share:.1%} of its elements differ" if share > TOLERANCE else ""
    limit = HALF_TOLERANCE if theirs.dtype == np.float16 else TOLERANCE
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return "other elements are infinite or not a number"
    apart, largest = np.abs(a - b)[finite].max(initial=0.0), np.abs(b)[finite].max(initial=0.0)
    return f"by {apart:.3g}, and its largest number is {largest:.3g}" if apart > limit * largest else ""
