"""The Open Inference Protocol, version 2: requests and answers of HTTP as bytes, in JSON and with binary tensors.

Shape letters: B samples.

Sources: https://github.com/kserve/open-inference-protocol, and Triton's binary tensor extension,
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from ..errors import InputError, nearest
from .backends import Backend
from .tensors import NAMES, from_bytes, from_json, shown, text_bytes

CLASS_NAME = "class_name"
"""The output with the names of the classes, for requests that name it."""

_PARAMETERS = ("policy", "thresholds", "deadline_ms", "timeout", "binary_data_output")


@dataclass(frozen=True)
class Wanted:
    """An output that a request asks for, and whether it comes as bytes after the JSON."""

    name: str
    binary: bool


@dataclass(frozen=True)
class Options:
    """The parameters of a request.

    Attributes:
        policy: the name of a preset; None for the thresholds of the file.
        thresholds: one per exit except the last, None for never; None for those of the file.
        timeout: seconds until the deadline; None for that of the server.
    """

    policy: str | None = None
    thresholds: tuple[float | None, ...] | None = None
    timeout: float | None = None


@dataclass(frozen=True)
class InferRequest:
    """A request for inference.

    Attributes:
        id: returned with the answer; None if the request has none.
        inputs: by name.
        options: its parameters.
        outputs: what it asks for; empty for all.
        binary: whether outputs that `outputs` does not list come as bytes.
    """

    id: str | None
    inputs: dict[str, NDArray[Any]]
    options: Options = field(default_factory=Options)
    outputs: tuple[Wanted, ...] = ()
    binary: bool = False


def read_infer(body: bytes, header_length: str | None = None) -> InferRequest:
    """Read the body of a request.

    Args:
        body: JSON, then the tensors that are not in JSON.
        header_length: the header ``Inference-Header-Content-Length``, the bytes of the JSON; None if all of it is.

    Raises:
        InputError: the request is wrong; the message names the entry.
    """
    view = memoryview(body)
    length = len(body) if header_length is None else _header_length(header_length, len(body))
    head, rest = read_object(view[:length]), view[length:]
    check_known(head, ("id", "parameters", "inputs", "outputs"), "the request")
    id = head.get("id")
    if id is not None and not isinstance(id, str):
        raise InputError(f"the id of a request must be text; got {shown(id)}")
    inputs: dict[str, NDArray[Any]] = {}
    for entry in _entries(head, "inputs"):
        name = _name(entry, "inputs")
        if name in inputs:
            raise InputError(f"input {name!r} is given twice")
        size = parameters_of(entry, f"input {name!r}").get("binary_data_size")
        if size is None:
            inputs[name] = from_json(entry, name)
            continue
        if type(size) is not int or not 0 <= size <= len(rest):
            raise InputError(
                f"binary_data_size of input {name!r} is {shown(size)}, but {len(rest)} bytes are left after the JSON; "
                "it must be the number of bytes of the input, and Inference-Header-Content-Length that of the JSON"
            )
        if "data" in entry:
            raise InputError(f"input {name!r} has both data and binary_data_size; give one of them")
        inputs[name] = from_bytes(name, entry.get("datatype"), entry.get("shape"), rest[:size])
        rest = rest[size:]
    if not inputs:
        raise InputError("the request has no inputs; give a list of tensors as 'inputs'")
    if len(rest):
        raise InputError(f"{len(rest)} bytes follow the JSON and the inputs; binary_data_size must count all of them")
    parameters = parameters_of(head, "the request")
    binary = flag(parameters, "binary_data_output")
    outputs = []
    for entry in _entries(head, "outputs"):
        name = _name(entry, "outputs")
        own = parameters_of(entry, f"output {name!r}")
        outputs.append(Wanted(name, flag(own, "binary_data", binary)))
    return InferRequest(id, inputs, read_options(parameters), tuple(outputs), binary)


def read_object(body: bytes | memoryview) -> dict[str, Any]:
    """Read a JSON object. Raises `InputError`."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InputError(f"the body is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"the body must be a JSON object; got {shown(found)}")
    return found


def read_options(parameters: Mapping[str, Any]) -> Options:
    """Read policy, thresholds and deadline from the parameters of a request, of any protocol. Raises `InputError`."""
    check_known(parameters, _PARAMETERS, "the parameters object of the request")
    policy, given = parameters.get("policy"), parameters.get("thresholds")
    if policy is not None and not isinstance(policy, str):
        raise InputError(f"policy must be the name of a policy; got {shown(policy)}")
    if policy is not None and given is not None:
        raise InputError("give policy or thresholds, not both")
    timeout = None
    for name, unit in (("deadline_ms", 1e3), ("timeout", 1e6)):
        value = parameters.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            what = "milliseconds" if name == "deadline_ms" else "microseconds"
            raise InputError(f"{name} must be a number of {what} above 0; got {shown(value)}")
        timeout = min(value / unit, math.inf if timeout is None else timeout)
    return Options(policy, None if given is None else _thresholds(given), timeout)


def wanted_outputs(request: InferRequest, outputs: Mapping[str, NDArray[Any]]) -> Sequence[Wanted]:
    """Return the outputs of an answer, all if the request names none. Raises `InputError` if one is unknown."""
    for one in request.outputs:
        if one.name not in outputs:
            raise InputError(f"the model has no output {one.name!r}{nearest(one.name, outputs)}")
    return request.outputs or [Wanted(name, request.binary) for name in outputs if name != CLASS_NAME]


def infer_answer(
    model: str, version: str, request: InferRequest, outputs: Mapping[str, NDArray[Any]], unfinished: int
) -> tuple[bytes, int | None]:
    """Return the body of an answer, and the length of its JSON if tensors follow it as bytes.

    Args:
        model: its name.
        version: its version.
        request: what was asked.
        outputs: all outputs by name.
        unfinished: samples with the answer of an earlier exit; if there are any, the parameter ``unfinished`` says so.

    Raises:
        InputError: the request asks for an output that the model does not have.
    """
    tensors, tail = [], []
    for one in wanted_outputs(request, outputs):
        array = outputs[one.name]
        text = array.dtype.kind == "O"
        entry: dict[str, Any] = {
            "name": one.name,
            "datatype": "BYTES" if text else NAMES[array.dtype],
            "shape": list(array.shape),
        }
        if one.binary:
            data = text_bytes(array) if text else np.ascontiguousarray(array).tobytes()
            entry["parameters"] = {"binary_data_size": len(data)}
            tail.append(data)
        else:
            entry["data"] = array.tolist() if text or array.dtype == np.float16 else np.ascontiguousarray(array).ravel()
        tensors.append(entry)
    head: dict[str, Any] = {"model_name": model, "model_version": version}
    if request.id is not None:
        head["id"] = request.id
    if unfinished:
        head["parameters"] = {"unfinished": unfinished}
    head["outputs"] = tensors
    found = orjson.dumps(head, option=orjson.OPT_SERIALIZE_NUMPY)  # NaN and infinity become null
    return (b"".join((found, *tail)), len(found)) if tail else (found, None)


def metadata_of(model: str, version: str, backend: Backend, classes: bool) -> dict[str, Any]:
    """Return the metadata of a model; `classes` is whether it has class names."""
    outputs = [(o.name, NAMES[o.dtype]) for o in backend.outputs]
    shapes = {**backend.shapes, CLASS_NAME: (None,)}
    if classes:
        outputs.append((CLASS_NAME, "BYTES"))
    return {
        "name": model,
        "versions": [version],
        "platform": backend.platform,
        "inputs": [_tensor(i.name, NAMES[i.dtype], shapes) for i in backend.inputs],
        "outputs": [_tensor(name, kind, shapes) for name, kind in outputs],
    }


def _tensor(name: str, datatype: str, shapes: Mapping[str, Sequence[int | None]]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [-1 if n is None else n for n in shapes[name]]}


def _thresholds(given: Any) -> tuple[float | None, ...]:
    """Return thresholds from a list of numbers and null, a number, or text such as ``0.25,never``."""
    values = given
    if isinstance(given, str):
        try:
            values = [None if (t := text.strip()) == "never" else float(t) for text in given.split(",")]
        except ValueError:
            values = None
    elif isinstance(given, (int, float)) and not isinstance(given, bool):
        values = [given]
    if not isinstance(values, list) or not {*map(type, values)} <= {int, float, type(None)}:
        raise InputError(
            f"thresholds must be a list with a number or null for each exit except the last, or text such as "
            f"'0.25,never'; got {shown(given)}"
        )
    return tuple(values)


def _header_length(text: str, most: int) -> int:
    length = int(text) if text.isascii() and text.isdigit() and len(text) < 16 else -1
    if not 0 <= length <= most:
        raise InputError(
            f"Inference-Header-Content-Length is {text!r:.40}, but the body has {most} bytes; it must be the number of "
            "bytes of the JSON at the start of the body"
        )
    return length


def _entries(head: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = head.get(key)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise InputError(f"{key!r} must be a list of objects; got {shown(found)}")
    return found


def _name(entry: Mapping[str, Any], key: str) -> str:
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise InputError(f"every entry of {key!r} must have a name, which is text; got {shown(name)}")
    return name


def parameters_of(entry: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """Return the object ``parameters`` in an entry of a request, empty if it has none. Raises `InputError`."""
    found = entry.get("parameters")
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InputError(f"the parameters of {what} must be an object; got {shown(found)}")
    return found


def flag(parameters: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """Return a boolean by name. Raises `InputError`."""
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false; got {shown(value)}")
    return value


def check_known(found: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    """Raise `InputError` if `found` has a name that is not in `names`."""
    if unknown := [name for name in found if name not in names]:
        allowed = f"it may have {', '.join(names)}" if names else "leave it out"
        raise InputError(f"{where} has {unknown[0]!r:.60}, which is unknown; {allowed}")
