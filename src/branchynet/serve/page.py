"""The pages of a server, and what only they read: predictions for thresholds, and the answers of the last minute."""

import asyncio
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import orjson
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import Response

from .curve import predicted
from .metrics import Metrics
from .models import Loaded
from .repository import in_thread

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


_SWAGGER = ("swagger-ui-bundle.js", "swagger-ui.css")
_POLICY = (  # Swagger UI has a script and styles in its page; it reads nothing from elsewhere either
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def assets() -> dict[str, bytes]:
    """Return the files of the page by name, from the package."""
    folder = files("branchynet.serve") / "static"
    return {one.name: one.read_bytes() for one in folder.iterdir() if one.name.rpartition(".")[2] in _TYPES}


def swagger() -> dict[str, bytes]:
    """Return the files of Swagger UI by name, from a package that follows its releases."""
    folder = files("fastapi_offline") / "static"
    return {name: (folder / name).read_bytes() for name in _SWAGGER}


class Page:
    """The routes of the page, and of the one that describes the interface.

    Args:
        model: finds the model that a request names.
        metrics: the metrics of the server.
    """

    def __init__(self, model: Callable[[Request], Loaded], metrics: Metrics) -> None:
        self._model, self._metrics = model, metrics
        self._assets = assets() | swagger()
        self._curves: dict[str, tuple[Loaded, bytes]] = {}
        self._computing = asyncio.Lock()

    async def index(self, request: Request) -> Response:
        """Answer with the page."""
        return self._asset("index.html")

    async def docs(self, request: Request) -> Response:
        """Answer with the description of the interface, which Swagger UI shows."""
        found = get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="BranchyNet",
            swagger_js_url="/page/swagger-ui-bundle.js",
            swagger_css_url="/page/swagger-ui.css",
            swagger_favicon_url="/page/icon.svg",
            swagger_ui_parameters={"validatorUrl": None},  # which is on another machine
        )
        found.headers.update({**_HEADERS, "content-security-policy": _POLICY})
        return found

    async def asset(self, request: Request) -> Response:
        """Answer with a file of the page; paths in requests never reach the file system."""
        return self._asset(request.path_params["name"])

    async def frontier(self, request: Request) -> Response:
        """Answer with the predictions for thresholds of a model, which are computed once."""
        model = self._model(request)
        async with self._computing:
            loaded, body = self._curves.get(model.name, (None, b""))
            if loaded is not model:
                policies = {name: preset.policy for name, preset in model.presets.items()}
                body = orjson.dumps(await in_thread(predicted, model.folder, model.backend.engine, policies))
                self._curves[model.name] = model, body
        return Response(body, media_type="application/json")

    async def traffic(self, request: Request) -> Response:
        """Answer with the traffic of the last minute."""
        found: dict[str, Any] = self._metrics.model(self._model(request).name).traffic.last_minute()
        return Response(orjson.dumps(found), media_type="application/json")

    def _asset(self, name: str) -> Response:
        if name not in self._assets:
            return Response(b'{"error":"the page has no such file"}', 404, media_type="application/json")
        return Response(self._assets[name], 200, _HEADERS, _TYPES[name.rpartition(".")[2]])
