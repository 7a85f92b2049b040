"""Run the stages of models on a Ray cluster: one deployment per stage, behind this server or behind Ray's proxies."""

import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from ..errors import FileError, InputError, first_line
from .app import make_app
from .backends import Backend
from .cluster_runner import ClusterRunner
from .metrics import Metrics
from .models import Start
from .repository import Repository
from .runner import Observer
from .settings import ServeSettings, read_key
from .stage_replica import StageReplica

log = logging.getLogger("branchynet.serve")

_START_S = 300.0  # until all stages of a model run
_POLL = 0.05  # seconds


def ray_app(path: str | Path, settings: ServeSettings | None = None) -> serve.Application:
    """Return an application of Ray Serve that answers as `branchynet serve` does, behind Ray's proxies.

    Its ingress checks requests and sends samples from stage to stage. Each stage of each model is a deployment with its
    own replicas. The limits apply per replica of the ingress.

    Args:
        path: a run folder, an exported file, a folder of stages, or a folder that holds several of these. All nodes
            of the cluster must be able to read it at this path.
        settings: the settings of the server. Ray's proxies have their own address, TLS and number of connections.

    Raises:
        FileError: there is nothing to serve.
        InputError: the settings include `grpc_port`, `manage` or `certificate`, which Ray's proxies do not support.

    Example:
        >>> from ray import serve  # doctest: +SKIP
        >>> serve.run(ray_app("/models/mine", ServeSettings(max_replicas=8)))  # doctest: +SKIP
    """
    settings = ServeSettings() if settings is None else settings
    for name in ("grpc_port", "manage", "certificate"):
        if (value := getattr(settings, name)) is not None and value is not False:
            raise InputError(f"ray_app takes no {name}, because Ray's proxies take the requests; leave it out")
    found: dict[str, list[serve.Application]] = {}

    def bind(
        name: str, path: Path, backend: Backend, sample_us: Sequence[float] | None, observer: Observer
    ) -> ClusterRunner:
        found[name] = _stages(name, path, len(backend.exits), sample_us, settings)
        return ClusterRunner(())

    quiet = replace(settings, monitor=False, budget_us=None, budget_limit=None)
    repository = Repository(Path(path), quiet, Metrics(), bind)
    repository.load_all()
    repository.check_any_ready()
    options = {**_options(settings), "ray_actor_options": {"num_cpus": 1}}
    ingress = serve.deployment(serve.ingress()(_Ingress)).options(name="branchynet", **options)
    return ingress.bind(str(repository.path), settings, found)


class _Ingress:
    """Takes requests from Ray's proxies."""

    def __init__(self, path: str, settings: ServeSettings, stages: dict[str, list[DeploymentHandle[Any]]]) -> None:
        self._path, self._settings, self._stages = path, settings, stages

    def __serve_build_asgi_app__(self) -> FastAPI:
        settings, metrics = self._settings, Metrics()
        repository = Repository(Path(self._path), settings, metrics, self._start)
        repository.load_all()
        key = None if settings.api_key_file is None else read_key(settings.api_key_file)
        return make_app(repository, settings, metrics, key)

    def _start(
        self, name: str, path: Path, backend: Backend, sample_us: Sequence[float] | None, observer: Observer
    ) -> ClusterRunner:
        if name not in self._stages:
            raise FileError(f"{path} could not be read when the application was made; make it again")
        return ClusterRunner(self._stages[name], bound=self._settings.queue, observer=observer)


@contextlib.contextmanager
def connected(settings: ServeSettings) -> Iterator[Start]:
    """Connect to a cluster, and yield a function that starts the stages of a model there.

    This is the cluster at ``RAY_ADDRESS``. If that is not set, it is the cluster on this machine or, if there is none,
    a new one on this machine, which ends with the block.

    Raises:
        InputError: the cluster cannot be reached.
    """
    own = not ray.is_initialized()
    if own:
        try:
            _check_address(os.environ.get("RAY_ADDRESS", ""))
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"cannot connect to a Ray cluster ({first_line(error)}); start one with 'ray start --head', or correct "
                "RAY_ADDRESS"
            ) from error

    def start(
        name: str, path: Path, backend: Backend, sample_us: Sequence[float] | None, observer: Observer
    ) -> ClusterRunner:
        stages = _stages(name, path, len(backend.exits), sample_us, settings)
        prefix = f"branchynet-{name}-{secrets.token_hex(4)}"  # a model may be loaded again while it serves
        apps = [f"{prefix}-{n}" for n in range(1, len(stages) + 1)]

        def delete() -> None:
            for app in apps:
                serve.delete(app, _blocking=False)

        targets = [serve.RunTarget(one, app, None) for one, app in zip(stages, apps, strict=True)]
        try:
            handles = serve.run_many(targets, wait_for_applications_running=False)
            _wait(name, apps, settings)
        except BaseException:
            delete()
            raise
        return ClusterRunner(handles, bound=settings.queue, observer=observer, drain_s=settings.drain_s, ended=delete)

    try:
        serve.start(proxy_location="Disabled")  # this process takes the requests
        yield start
    finally:
        if own:
            ray.shutdown()


def _check_address(address: str) -> None:
    """Raise `OSError` if nothing listens at an address with a port, because Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _wait(name: str, apps: Sequence[str], settings: ServeSettings) -> None:
    """Wait until applications run. Raises `FileError` if one fails, `InputError` if there is no room for them."""
    end = time.monotonic() + _START_S
    while True:
        known = serve.status().applications
        states = [known[app] for app in apps if app in known]
        if failed := [one for one in states if one.status == "DEPLOY_FAILED"]:
            raise FileError(
                f"the cluster cannot run {name}: {failed[0].message}; each node must be able to read the files of the "
                "model at the same path"
            )
        if len(states) == len(apps) and all(one.status == "RUNNING" for one in states):
            return
        if time.monotonic() > end:
            cpus = ray.cluster_resources().get("CPU", 0)
            raise InputError(
                f"the {len(apps)} stages of {name} did not start in {_START_S:g} s: each needs "
                f"{settings.min_replicas} x {_cpus(settings):g} CPUs, and the cluster has {cpus:g}; lower cpus or "
                "min_replicas, or add nodes"
            )
        time.sleep(_POLL)


def _stages(
    name: str, path: Path, count: int, sample_us: Sequence[float] | None, settings: ServeSettings
) -> list[serve.Application]:
    """Return an application per stage of a model."""
    deployment = serve.deployment(StageReplica)
    options = {**_options(settings), "ray_actor_options": {"num_cpus": _cpus(settings)}}
    return [
        deployment.options(name=f"{name}-stage-{n + 1}", **options).bind(str(path), n, settings, sample_us)
        for n in range(count)
    ]


def _options(settings: ServeSettings) -> dict[str, Any]:
    """Return the options of every deployment."""
    return {
        "autoscaling_config": {
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": min(settings.max_batch, settings.queue),  # one batch runs or waits
        },
        "max_ongoing_requests": settings.queue,  # batches form in the replicas
        "graceful_shutdown_timeout_s": settings.drain_s,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": 2.0,  # a dead replica is replaced after this time
        "max_constructor_retry_count": 2,
    }


def _cpus(settings: ServeSettings) -> float:
    return settings.threads if settings.cpus is None else settings.cpus
