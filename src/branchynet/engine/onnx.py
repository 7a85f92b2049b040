"""Opening an exported file: in ONNX Runtime here, on CPU or GPU, and in OpenVINO where that is asked for."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnxruntime

from ..errors import FileError, InputError
from ..files import regular
from .checks import Input
from .exported import FORMAT as FORMAT
from .exported import METADATA_KEY as METADATA_KEY
from .exported import Engine, read_metadata
from .openvino import open_in_openvino
from .seal import check_seal

Runtime = Literal["onnxruntime", "openvino", "onnxruntime-cuda"]
RUNTIMES = get_args(Runtime)
_PROVIDERS = {"onnxruntime-cuda": ("CUDAExecutionProvider", "CPUExecutionProvider")}
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


def load(
    path: str | os.PathLike[str],
    threads: int | None = None,
    providers: Sequence[str] | None = None,
    runtime: Runtime = "onnxruntime",
) -> Engine:
    """Open a file that `export` wrote.

    Args:
        path: the ``.onnx`` file.
        threads: threads within an operator; by default as many as the runtime chooses.
        providers: ONNX Runtime execution providers, in order of preference; by default the CPU.
        runtime: what runs the graph. ``"openvino"``, on the CPU, needs ``pip install 'branchynet[openvino]'``;
            ``"onnxruntime-cuda"`` is ONNX Runtime on an NVIDIA GPU and needs ``onnxruntime-gpu`` in its place.

    Raises:
        FileError: no such file, or it is damaged (see its checksum), or BranchyNet did not write it, or the runtime
            cannot run it.
        InputError: threads below 1, an unknown runtime, or a first provider that this build of ONNX Runtime does not
            have or cannot use on this machine.
        MissingExtraError: OpenVINO is not installed.
    """
    if runtime not in RUNTIMES:
        raise InputError(f"unknown runtime {runtime!r}; it is one of {', '.join(RUNTIMES)}")
    if threads is not None and threads < 1:
        raise InputError(f"threads must be at least 1; got {threads}")
    if runtime != "onnxruntime" and providers:
        raise InputError(f"providers are for runtime='onnxruntime'; {runtime!r} takes none, got {providers!r}")
    default = _PROVIDERS.get(runtime, ("CPUExecutionProvider",))
    providers = [providers] if isinstance(providers, str) else list(providers or default)
    missing = [p for p in providers if p not in onnxruntime.get_available_providers()]
    if missing:
        raise InputError(f"ONNX Runtime here has no {missing[0]!r}; it has {onnxruntime.get_available_providers()}")
    if not Path(path).exists():
        raise FileError(f"there is no file {path}; write one with export(...) or `branchynet export`")
    check_seal(regular(path))
    return open_in_openvino(path, threads) if runtime == "openvino" else _open(path, threads, providers, runtime)


def _open(path: str | os.PathLike[str], threads: int | None, providers: Sequence[str], runtime: str) -> Engine:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # thresholds are inputs with defaults on purpose; the runtime warns of each
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime's errors share no base class of their own
        raise FileError(
            f"{path} is no ONNX file that ONNX Runtime can open ({_brief(error)}); export it again"
        ) from error
    if providers[0] not in session.get_providers():  # it goes on without, and says so only in a log
        raise InputError(
            f"ONNX Runtime cannot use {providers[0]!r} on this machine, only {session.get_providers()}; its log tells "
            "what is missing"
        )
    metadata = read_metadata(session.get_modelmeta().custom_metadata_map, path)
    inputs = [
        Input(i.name, _DTYPES.get(i.type, i.type), tuple(d if isinstance(d, int) else None for d in i.shape[1:]))
        for i in session.get_inputs()
    ]
    names = [output.name for output in session.get_outputs()]
    run: Any = partial(session.run, names)  # typed as sparse tensors and maps too, which our files never hold
    required = metadata["thresholds"] == "input"
    return Engine(runtime, run, inputs, len(names), metadata, feeds_thresholds=required)


def _brief(error: Exception) -> str:
    text = str(error).splitlines()
    return text[0][:200] if text else type(error).__name__
