"""Write what other servers need to serve an exported model: Triton, OpenVINO Model Server, Docker and KServe.

Sources: Triton's `model configuration
<https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md>`_, OpenVINO Model
Server's `parameters <https://docs.openvino.ai/2025/model-server/ovms_docs_parameters.html>`_, and KServe's
`InferenceService <https://kserve.github.io/website/docs/reference/crd-api>`_.
"""

import contextlib
import glob
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..argument_checks import whole
from ..environment import __version__
from ..errors import FileError, InputError
from ..files import WEIGHTS, AnyPath, check_path, make_folder, partial, replacing
from .engine import Engine
from .loading import load
from .staged_engine import StagedEngine
from .staged_files import MANIFEST, StageEntry, read_manifest

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_KUBERNETES = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")  # RFC 1035
_TYPES = {
    "bool": "TYPE_BOOL",
    **{f"{sign}int{bits}": f"TYPE_{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"TYPE_FP{bits}" for bits in (16, 32, 64)},
}
_Tensor = tuple[str, str, tuple[int | None, ...]]  # name, numpy's dtype, shape without the batch


def triton_repository(model: AnyPath, folder: AnyPath, *, name: str = "model", max_batch: int = 64) -> Path:
    """Write a model repository for NVIDIA Triton.

    A nested file becomes one model with dynamic batching. If it was exported with ``thresholds="input"``, requests also
    give ``threshold_n``, `(B, 1)` float32. A folder of stages becomes a model per stage, and a Python model `name` that
    runs them and has ``threshold_n`` as optional inputs. Triton's ensembles run every step for every sample, so they
    cannot leave early. ``label``, ``exit`` and ``score`` are `(B, 1)`, because Triton's tensors have a dimension
    besides the batch.

    Args:
        model: a file or folder that `export` wrote.
        folder: the repository to write, which must not exist.
        name: the name of the model in Triton.
        max_batch: the most samples in a batch.

    Returns:
        `folder`.

    Raises:
        InputError: `folder` exists, or the model does not fit: it has free lengths, reads one sample per call, or has
            no exits.
        FileError: the model cannot be read, or the repository cannot be written.

    Example:
        >>> import torch
        >>> from branchynet import BranchyNet, Policy, export
        >>> from branchynet.deploy.other_servers import triton_repository
        >>> from torch import nn
        >>> net = BranchyNet(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), {"1": nn.Linear(8, 3)})
        >>> path = export(net, "net.onnx", policy=Policy(thresholds=(0.5,)), example=torch.randn(2, 4))
        >>> sorted(file.name for file in triton_repository(path, "repository").rglob("*.*"))
        ['config.pbtxt', 'model.onnx']
    """
    whole("max_batch", max_batch, 1)
    engine, source = _opened(model, name), Path(model)
    inputs = [(i.name, str(i.dtype), i.shape) for i in engine.inputs]
    thresholds = [] if engine.policy is None else engine.policy.thresholds
    settable: list[_Tensor] = [(f"threshold_{n}", "float32", ()) for n, t in enumerate(thresholds, 1) if t is not None]
    tail = tuple(engine.metadata["output_shape"])
    answers = ("label", "int64", tail[1:]), ("exit", "int64", ()), ("score", "float32", ()), ("output", "float32", tail)
    labels = "".join(f"{label}\n" for label in engine.labels)
    with _new_folder(folder) as top:
        if isinstance(engine, StagedEngine):
            manifest, _ = read_manifest(source)
            for n, stage in enumerate(manifest.stages, 1):
                config = _onnx_config(f"{name}_stage_{n}", max_batch, *_tensors_of(stage))
                _write_model(top / f"{name}_stage_{n}", config, source / stage.file)
            config = _config(name, "python", max_batch, inputs, answers, settable, bool(labels), reshape=False)
            _write_model(top / name, config, Path(__file__).with_name("triton_model.py"), "model.py", labels)
            shutil.copyfile(source / MANIFEST, top / name / "1" / MANIFEST)
        else:
            given = settable if engine.metadata["thresholds"] == "input" else []
            config = _onnx_config(name, max_batch, [*inputs, *given], answers, bool(labels))
            _write_model(top / name, config, source, "model.onnx", labels)
    return Path(folder)


def openvino_server(model: AnyPath, folder: AnyPath, *, name: str = "model") -> Path:
    """Write the folder of OpenVINO Model Server: ``config.json``, and the model as ``NAME/1/model.onnx``.

    The server answers each request as it comes, at any batch size. Thresholds are those of the file; if it was exported
    with ``thresholds="input"``, requests give them.

    Args:
        model: a file that `export` wrote.
        folder: the folder to write, which must not exist.
        name: the name of the model in the server.

    Returns:
        `folder`.

    Raises:
        InputError: `folder` exists, or the model does not fit: it is a folder of stages, has free lengths, reads one
            sample per call, or has no exits.
        FileError: the model cannot be read, or the folder cannot be written.
    """
    if isinstance(_opened(model, name), StagedEngine):
        raise InputError(
            f"{model} is a folder of stages, and the pipelines of OpenVINO Model Server run every stage for every "
            "sample; export with layout='nested'"
        )
    config = {"name": name, "base_path": name, "target_device": "CPU", "plugin_config": {"NUM_STREAMS": "1"}}
    with _new_folder(folder) as top:
        _copy_model(Path(model), top / name / "1" / "model.onnx")
        _write(top / "config.json", json.dumps({"model_config_list": [{"config": config}]}, indent=2) + "\n")
    return Path(folder)


def docker_context(model: AnyPath, folder: AnyPath, *, name: str = "model") -> Path:
    """Write a folder with a Dockerfile and the model, for an image that runs ``branchynet serve``.

    The image holds no PyTorch, runs as an unprivileged user, and reports its health. It serves HTTP at port 8000 and
    gRPC at port 8001.

    Args:
        model: a file or folder that `export` wrote.
        folder: the folder to write, which must not exist.
        name: the name of the model in the server.

    Returns:
        `folder`.

    Raises:
        InputError: `folder` exists.
        FileError: the model cannot be read, or the folder cannot be written.
    """
    _check_name(name)
    load(model)
    with _new_folder(folder) as top:
        if Path(model).is_dir():
            manifest, _ = read_manifest(model)
            for stage in manifest.stages:
                _copy_model(Path(model) / stage.file, top / "models" / name / stage.file)
            shutil.copyfile(Path(model) / MANIFEST, top / "models" / name / MANIFEST)
        else:
            _copy_model(Path(model), top / "models" / f"{name}.onnx")
        _write(top / "Dockerfile", _DOCKERFILE)
    return Path(folder)


def kserve(path: AnyPath, *, image: str, name: str = "model") -> Path:
    """Write an InferenceService for KServe, in YAML, that runs an image made from `docker_context`.

    Args:
        path: the file to write, which must not exist.
        image: the name of the image in a registry.
        name: the name of the service: lower-case letters, digits and hyphens, as Kubernetes asks.

    Returns:
        `path`.

    Raises:
        InputError: `path` exists, or a name is not allowed.
        FileError: the file cannot be written.

    Example:
        >>> from branchynet.deploy.other_servers import kserve
        >>> print(kserve("service.yaml", image="registry.example/digits:1", name="digits").read_text().splitlines()[0])
        apiVersion: serving.kserve.io/v1beta1
    """
    if not _KUBERNETES.fullmatch(name):
        raise InputError(f"the name of a service has at most 63 lower-case letters, digits and hyphens; got {name!r}")
    if not image or not image.isascii() or not image.isprintable() or " " in image:
        raise InputError(f"image must be the name of an image, such as registry.example/digits:1; got {image!r}")
    check_new(path)
    with replacing(path) as temporary:
        _write(temporary, _SERVICE.format(name=name, image=json.dumps(image)))
    return Path(path)


def _opened(model: AnyPath, name: str) -> Engine:
    """Open a model that other servers can run."""
    _check_name(name)
    engine = load(model)
    if engine.policy is None:
        raise InputError(f"{model} was exported with policy=None and has no exits; export it with a policy")
    if engine.lengths:
        raise InputError(f"{model} has free lengths, which this server does not batch; export it with free='batch'")
    if engine.metadata["batch"] == 1:
        raise InputError(f"{model} reads one sample per call, so no server can batch; export it with free='batch'")
    return engine


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f"the name of a model has letters, digits, '_', '.' and '-'; got {name!r}")


def check_new(path: AnyPath) -> None:
    """Raise `InputError` if something is at `path`."""
    """Raise `InputError` if something is at `path`."""
    check_path(path, "write")
    if os.path.lexists(path):
        raise InputError(f"{path} exists; give another path, or remove it")


@contextlib.contextmanager
def _new_folder(path: AnyPath) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to `path`, which must not exist, if the block succeeds."""
    check_new(path)
    final = Path(path).absolute()
    make_folder(final.parent, path)
    with partial(final, path, folder=True) as temporary:
        yield temporary
        os.umask(mask := os.umask(0))
        temporary.chmod(0o777 & ~mask)
        temporary.rename(final)


def _copy_model(source: Path, target: Path) -> None:
    """Copy a model and the weights beside it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    for weights in source.parent.glob(f"{glob.escape(source.name)}.*{WEIGHTS}"):
        shutil.copyfile(weights, target.with_name(weights.name))  # the model refers to this name


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _write_model(folder: Path, config: str, source: Path, file: str = "model.onnx", labels: str = "") -> None:
    """Write a model of Triton's: its configuration, and version 1."""
    _copy_model(source, folder / "1" / file)
    _write(folder / "config.pbtxt", config)
    if labels:
        _write(folder / "labels.txt", labels)


def _tensors_of(stage: StageEntry) -> tuple[list[_Tensor], list[_Tensor]]:
    found = [[(v.name, v.dtype, v.shape) for v in values] for values in (stage.inputs, stage.outputs)]
    return found[0], found[1]


def _onnx_config(
    name: str, max_batch: int, inputs: Iterable[_Tensor], outputs: Iterable[_Tensor], labels: bool = False
) -> str:
    threads = 'parameters { key: "intra_op_thread_count" value { string_value: "1" } }\n'
    return _config(name, "onnxruntime", max_batch, inputs, outputs, (), labels) + threads


def _config(
    name: str,
    backend: str,
    max_batch: int,
    inputs: Iterable[_Tensor],
    outputs: Iterable[_Tensor],
    optional: Sequence[_Tensor] = (),
    labels: bool = False,
    reshape: bool = True,
) -> str:
    """Return a ``config.pbtxt``, in protobuf's text format."""
    lines = [f"name: {_quoted(name)}", f"backend: {_quoted(backend)}", f"max_batch_size: {max_batch}"]
    lines += [_field("input", tensor, reshape) for tensor in inputs]
    lines += [_field("input", tensor, reshape, " optional: true") for tensor in optional]
    for tensor in outputs:
        extra = ' label_filename: "labels.txt"' if labels and tensor[0] == "output" else ""
        lines.append(_field("output", tensor, reshape, extra))
    lines += ["dynamic_batching { }", "instance_group [ { kind: KIND_CPU count: 1 } ]"]
    return "\n".join(lines) + "\n"


def _field(kind: str, tensor: _Tensor, reshape: bool, extra: str = "") -> str:
    name, dtype, shape = tensor
    if dtype not in _TYPES:
        raise FileError(f"{name!r} has the type {dtype}, which Triton does not serve; export in another precision")
    dims = ", ".join(str(n) for n in shape or (1,))
    flat = " reshape { shape: [ ] }" if reshape and not shape else ""  # the model has the batch alone
    return f"{kind} [ {{ name: {_quoted(name)} data_type: {_TYPES[dtype]} dims: [ {dims} ]{flat}{extra} }} ]"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


_DOCKERFILE = f"""\
FROM python:3.13-slim
ARG BRANCHYNET="branchynet[grpc]=={__version__}"
RUN pip install --no-cache-dir "$BRANCHYNET" && useradd --system --uid 10001 --no-create-home branchynet
COPY models /models
USER 10001
EXPOSE 8000 8001
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s CMD \
["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
ENTRYPOINT ["branchynet", "serve", "/models", "--host", "0.0.0.0"]
CMD ["--port", "8000", "--grpc-port", "8001"]
"""

_SERVICE = """\
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {name}
spec:
  predictor:
    containers:
      - name: kserve-container
        image: {image}
        args: ["--port", "8080"]
        ports:
          - containerPort: 8080
            protocol: TCP
        readinessProbe:
          httpGet:
            path: /v2/health/ready
            port: 8080
        livenessProbe:
          httpGet:
            path: /v2/health/live
            port: 8080
        resources:
          requests:
            cpu: "1"
            memory: 512Mi
          limits:
            cpu: "1"
            memory: 1Gi
        securityContext:
          runAsNonRoot: true
          runAsUser: 10001
          allowPrivilegeEscalation: false
          capabilities:
            drop: ["ALL"]
"""
