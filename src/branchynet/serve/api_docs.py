"""Descriptions of the routes for the OpenAPI page, and of a model for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import PlainTextResponse

from ..errors import InputError
from .models import Loaded

_ERROR = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}


def _fails(*statuses: int) -> dict[int | str, dict[str, Any]]:
    what = {
        400: "The request is wrong.",
        401: "The API key is missing or wrong.",
        404: "There is no such model or version.",
        408: "The body arrived too slowly.",
        413: "The body is too large.",
        415: "The body is compressed.",
        422: "The deadline of the request passed.",
        429: "The queue is full; Retry-After has seconds.",
        503: "The model is not ready.",
        504: "The deadline of the server passed.",
    }
    return {n: {"description": what[n], "content": {"application/json": {"schema": _ERROR}}} for n in statuses}


def _docs(summary: str, *statuses: int, tag: str = "Open Inference Protocol", **extra: Any) -> dict[str, Any]:
    return {"summary": summary, "tags": [tag], "responses": _fails(*statuses), "openapi_extra": extra}


def docs_of(path: str, docs: dict[str, Any], models: Sequence[str]) -> dict[str, Any]:
    """Return the description of a route with the parameters of its path; `models` are examples."""
    examples = {"model": list(models), "version": ["1"]}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "examples": values}}
        for name, values in examples.items()
        if f"{{{name}}}" in path
    ]
    extra = docs["openapi_extra"]
    return {**docs, "openapi_extra": {**extra, "parameters": [*parameters, *extra.get("parameters", ())]}}


def _content(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {kind: {"schema": schema}}}


_NAME = {"type": "string", "minLength": 1}
_TENSOR = {
    "type": "object",
    "properties": {
        "name": _NAME,
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "datatype": {"type": "string", "examples": ["FP32"]},
        "data": {"type": "array", "items": {}},
        "parameters": {"type": "object"},
    },
    "required": ["name", "shape", "datatype"],
}
_INFER = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "inputs": {"type": "array", "items": _TENSOR, "minItems": 1},
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"name": _NAME, "parameters": {"type": "object"}},
                "required": ["name"],
            },
        },
        "parameters": {
            "type": "object",
            "properties": {
                "policy": {"type": "string"},
                "thresholds": {"oneOf": [{"type": "array", "items": {"type": ["number", "null"]}}, {"type": "string"}]},
                "deadline_ms": {"type": "number", "exclusiveMinimum": 0},
                "binary_data_output": {"type": "boolean"},
            },
            "additionalProperties": False,
        },
    },
    "required": ["inputs"],
    "additionalProperties": False,
}
_QUERY = [
    {"name": "model", "in": "query", "schema": {"type": "string"}, "description": "Needed if there are several."},
    {"name": "policy", "in": "query", "schema": {"type": "string"}, "description": "The name of a policy."},
    {"name": "thresholds", "in": "query", "schema": {"type": "string"}, "description": "Such as 0.25,never."},
    {"name": "deadline_ms", "in": "query", "schema": {"type": "number", "exclusiveMinimum": 0}},
]
_FILE = {"type": "string", "format": "binary"}


def _body(**properties: Any) -> dict[str, Any]:
    return _content("application/json", {"type": "object", "properties": properties, "additionalProperties": False})


SERVER = _docs("Name and version of the server", 401)
LIVE = _docs("Whether the server runs")
READY = _docs("Whether a model is ready", 503)
METADATA = _docs("Inputs and outputs of a model", 401, 404, 503)
CONFIG = _docs("Configuration of a model, as Triton describes it", 401, 404, 503)
STATISTICS = _docs("Requests, samples and batches of models, as Triton counts them", 401, 404, 503)
MODEL_READY = _docs("Whether a model is ready", 401, 404, 503)
INFER = _docs(
    "Answer a batch",
    *(400, 401, 404, 408, 413, 415, 422, 429, 503, 504),
    requestBody={"required": True, **_content("application/json", _INFER)},
)
INDEX = _docs("All models and their states", 400, 401, 408, 413, 415, requestBody=_body(ready={"type": "boolean"}))
_MANAGED = (400, 401, 404, 408, 413, 415, 503)
_PARAMETERS = _body(parameters={"type": ["object", "null"], "additionalProperties": False})
LOAD = _docs("Load a model, or load it again", *_MANAGED, requestBody=_PARAMETERS)
UNLOAD = _docs("Unload a model", *_MANAGED, requestBody=_PARAMETERS)
ABOUT = _docs("Exits, thresholds, classes and policies of a model", 401, 404, 503, tag="BranchyNet")
FRONTIER = _docs("Accuracy and speed that the record predicts for other thresholds", 401, 404, 503, tag="BranchyNet")
TRAFFIC = _docs("Answers of the last minute by exit, and percentiles of the latency", 401, 404, 503, tag="BranchyNet")
METRICS = {**_docs("Metrics for Prometheus", 401, tag="BranchyNet"), "response_class": PlainTextResponse}
INFER["responses"][200] = {"description": "Successful Response", **_content("application/octet-stream", _FILE)}
PREDICT = _docs(
    "Answer an image file",
    *(400, 401, 404, 408, 413, 415, 422, 429, 503, 504),
    tag="BranchyNet",
    parameters=_QUERY,
    requestBody={
        "required": True,
        "content": {
            "image/*": {"schema": _FILE},
            "multipart/form-data": {"schema": {"type": "object", "properties": {"image": _FILE}}},
        },
    },
)


def query_options(query: Mapping[str, str]) -> dict[str, Any]:
    """Return the parameters of a request from its query. Raises `InputError`."""
    known = [one["name"] for one in _QUERY]
    if unknown := [name for name in query if name not in known]:
        raise InputError(f"the query has {unknown[0]!r:.60}, which is unknown; it may have {', '.join(known)}")
    found: dict[str, Any] = {name: query[name] for name in ("policy", "thresholds") if name in query}
    if "deadline_ms" in query:
        try:
            found["deadline_ms"] = float(query["deadline_ms"])
        except ValueError:
            raise InputError(f"deadline_ms must be a number; got {query['deadline_ms']!r:.40}") from None
    return found


def several(names: Sequence[str]) -> InputError:
    """Return the error for a request that names none of several models."""
    return InputError(f"the server has {len(names)} models; name one with ?model=, such as ?model={names[0]}")


def described(model: Loaded) -> dict[str, Any]:
    """Describe a model as JSON values: exits, score, thresholds, classes, inputs and named policies."""
    engine = model.backend.engine
    policy = None if engine is None else engine.policy
    about: dict[str, Any] = {
        "name": model.name,
        "exits": list(model.backend.exits) if engine is None else list(range(1, engine.num_exits + 1)),
        "stages": list(model.backend.exits),
        "policy": None if policy is None else policy.to_json(),
        "promise": None if engine is None else engine.metadata.get("promise"),
        "labels": list(model.labels),
        "inputs": [str(one) for one in model.backend.inputs],
        "policies": {},
    }
    for name, preset in model.presets.items():
        outcome = None if preset.choice is None else preset.choice.outcome
        about["policies"][name] = {
            "policy": preset.policy.to_json(),
            "promise": preset.promise,
            "accuracy": None if outcome is None else outcome.accuracy,
            "mean_us": None if outcome is None else outcome.mean_us,
        }
    return about
