"""Run a server until it is told to stop."""

import logging
import socket
import sys
from pathlib import Path

import uvicorn

from ..errors import FileError, InputError
from ..files import regular
from .app import make_app
from .limits import guarded
from .metrics import Metrics
from .repository import Repository
from .settings import ServeSettings, read_key

log = logging.getLogger("branchynet.serve")
_SWITCH = 0.0005  # seconds; Python's default of 5 ms delays the worker behind the event loop


def serve(path: Path, settings: ServeSettings) -> None:
    """Serve a run folder, an exported file, a folder of stages, or a folder of these, until SIGINT or SIGTERM.

    On a signal, no connection is accepted any more, and accepted requests are answered.

    Raises:
        FileError: there is nothing to serve, or the API key or the certificate cannot be read.
        InputError: the address is in use or cannot be bound.
    """
    key = None if settings.api_key_file is None else read_key(settings.api_key_file)
    for file in filter(None, (settings.certificate, settings.private_key)):
        regular(file)
    metrics = Metrics()
    repository = Repository(path, settings, metrics)
    listener = listen(settings)
    try:
        repository.load_all()
        if not repository.any_ready():
            reasons = "; ".join(f"{one['name']}: {one['reason']}" for one in repository.index())
            raise FileError(f"no model of {path} can be served: {reasons}")
        app = make_app(repository, settings, metrics, key)
        server = _Server(_config(app, settings))
        host, port = listener.getsockname()[:2]
        scheme = "http" if settings.certificate is None else "https"
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {', '.join(repository.names)} at {scheme}://{shown}:{port}", file=sys.stderr, flush=True)
        sys.setswitchinterval(_SWITCH)
        server.run([listener])
    finally:
        repository.close()
        listener.close()


class _Server(uvicorn.Server):
    """A server whose readiness ends when it is told to stop."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.routes.stopping = True  # type: ignore[union-attr]
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


def _config(app: object, settings: ServeSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
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
