"""Open an exported file in ONNX Runtime, on CPU or GPU, or in OpenVINO."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import onnxruntime

from ..argument_checks import whole
from ..environment import require
from ..errors import FileError, InputError
from ..extras import needed_by
from ..files import check_path, check_utf8, regular
from .checksum import check_seal, check_weights
from .cpu_fallback import check_fallback, missing_provider, record_fallback
from .engine import Engine, Feeds, Graph, read_metadata
from .input_checks import Input, run_error
from .on_device import DeviceGraph, DeviceInput, Provider, RowPicker, picker_of
from .staged_engine import StagedEngine
from .staged_files import MANIFEST, read_manifest

if TYPE_CHECKING:
    from .verification import Verification

Runtime = Literal["onnxruntime", "openvino", "onnxruntime-cuda"]
RUNTIMES = get_args(Runtime)
_MOST_THREADS = 1024
_PROVIDERS = {"onnxruntime-cuda": ("CUDAExecutionProvider", "CPUExecutionProvider")}
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
}


def load(
    path: str | os.PathLike[str],
    threads: int | None = None,
    providers: Sequence[str | Provider] | None = None,
    runtime: Runtime = "onnxruntime",
    verify: bool = False,
) -> Engine:
    """Open a file that `export` wrote.

    Args:
        path: the ``.onnx`` file, or the folder that ``export(..., layout="stages")`` wrote.
        threads: threads within an operator; by default the runtime chooses.
        providers: ONNX Runtime execution providers, in order of preference, each a name or a pair of a name and its
            options; by default the CPU. With the CUDA or TensorRT provider first, inputs may be torch tensors on the
            GPU, and values stay there between stages. With the option ``"enable_cuda_graph": "1"``, each stage of a
            folder is recorded once per batch size; a nested file cannot be, because of its ``If``.
        runtime: what runs the graph. ``"openvino"`` runs on the CPU and needs ``pip install 'branchynet[openvino]'``;
            ``"onnxruntime-cuda"`` runs on an NVIDIA GPU and needs ``onnxruntime-gpu`` instead of ``onnxruntime``.
        verify: first compare the outputs for the samples stored in the file, as `verify` does.

    Returns:
        An `Engine`, or a `StagedEngine` for a folder; call it with a batch.

    Raises:
        FileError: the file does not exist, is damaged (its checksum differs), was not written by BranchyNet, cannot
            run in the runtime, or holds no samples to verify.
        VerificationError: with `verify`, the outputs differ from those stored in the file.
        InputError: threads outside 1..1024, an unknown runtime, malformed providers, or a first provider that this
            build of ONNX Runtime does not have or cannot use on this machine.
        MissingExtraError: `runtime` needs OpenVINO, or `verify` needs onnx, which is not installed.
        VersionError: the installed version of the runtime is known to be wrong.

    Example:
        >>> import torch
        >>> from branchynet import BranchyNet, Policy, export, load
        >>> from torch import nn
        >>> net = BranchyNet(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), {"1": nn.Linear(8, 3)})
        >>> export(net, "net.onnx", policy=Policy(thresholds=(2.0,)), example=torch.randn(2, 4)).name
        'net.onnx'
        >>> load("net.onnx")(torch.randn(5, 4)).exit.tolist()
        [1, 1, 1, 1, 1]
    """
    check_runtime(runtime)
    require(runtime.partition("-")[0])
    check_threads(threads)
    if runtime != "onnxruntime" and providers:
        raise InputError(f"providers are for runtime='onnxruntime'; {runtime!r} takes none, got {providers!r}")
    chosen = _pairs(providers or _PROVIDERS.get(runtime, "CPUExecutionProvider"))
    available = onnxruntime.get_available_providers()
    if missing := [name for name, _ in chosen if name not in available]:
        raise missing_provider(missing[0], available)
    check_path(path, "read")
    check_utf8(path)
    if not Path(path).exists():
        raise FileError(f"there is no file {path}; write one with export(...)")
    if (Path(path) / "model.onnx").is_file():
        raise FileError(f"cannot read {path}: it is a folder; load the file in it, {Path(path) / 'model.onnx'}")
    if Path(path).name == MANIFEST:
        raise FileError(f"{path} describes the stages of a network; load its folder, {Path(path).absolute().parent}")
    if Path(path).is_dir() and not (Path(path) / MANIFEST).exists():
        raise FileError(f"cannot read {path}: the folder has no {MANIFEST}; give a file or folder that export wrote")
    arguments = (str(Path(path).absolute()), threads, providers, runtime)
    picker = picker_of(chosen)
    if picker is not None and picker.device.kind == "cuda":
        onnxruntime.preload_dlls()  # CUDA and cuDNN as pip installs them, which ONNX Runtime does not find by itself
    if Path(path).is_dir() and (Path(path) / MANIFEST).exists():
        manifest, metadata = read_manifest(path)
        files = [Path(path) / stage.file for stage in manifest.stages]
        graphs = [_open_in(runtime, file, threads, chosen, picker) for file in files]
        sealed = "".join(stage.sha256 for stage in manifest.stages)
        engine = StagedEngine(runtime, manifest, metadata, graphs, (_reopened, (*arguments, sealed)))
    else:
        sealed = check_seal(regular(path))
        graph = _open_in(runtime, path, threads, chosen, picker)
        if stage := graph.metadata.get("stage"):
            folder = Path(path).absolute().parent
            raise FileError(f"{path} is stage {stage} of a staged network; load its folder, {folder}")
        engine = Engine(runtime, graph, (_reopened, (*arguments, sealed)))
    if verify:
        with needed_by("verify=True"):
            from .verification import check_or_raise
        check_or_raise(engine, path)
    return engine


def _open_in(
    runtime: str,
    path: str | os.PathLike[str],
    threads: int | None,
    providers: Sequence[Provider],
    picker: RowPicker | None,
) -> Graph:
    """Open one ONNX file in a runtime. Raise `FileError`."""
    if runtime != "openvino":
        graph = _open(path, threads, providers, picker)
        check_weights(path, graph.metadata)
        return graph
    with needed_by("runtime='openvino'", extra="openvino"):
        from .openvino_engine import open_in_openvino

        return open_in_openvino(path, threads)


def _reopened(path: str, threads: Any, providers: Any, runtime: Any, sealed: str | None) -> Engine:
    """Open the file of a pickled or copied engine. Raise `FileError` if its checksum is not `sealed`."""
    engine = load(path, threads, providers, runtime)
    if engine.__reduce__()[1][-1] != sealed:
        raise FileError(f"{path} has changed since this engine was opened; open the new file with load(...)")
    return engine


def verify(
    path: str | os.PathLike[str],
    threads: int | None = None,
    providers: Sequence[str | Provider] | None = None,
    runtime: Runtime = "onnxruntime",
) -> "Verification":
    """Compare the outputs on this machine and runtime with those stored in a file that `export` wrote.

    The stored samples leave at every exit in turn, then by the file's thresholds. An output may differ from the stored
    one by about a thousandth of the largest output of its class, not counting masked ones; for an int8 network, the
    mean over all samples may differ by twice the difference between int8 and float. If a score lies within 1e-5 of a
    threshold, either exit is right; if the two largest outputs lie within these tolerances, either label is right.
    Thresholds in the graph must equal those in the metadata.

    Args:
        path: the ``.onnx`` file.
        threads: as for `load`.
        providers: as for `load`.
        runtime: as for `load`.

    Returns:
        A `Verification`; see its ``passed`` and ``problems``.

    Raises:
        FileError: the file holds no samples, or as for `load`.
        InputError: as for `load`.
        MissingExtraError: onnx, or the extra that `runtime` needs, is not installed.

    Example:
        >>> import torch
        >>> from branchynet import BranchyNet, Policy, export, verify
        >>> from torch import nn
        >>> net = BranchyNet(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), {"1": nn.Linear(8, 3)})
        >>> path = export(net, "net.onnx", policy=Policy(thresholds=(0.5,)), example=torch.randn(2, 4))
        >>> verify(path).passed
        True
    """
    with needed_by("verify"):
        from .verification import check_file
    return check_file(load(path, threads, providers, runtime), path)


def check_runtime(runtime: Any) -> None:
    """Raise `InputError` for a runtime that is not one of `RUNTIMES`."""
    if runtime in ("torch", "torch-cuda"):
        device = ", device='cuda'" * (runtime == "torch-cuda")
        raise InputError(
            f"a file does not run in PyTorch, so runtime={runtime!r} opens none: use TorchEngine(net, policy, "
            f"example{device})"
        )
    if runtime not in RUNTIMES:
        raise InputError(f"unknown runtime {runtime!r}; it is one of {', '.join(RUNTIMES)}")


def check_threads(threads: Any) -> None:
    """Raise `InputError` for a number of threads outside 1..1024; None lets the runtime choose."""
    if threads is None:
        return
    if whole("threads", threads, 1) > _MOST_THREADS:
        raise InputError(f"threads must be at most {_MOST_THREADS}; got {threads}: give as many as there are cores")


def _pairs(providers: Any) -> list[Provider]:
    """Return providers with their options, from names and pairs, or a single one."""
    several = isinstance(providers, Sequence) and not isinstance(providers, str) and not _is_pair(providers)
    pairs: list[Any] = [p if _is_pair(p) else (p, {}) for p in (providers if several else [providers])]
    if wrong := [name for name, _ in pairs if not isinstance(name, str)]:
        raise InputError(f"providers must be names, or pairs of a name and a dict of options; got {wrong[0]!r}")
    return [(name, dict(options)) for name, options in pairs]


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[1], Mapping)


def _open(
    path: str | os.PathLike[str], threads: int | None, providers: Sequence[Provider], picker: RowPicker | None
) -> Graph:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.load_model_format", "ONNX")  # for any file name
    options.log_severity_level = 3  # the runtime warns of each input with a default, such as a threshold
    record_fallback(options, providers[0][0])
    if threads is not None:
        options.intra_op_num_threads = int(threads)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        properties = session.get_modelmeta().custom_metadata_map  # raises if it is not UTF-8
    except Exception as error:  # ONNX Runtime's errors share no base class
        with contextlib.suppress(ModuleNotFoundError):  # onnx, if installed, gives a better message
            from ..onnx_files import entries, read_model

            about = read_metadata(entries(read_model(path), path), path)
            if (about.get("precision") or {}).get("scheme") == "bf16":
                raise FileError(
                    f"{path} computes in bf16, which ONNX Runtime {onnxruntime.__version__} cannot with "
                    f"{providers[0][0]} ({_brief(error)}): load it with runtime='openvino', or export it with "
                    "precision='fp16'"
                ) from error
        if picker is not None and picker.device.recorded and "control flow" in str(error):
            raise InputError(
                f"enable_cuda_graph cannot record {path}, because of its exits (If): leave the option out, or export "
                "with layout='stages', whose stages can be recorded"
            ) from error
        version = onnxruntime.__version__
        raise FileError(f"ONNX Runtime {version} cannot run {path} ({_brief(error)}); export it again") from error
    check_fallback(session, providers[0][0], path)
    names = [output.name for output in session.get_outputs()]
    run: Any = getattr(session, "_sess", session).run  # skips checks that the engine has made
    required, metadata = session.get_inputs(), read_metadata(properties, path)
    device = None if picker is None else DeviceGraph(session, picker)

    def compute(feeds: Feeds) -> Sequence[Any]:
        try:
            return run(names, feeds, None) if device is None else device.run(feeds)
        except Exception as error:
            raise run_error("ONNX Runtime", feeds, metadata, error) from error

    return Graph(
        compute,
        tuple(_input(i, device) for i in (*required, *session.get_overridable_initializers())),
        frozenset(i.name for i in required),
        len(names),
        metadata,
        float32=session.get_providers() == ["CPUExecutionProvider"],
        device=device,
    )


def _input(value: Any, device: DeviceGraph | None) -> Input:
    shape = tuple(d if isinstance(d, int) else None for d in value.shape[1:])
    described = value.name, DTYPES.get(value.type, value.type), shape
    return Input(*described) if device is None else DeviceInput(*described, device.device.kind)


def _brief(error: Exception) -> str:
    text = str(error).splitlines()
    return text[0][:200] if text else type(error).__name__
