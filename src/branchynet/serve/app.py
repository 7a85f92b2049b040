"""The HTTP interface of a server, as an ASGI application."""

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from numpy.typing import NDArray

from ..environment import __version__
from ..errors import BranchyNetError
from . import api_docs
from .extensions import EXTENSIONS, config_of
from .faults import KeyMissing, NotReady, StoppedError, headers_of, status_of
from .images import image_answer, image_input, upload
from .limits import ClientGone, check_key, read_body, watched
from .metrics import CONTENT_TYPE, Metrics
from .models import VERSION, Loaded
from .oip import Options, check_known, flag, infer_answer, parameters_of, read_infer, read_object, read_options
from .page import Page
from .repository import Repository, in_thread
from .runner import Answer
from .settings import ServeSettings

log = logging.getLogger("branchynet.serve")
_INFER = re.compile(r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?/infer")
_GONE = 499  # nobody reads it
_DECODERS = 2  # images are decoded by so many threads, because a small file may have many pixels


def make_app(repository: Repository, settings: ServeSettings, metrics: Metrics, key: str | None = None) -> FastAPI:
    """Return the application.

    Args:
        repository: its models; the application closes it when it ends.
        settings: limits.
        metrics: count the requests.
        key: the API key that requests must send; None for none.
    """
    routes = _Routes(repository, settings, metrics, key)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        if app.state.drained is not None:
            await app.state.drained  # gRPC, which stops at the same time
        await in_thread(repository.close)

    app = FastAPI(
        title="BranchyNet",
        version=__version__,
        description="Networks with early exits, over the Open Inference Protocol, version 2.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json" if key is None else None,  # the page that shows it sends no key
        exception_handlers={404: _no_route, 405: _no_route},
    )
    app.state.routes, app.state.drained = routes, None
    page = Page(routes.model, metrics)
    app.add_middleware(_Shortcut, routes.guarded(routes.infer))
    for path, method, handler, docs in (
        ("/v2", "GET", routes.server, api_docs.SERVER),
        ("/v2/health/live", "GET", routes.live, api_docs.LIVE),
        ("/v2/health/ready", "GET", routes.all_ready, api_docs.READY),
        ("/v2/models/stats", "GET", routes.statistics, api_docs.STATISTICS),
        ("/v2/models/{model}", "GET", routes.metadata, api_docs.METADATA),
        ("/v2/models/{model}/versions/{version}", "GET", routes.metadata, api_docs.METADATA),
        ("/v2/models/{model}/ready", "GET", routes.ready, api_docs.MODEL_READY),
        ("/v2/models/{model}/versions/{version}/ready", "GET", routes.ready, api_docs.MODEL_READY),
        ("/v2/models/{model}/config", "GET", routes.config, api_docs.CONFIG),
        ("/v2/models/{model}/versions/{version}/config", "GET", routes.config, api_docs.CONFIG),
        ("/v2/models/{model}/stats", "GET", routes.statistics, api_docs.STATISTICS),
        ("/v2/models/{model}/versions/{version}/stats", "GET", routes.statistics, api_docs.STATISTICS),
        ("/v2/models/{model}/infer", "POST", routes.infer, api_docs.INFER),
        ("/v2/models/{model}/versions/{version}/infer", "POST", routes.infer, api_docs.INFER),
        ("/v2/repository/index", "POST", routes.index, api_docs.INDEX),
        ("/v2/repository/models/{model}/load", "POST", routes.load, api_docs.LOAD),
        ("/v2/repository/models/{model}/unload", "POST", routes.unload, api_docs.UNLOAD),
        ("/models/{model}", "GET", routes.about, api_docs.ABOUT),
        ("/models/{model}/frontier", "GET", page.frontier, api_docs.FRONTIER),
        ("/models/{model}/traffic", "GET", page.traffic, api_docs.TRAFFIC),
        ("/predict", "POST", routes.predict, api_docs.PREDICT),
        ("/metrics", "GET", routes.metrics_page, api_docs.METRICS),
    ):
        docs = api_docs.docs_of(path, docs, repository.names)
        app.add_api_route(path, routes.guarded(handler), methods=[method], response_model=None, **docs)
    pages = [("/", page.index), ("/page/{name}", page.asset), *([("/docs", page.docs)] if key is None else [])]
    for path, handler in pages:
        public = routes.guarded(handler, public=True)  # it asks for the key
        app.add_api_route(path, public, response_model=None, include_in_schema=False)
    return app


class _Shortcut:
    """Checks the route of inference before all other routes, because it is called most."""

    def __init__(self, app: Any, infer: Callable[[Request], Awaitable[Response]]) -> None:
        self._app, self._infer = app, infer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and (found := _INFER.fullmatch(scope["path"])):
            scope["path_params"] = {name: value for name, value in found.groupdict().items() if value is not None}
            response = await self._infer(Request(scope, receive, send))
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class _Routes:
    """One method per route."""

    def __init__(self, repository: Repository, settings: ServeSettings, metrics: Metrics, key: str | None) -> None:
        self.repository, self.settings, self.metrics, self.key = repository, settings, metrics, key
        self.stopping = False
        self._decoding = asyncio.Semaphore(_DECODERS)

    def guarded(
        self, handler: Callable[[Request], Awaitable[Response]], public: bool = False
    ) -> Callable[[Request], Awaitable[Response]]:
        """Wrap a handler: check the key unless it is public, turn errors into answers, and count."""
        open_to_all = public or handler in (self.live, self.all_ready)  # probes of orchestrators send no key

        async def handled(request: Request) -> Response:
            try:
                if not open_to_all:
                    check_key(request.headers, self.key)
                response = await handler(request)
            except BranchyNetError as error:
                response = _json({"error": str(error)}, status_of(error), headers_of(error))
                if isinstance(error, KeyMissing):
                    response.headers["www-authenticate"] = "Bearer"
                if response.status_code == 500:
                    log.error("%s", error)
            except ClientGone:
                response = Response(status_code=_GONE)
            except Exception:
                log.exception("%s %s failed", request.method, request.url.path)
                response = _json({"error": "the server failed on this request; its log says why"}, 500)
            model = request.path_params.get("model", "")
            self.metrics.request(model if model in self.repository.names else "", "http", response.status_code)
            return response

        return handled

    async def server(self, request: Request) -> Response:
        extensions = ["binary_tensor_data", *EXTENSIONS]
        return _json({"name": "branchynet", "version": __version__, "extensions": extensions})

    async def live(self, request: Request) -> Response:
        return _json({"live": True})

    async def all_ready(self, request: Request) -> Response:
        ready = not self.stopping and self.repository.any_ready()
        return _json({"ready": ready}, 200 if ready else 503)

    async def metadata(self, request: Request) -> Response:
        return _json(self.model(request).metadata)

    async def config(self, request: Request) -> Response:
        return _json(config_of(self.model(request)))

    async def statistics(self, request: Request) -> Response:
        which = request.path_params
        return _json({"model_stats": self.repository.statistics(which.get("model", ""), which.get("version"))})

    async def ready(self, request: Request) -> Response:
        name = self.model(request).name
        if self.stopping:
            raise NotReady("the server stops")
        return _json({"name": name, "ready": True})

    async def infer(self, request: Request) -> Response:
        model = self.model(request)
        body = await self._body(request)
        call = read_infer(body, request.headers.get("inference-header-content-length"))
        model, answer = await self._answer(request, model, call.inputs, call.options)
        outputs = model.named(answer.outputs) if call.outputs else answer.outputs
        found, length = infer_answer(model.name, VERSION, call, outputs, answer.unfinished)
        if length is None:
            return Response(found, media_type="application/json")
        return Response(found, 200, {"inference-header-content-length": str(length)}, "application/octet-stream")

    async def index(self, request: Request) -> Response:
        wanted = await self._object(request)
        check_known(wanted, ("ready",), "the request")
        ready = flag(wanted, "ready")
        return _json([one for one in self.repository.index() if not ready or one["state"] == "READY"])

    async def load(self, request: Request) -> Response:
        await self._manage(request, self.repository.load, ())  # no file or setting of a model comes from a client
        return _json({})

    async def unload(self, request: Request) -> Response:
        await self._manage(request, self.repository.unload, ("unload_dependents",))
        return _json({})

    async def about(self, request: Request) -> Response:
        return _json(api_docs.described(self.model(request)))

    async def predict(self, request: Request) -> Response:
        query = request.query_params
        model = self._named(query.get("model"))
        options = read_options(api_docs.query_options(query))
        image = await upload(await self._body(request), request.headers)
        async with self._decoding:
            batch = await in_thread(image_input, model, image)
        model, answer = await self._answer(request, model, {model.backend.inputs[0].name: batch}, options)
        return _json(image_answer(model, options, answer))

    async def metrics_page(self, request: Request) -> Response:
        return Response(self.metrics.page(), media_type=CONTENT_TYPE)

    async def _answer(
        self, request: Request, model: Loaded, inputs: dict[str, NDArray[Any]], options: Options
    ) -> tuple[Loaded, Answer]:
        """Answer a request. If the model is loaded again meanwhile, the new one answers."""
        async with watched(request.receive):
            try:
                return model, await model.infer(inputs, options)
            except StoppedError:
                again = self.repository.ready(model.name)
                if again is model:
                    raise
                return again, await again.infer(inputs, options)

    async def _body(self, request: Request) -> bytes:
        return await read_body(request.receive, request.headers, self.settings.max_body, self.settings.client_s)

    async def _object(self, request: Request) -> dict[str, Any]:
        """Return the JSON object in a body; an empty one if there is none."""
        body = await self._body(request)
        return read_object(body) if body.strip() else {}

    def model(self, request: Request) -> Loaded:
        """Return the model that a request names. Raises `UnknownModel` or `NotReady`."""
        return self.repository.ready(request.path_params["model"], request.path_params.get("version"))

    def _named(self, name: str | None) -> Loaded:
        if name is not None:
            return self.repository.ready(name)
        names = [one["name"] for one in self.repository.index() if one["state"] == "READY"]
        if len(names) > 1:
            raise api_docs.several(names)
        return self.repository.ready((names or self.repository.names)[0])

    async def _manage(self, request: Request, change: Callable[[str], None], known: Sequence[str]) -> None:
        given = await self._object(request)
        if not self.settings.manage:
            raise KeyMissing("clients may not load or unload models here; start the server with --manage")
        check_known(given, ("parameters",), "the request")
        check_known(parameters_of(given, "the request"), known, "the parameters object of the request")
        await in_thread(change, request.path_params["model"])


async def _no_route(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    what = (
        f"there is no route {request.method} {request.url.path:.200}" if status == 404 else "the method is not allowed"
    )
    return _json({"error": f"{what}; GET /openapi.json lists all routes"}, status, getattr(error, "headers", None))


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, "application/json")
