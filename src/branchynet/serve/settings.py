"""The settings of a server, from a TOML file and the command line."""

import os
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..argument_checks import above_zero, real, whole
from ..deploy.loading import Runtime, check_runtime, check_threads
from ..errors import FileError, InputError, nearest
from ..files import regular
from ..stored_values import from_fields

_DAY = 86400


@dataclass(frozen=True)
class ServeSettings:
    """How a server serves.

    Attributes:
        host, port: where it listens; port 0 takes a free one.
        grpc_port: the port of gRPC, at the same host; 0 takes a free one, None serves no gRPC.
        max_batch: the most samples in a batch.
        batch_us: the most microseconds that a batch is expected to take, if ``cost.json`` lies beside the model.
        max_wait_ms: how long a sample may wait at the first stage for others, while the worker is idle.
        queue: the most unanswered samples of a model.
        queue_ms: the most milliseconds that the samples before a request are expected to take.
        threads: per operator of the runtime.
        runtime: as in `branchynet.load`.
        timeout_s: the default deadline of requests, and the latest that they can set.
        max_body: the most bytes of a request's body.
        client_s: how long a client may take to send the headers of a request, and then its body.
        connections: the most open connections.
        drain_s: how long to wait for accepted requests when the server stops.
        api_key_file: a file whose first line every request must send as ``Authorization: Bearer KEY``, over gRPC as
            metadata.
        manage: whether clients may load and unload models.
        monitor: whether to watch a model for drift if a record of scores lies beside it.
        budget_us: the mean cost per sample, in microseconds, to hold by moving the thresholds of requests that give
            none.
        budget_limit: the name of a policy with a promise; thresholds do not move past those of this policy.
        certificate, private_key: files for TLS.
        ray: whether the stages run on a Ray cluster.
        min_replicas, max_replicas: on a cluster, how many processes run each stage.
        cpus: on a cluster, how many CPUs each of them reserves; by default as many as `threads`.

    Raises:
        InputError: a value is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    max_batch: int = 64
    batch_us: float | None = None
    max_wait_ms: float = 0.0
    queue: int = 1024
    queue_ms: float = 1000.0
    threads: int = 1
    runtime: Runtime = "onnxruntime"
    timeout_s: float = 30.0
    max_body: int = 32 << 20
    client_s: float = 10.0
    connections: int = 10_000
    drain_s: float = 30.0
    api_key_file: str | None = None
    manage: bool = False
    monitor: bool = True
    budget_us: float | None = None
    budget_limit: str | None = None
    certificate: str | None = None
    private_key: str | None = None
    ray: bool = False
    min_replicas: int = 1
    max_replicas: int = 4
    cpus: float | None = None

    def __post_init__(self) -> None:
        whole("port", self.port, 0, 65535)
        if self.grpc_port is not None:
            whole("grpc_port", self.grpc_port, 0, 65535)
            if 0 != self.grpc_port == self.port:
                raise InputError(f"port and grpc_port must differ; both are {self.port}")
        for name, most in (("max_batch", 1 << 20), ("queue", 1 << 24), ("max_body", 1 << 40), ("connections", 1 << 20)):
            whole(name, getattr(self, name), 1, most)
        check_threads(self.threads)
        check_runtime(self.runtime)
        for name in ("timeout_s", "client_s", "drain_s"):
            if above_zero(name, getattr(self, name)) > _DAY:
                raise InputError(f"{name} must be at most {_DAY} seconds; got {getattr(self, name):g}")
        if not 0 <= real("max_wait_ms", self.max_wait_ms) <= 1e3 * self.timeout_s:
            raise InputError(
                f"max_wait_ms must be 0 to {1e3 * self.timeout_s:g}, the timeout; got {self.max_wait_ms:g}"
            )
        for name in ("queue_ms", "batch_us", "budget_us"):
            if getattr(self, name) is not None:
                above_zero(name, getattr(self, name))
        whole("min_replicas", self.min_replicas, 1, 1 << 16)
        if whole("max_replicas", self.max_replicas, 1, 1 << 16) < self.min_replicas:
            raise InputError(
                f"max_replicas={self.max_replicas} is less than min_replicas={self.min_replicas}; raise it"
            )
        if self.cpus is not None and max(1.0, above_zero("cpus", self.cpus)) < self.threads:
            raise InputError(f"threads={self.threads} is more than cpus={self.cpus:g}, the CPUs of a replica; lower it")
        if (self.budget_us is None) != (self.budget_limit is None):
            raise InputError("give budget_us and budget_limit together: the goal, and the policy that bounds the move")
        if (self.certificate is None) != (self.private_key is None):
            raise InputError("give certificate and private_key together")


def read_settings(config: str | os.PathLike[str] | None = None, **given: Any) -> ServeSettings:
    """Return the settings of a TOML file; values in `given` other than None replace them.

    Raises:
        FileError: the file is missing, is not TOML, or has an unknown or malformed setting.
        InputError: a value in `given` is out of range.

    Example:
        >>> read_settings(queue=64, port=None).queue
        64
    """
    stored = {} if config is None else _read(config)
    try:
        from_fields(ServeSettings, stored)
    except (ValueError, TypeError, OverflowError) as error:
        raise FileError(f"{config} cannot be used ({error}); correct it") from error
    return ServeSettings(**{**stored, **{name: value for name, value in given.items() if value is not None}})


def read_key(path: str | os.PathLike[str]) -> str:
    """Return the API key in the first line of a file. Raises `FileError` if it is shorter than 16 characters."""
    try:
        key = regular(path).read_text(encoding="utf-8").partition("\n")[0].strip()
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not text; write the API key on its first line") from error
    if len(key) < 16 or not key.isascii():
        raise FileError(f"{path} must have an API key of at least 16 ASCII characters on its first line")
    return key


def _read(config: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        stored = tomllib.loads(regular(config).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FileError(f"{config} is not valid TOML ({error}); correct it") from error
    known = [field.name for field in fields(ServeSettings)]
    if unknown := [name for name in stored if name not in known]:
        raise FileError(f"{Path(config)} has the setting {unknown[0]!r}, which is unknown{nearest(unknown[0], known)}")
    return stored
