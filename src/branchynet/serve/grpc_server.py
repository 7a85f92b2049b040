"""The gRPC interface of a server, on the runners of the HTTP interface.

The messages are those of `tritonclient`, which are kept up to date. Our own stubs for this protocol would register the
same names with protobuf, which raises an error in a process that also uses the client. Of the client's dependencies for
gRPC, the server needs only grpcio; the client's extra would keep protobuf below version 7.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from ..environment import __version__
from ..errors import BranchyNetError, InputError, first_line
from ..files import regular
from .extensions import EXTENSIONS, config_of
from .faults import KeyMissing, NotReady, UnknownModel, headers_of, status_of
from .grpc_messages import infer_answer, parsed, pb, read_infer
from .limits import check_key
from .metrics import Metrics
from .models import VERSION, Loaded
from .oip import Options, check_known
from .repository import Repository, in_thread
from .settings import ServeSettings

log = logging.getLogger("branchynet.serve")

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    422: grpc.StatusCode.DEADLINE_EXCEEDED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_GONE = 499  # nobody reads it
_RETURN = 0.005  # seconds for the way back of an answer, before the client's own deadline,
_ROUNDING = 0.02  # which gRPC rounds up by 1 % or more on its way here
_IDENTITY_ALONE = 1  # a set of bits: a compressed message may be of any size when it is not compressed


class GrpcServer:
    """Serves the models of a repository over gRPC, in the event loop that starts it.

    Args:
        repository: its models.
        settings: limits, and where to listen.
        metrics: count the requests.
        key: the API key that requests must send; None for none.

    Attributes:
        port: where it listens, once it has started.
    """

    port: int = 0

    def __init__(self, repository: Repository, settings: ServeSettings, metrics: Metrics, key: str | None) -> None:
        self._repository, self._settings, self._metrics, self._key = repository, settings, metrics, key
        self._server: Any = None
        self._stopping = False
        self._reading: set[asyncio.Task[None]] = set()  # of streams

    async def start(self) -> int:
        """Listen, and return the port. Raises `InputError` if the address cannot be bound."""
        settings = self._settings
        server = self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", settings.max_body),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
                ("grpc.compression_enabled_algorithms_bitset", _IDENTITY_ALONE),
                ("grpc.server_handshake_timeout_ms", round(1e3 * settings.client_s)),
                ("grpc.max_allowed_incoming_connections", settings.connections),
                ("grpc.keepalive_time_ms", 60_000),  # connections of clients that are gone are closed
            ],
            maximum_concurrent_rpcs=max(settings.connections, settings.queue),  # a connection may carry many
        )
        server.add_generic_rpc_handlers((self._handlers(),))
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        where = f"{host}:{settings.grpc_port}"
        try:
            if settings.certificate is None or settings.private_key is None:
                self.port = server.add_insecure_port(where)
            else:
                pair = regular(settings.private_key).read_bytes(), regular(settings.certificate).read_bytes()
                self.port = server.add_secure_port(where, grpc.ssl_server_credentials([pair]))
        except RuntimeError as error:
            raise InputError(
                f"cannot serve gRPC at {where} ({first_line(error)}); give another --grpc-port, or 0 for a free one"
            ) from error
        await server.start()
        return self.port

    async def stop(self) -> None:
        """Refuse new requests, and answer the accepted ones, for at most the seconds of ``drain_s``."""
        self._stopping = True
        for task in self._reading:
            task.cancel()
        if self._server is not None:
            await self._server.stop(self._settings.drain_s)

    def _handlers(self) -> Any:
        calls: dict[str, Callable[[Any, Any], Awaitable[Any]]] = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ServerMetadata": self._about,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._metadata,
            "ModelConfig": self._config,
            "ModelStatistics": self._statistics,
            "ModelInfer": self._infer,
            "RepositoryIndex": self._index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(self._guarded(getattr(pb, f"{name}Request"), handler))
            for name, handler in calls.items()
        }
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._stream)
        return grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers)

    def _guarded(self, kind: Any, handler: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[bytes, Any], Any]:
        """Wrap a handler: check the key, turn errors into statuses, and count."""
        open_to_all = handler in (self._live, self._ready)  # probes of orchestrators send no key

        async def handled(data: bytes, context: Any) -> bytes:
            request, status = None, _GONE
            try:
                if not open_to_all:
                    self._check_key(context)
                request = parsed(kind, data)
                answer = await handler(request, context)
                status = 200
                return answer.SerializeToString()
            except BranchyNetError as error:
                status = status_of(error)
                await self._abort(context, error)
                raise
            finally:
                self._count(getattr(request, "model_name", getattr(request, "name", "")), status)

        return handled

    async def _live(self, request: Any, context: Any) -> Any:
        return pb.ServerLiveResponse(live=True)

    async def _ready(self, request: Any, context: Any) -> Any:
        return pb.ServerReadyResponse(ready=not self._stopping and self._repository.any_ready())

    async def _about(self, request: Any, context: Any) -> Any:
        return pb.ServerMetadataResponse(name="branchynet", version=__version__, extensions=EXTENSIONS)

    async def _model_ready(self, request: Any, context: Any) -> Any:
        try:
            self._repository.ready(request.name, request.version)
        except NotReady:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=not self._stopping)

    async def _metadata(self, request: Any, context: Any) -> Any:
        return pb.ModelMetadataResponse(**self._repository.ready(request.name, request.version).metadata)

    async def _config(self, request: Any, context: Any) -> Any:
        return pb.ModelConfigResponse(config=config_of(self._repository.ready(request.name, request.version)))

    async def _statistics(self, request: Any, context: Any) -> Any:
        return pb.ModelStatisticsResponse(model_stats=self._repository.statistics(request.name, request.version))

    async def _infer(self, request: Any, context: Any) -> Any:
        model: Loaded = self._repository.ready(request.model_name, request.model_version)
        call = read_infer(request)
        answer = await model.infer(call.inputs, _until(call.options, context.time_remaining()))
        outputs = model.named(answer.outputs) if call.outputs else answer.outputs
        return infer_answer(model.name, VERSION, call, outputs, answer.unfinished)

    async def _index(self, request: Any, context: Any) -> Any:
        _check_repository(request)
        found = [one for one in self._repository.index() if not request.ready or one["state"] == "READY"]
        return pb.RepositoryIndexResponse(models=found)

    async def _load(self, request: Any, context: Any) -> Any:
        check_known(request.parameters, (), "the request")  # no file or setting of a model comes from a client
        await self._manage(self._repository.load, request)
        return pb.RepositoryModelLoadResponse()

    async def _unload(self, request: Any, context: Any) -> Any:
        check_known(request.parameters, ("unload_dependents",), "the request")
        await self._manage(self._repository.unload, request)
        return pb.RepositoryModelUnloadResponse()

    async def _manage(self, change: Callable[[str], None], request: Any) -> None:
        _check_repository(request)
        if not self._settings.manage:
            raise KeyMissing("clients may not load or unload models here; start the server with --manage")
        await in_thread(change, request.model_name)

    async def _stream(self, requests: Any, context: Any) -> AsyncIterator[bytes]:
        """Answer the requests of a stream, each as soon as its answer is ready."""
        try:
            self._check_key(context)
        except KeyMissing as error:
            self._count("", status_of(error))
            await self._abort(context, error)
        answers: asyncio.Queue[bytes | None] = asyncio.Queue()
        room = asyncio.Semaphore(self._settings.queue)  # a client that does not read its answers is not read
        running: set[asyncio.Task[None]] = set()

        async def answer(data: bytes) -> None:
            answers.put_nowait(await self._streamed(data, context))

        async def read() -> None:
            async for data in requests:
                await room.acquire()
                task = asyncio.create_task(answer(data))
                running.add(task)
                task.add_done_callback(running.discard)

        async def finish() -> None:
            await asyncio.wait([reading])
            if running:
                await asyncio.wait(running)
            answers.put_nowait(None)

        reading = asyncio.create_task(read())
        self._reading.add(reading)
        if self._stopping:
            reading.cancel()
        finishing = asyncio.create_task(finish())
        try:
            while (found := await answers.get()) is not None:
                yield found
                room.release()
        finally:
            self._reading.discard(reading)
            for task in (finishing, reading, *running):
                task.cancel()

    async def _streamed(self, data: bytes, context: Any) -> bytes:
        request, status = None, _GONE
        try:
            request = parsed(pb.ModelInferRequest, data)
            answer = pb.ModelStreamInferResponse(infer_response=await self._infer(request, context))
            status = 200
        except BranchyNetError as error:
            status = _noted(error)
            answer = pb.ModelStreamInferResponse(error_message=str(error))
            if request is not None:
                answer.infer_response.id = request.id
        finally:
            self._count(getattr(request, "model_name", ""), status)
        return answer.SerializeToString()

    def _check_key(self, context: Any) -> None:
        if self._key is not None:
            sent = {name: value for name, value in context.invocation_metadata() if isinstance(value, str)}
            check_key(sent, self._key)

    async def _abort(self, context: Any, error: BranchyNetError) -> None:
        code = _CODES.get(_noted(error), grpc.StatusCode.INTERNAL)
        await context.abort(code, str(error), tuple(headers_of(error).items()))

    def _count(self, model: str, status: int) -> None:
        self._metrics.request(model if model in self._repository.names else "", "grpc", status)


def _noted(error: BranchyNetError) -> int:
    """Return the HTTP status of an error, and log those that no request causes."""
    status = status_of(error)
    if status == 500:
        log.error("%s", error)
    return status


def _until(options: Options, remaining: float | None) -> Options:
    """Return options whose deadline is not after that of the client."""
    if remaining is None:
        return options
    own = max((1 - _ROUNDING) * remaining - _RETURN, 0.0)
    return Options(options.policy, options.thresholds, own if options.timeout is None else min(own, options.timeout))


def _check_repository(request: Any) -> None:
    if request.repository_name:
        raise UnknownModel(f"there is no repository {request.repository_name!r:.140}; leave its name out")
