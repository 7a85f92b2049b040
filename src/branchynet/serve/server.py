"""Run a server until a signal stops it."""

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.server import HANDLED_SIGNALS

from ..errors import FileError, InputError
from ..extras import needed_by
from ..files import regular
from .app import make_app
from .limits import guarded
from .metrics import Metrics
from .models import Start
from .repository import Repository
from .runner import SWITCH
from .settings import ServeSettings, read_key

log = logging.getLogger("branchynet.serve")

_FILES = 100  # besides connections


def serve(path: Path, settings: ServeSettings) -> None:
    """Serve a run folder, an exported file, a folder of stages, or a folder of these, until SIGINT or SIGTERM.

    On a signal, the server accepts no more connections, and answers the accepted requests.

    Raises:
        FileError: there is nothing to serve, or the API key or the certificate cannot be read.
        InputError: the address is in use or cannot be bound, or there is no Ray cluster.
    """
    if not settings.ray:
        _run(*prepared(path, settings), settings)
        return
    with needed_by("--ray", extra="ray"):
        from .cluster import connected
    with connected(settings) as start:
        _run(*prepared(path, settings, start), settings)


def _run(server: "Server", listener: socket.socket, settings: ServeSettings) -> None:
    sys.setswitchinterval(SWITCH)
    _allow_files(settings.connections)
    try:
        server.run([listener])
    finally:
        server.repository.close()
        listener.close()


def prepared(path: Path, settings: ServeSettings, start: Start | None = None) -> tuple["Server", socket.socket]:
    """Load the models, and return a server that has not started, and its socket, which listens.

    Args:
        path: as in `serve`.
        settings: the settings of the server.
        start: as in `open_model`.

    Raises:
        FileError, InputError: as `serve`.
    """
    key = None if settings.api_key_file is None else read_key(settings.api_key_file)
    _check_pair(settings)
    if settings.grpc_port is not None:
        with needed_by("--grpc-port", extra="grpc"):
            from .grpc_server import GrpcServer
    metrics = Metrics()
    repository = Repository(path, settings, metrics, start)
    listener = listen(settings)
    repository.load_all()
    try:
        repository.check_any_ready()
    except FileError:
        listener.close()
        raise
    grpc = None if settings.grpc_port is None else GrpcServer(repository, settings, metrics, key)
    return Server(make_app(repository, settings, metrics, key), repository, settings, grpc), listener


class Server(uvicorn.Server):
    """A server that reports that it is not ready as soon as it begins to stop.

    Attributes:
        repository: its models.
        grpc: the interface that starts and stops with it; None for none.
    """

    def __init__(self, app: FastAPI, repository: Repository, settings: ServeSettings, grpc: Any = None) -> None:
        super().__init__(_config(app, settings))
        self.repository, self.grpc, self._state = repository, grpc, app.state
        self._scheme = "http" if settings.certificate is None else "https"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and then print the addresses. Raises `InputError` if gRPC cannot listen."""
        port = None if self.grpc is None else await self.grpc.start()
        await super().startup(sockets)
        names = ", ".join(self.repository.names)
        for one in sockets or ():
            print(f"serving {names} at {self._scheme}://{_shown(one)}", file=sys.stderr, flush=True)
        if port is not None:
            print(f"serving gRPC at port {port}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on a signal, and then return instead of raising the signal again; uvicorn has no option for this."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {one: signal.signal(one, self.handle_exit) for one in HANDLED_SIGNALS}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer accepted requests, and end."""
        self._state.routes.stopping = True
        if self.grpc is not None:
            self._state.drained = asyncio.create_task(self.grpc.stop())
        await super().shutdown(sockets)


def listen(settings: ServeSettings) -> socket.socket:
    """Return a socket that listens at the address of the settings. Raises `InputError`."""
    where = f"{settings.host}:{settings.port}"
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        found = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise InputError(f"cannot serve at {where} ({error.strerror or error}); give another --host") from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((settings.host, settings.port))
        found.listen(2048)
    except (OSError, OverflowError) as error:
        found.close()
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot serve at {where} ({reason}); give another --port, or 0 for a free one") from error
    found.set_inheritable(True)
    return found


def _allow_files(connections: int) -> None:
    """Let the process open a file per connection, as far as the system allows it; a warning says if that is fewer."""
    if sys.platform == "win32":  # which has no such limit
        return
    import resource

    wanted = connections + _FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < wanted:
        log.warning("the system allows %d open files, so there may be fewer than %d connections", hard, connections)


def _shown(listener: socket.socket) -> str:
    """Return host and port as in a URL."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_pair(settings: ServeSettings) -> None:
    """Raise `FileError` unless certificate and private key, if there are any, can be read and belong together."""
    if settings.certificate is None or settings.private_key is None:
        return
    pair = regular(settings.certificate), regular(settings.private_key)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*pair, password=lambda: b"")  # which asks nobody
    except (ssl.SSLError, ValueError) as error:
        raise FileError(
            f"{pair[0]} and {pair[1]} are not a certificate and its private key, in PEM without a password ({error})"
        ) from error


def _config(app: FastAPI, settings: ServeSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=guarded(settings.client_s),
        ws="none",
        lifespan="on",
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=settings.connections,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
        backlog=2048,
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.private_key,
    )
