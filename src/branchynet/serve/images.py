"""Image files as inputs of a network, and answers about them."""

from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from ..data.images import read_image
from ..data.normalization import stored_normalization
from ..deploy.call_thresholds import check_thresholds
from ..errors import InputError
from .models import Loaded
from .oip import Options
from .runner import Answer

_MOST = 10  # classes in an answer


async def upload(body: bytes, headers: Headers) -> bytes:
    """Return the image file in a body: the body itself, or the first file of a form. Raises `InputError`."""
    if not headers.get("content-type", "").lower().startswith("multipart/form-data"):
        if not body:
            raise InputError("the body is empty; send an image file as the body, or as a file of a form")
        return body

    async def chunks() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await MultiPartParser(headers, chunks(), max_files=1, max_fields=8).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise InputError(f"the form cannot be read ({error}); send one image file in it") from None
    try:
        for value in form.values():
            if isinstance(value, UploadFile):
                return await value.read()
    finally:
        await form.close()
    raise InputError("the form has no file; send the image as its file, as in curl -F image=@photo.png")


def image_input(model: Loaded, image: bytes) -> NDArray[Any]:
    """Decode an image as a batch of one for a model, with the preprocessing in the metadata of its file.

    Raises:
        InputError: the model does not read one image of fixed size.
        DataError: the bytes are no image, or it has too many pixels.
    """
    engine, inputs = model.backend.engine, model.backend.inputs
    shape = inputs[0].shape
    size = tuple(n for n in shape if n is not None)
    if engine is None or len(inputs) != 1 or len(size) != 3 or len(shape) != 3 or inputs[0].dtype != np.float32:
        raise InputError(
            f"the model {model.name!r} reads {'; '.join(map(str, inputs))}, not one image; use "
            f"POST /v2/models/{model.name}/infer"
        )
    pixels = read_image(image, (size[0], size[1], size[2]))
    normalization = stored_normalization(engine.metadata.get("preprocessing"), size[0])
    return pixels if normalization is None else normalization(pixels)


def thresholds_in_use(model: Loaded, options: Options) -> tuple[float | None, ...]:
    """Return the thresholds of a request, with those in use now if it gives none; None for never."""
    policy = None if model.backend.engine is None else model.backend.engine.policy
    if policy is None:
        return ()
    if options.policy is not None:
        return model.presets[options.policy].policy.thresholds
    if options.thresholds is None:
        return policy.thresholds if model.moving is None else model.moving.thresholds
    return check_thresholds(options.thresholds, policy, where="this file", remedy="export again")


def image_answer(model: Loaded, options: Options, answer: Answer) -> dict[str, Any]:
    """Describe the answer for one image as JSON values."""
    label, exit, score, output = (answer.outputs[name][0] for name in ("label", "exit", "score", "output"))
    found: dict[str, Any] = {"model": model.name, "exit": int(exit), "score": _number(score)}
    if np.ndim(label) == 0:
        n = int(label)
        z = np.asarray(output, np.float64)
        with np.errstate(all="ignore"):
            p = np.exp(z - z.max())
            p = p / p.sum()
        found |= {"label": n, "class": _class(model, n), "probability": _number(p[n]) if p.ndim == 1 else None}
        if p.ndim == 1:
            most = np.argsort(-p, kind="stable")[:_MOST].tolist()
            found["top"] = [{"label": n, "class": _class(model, n), "probability": _number(p[n])} for n in most]
    thresholds = [_number(threshold) for threshold in thresholds_in_use(model, options)]
    steps = []
    for step in answer.steps:
        limit = thresholds[step.exit - 1] if step.exit <= len(thresholds) else None
        steps.append({"exit": step.exit, "us": round(step.us, 1), "score": _number(step.score), "threshold": limit})
    found |= {"thresholds": thresholds, "stages": steps, "us": round(answer.waited_us, 1)}
    if answer.unfinished:
        found["unfinished"] = True
    return found


def _class(model: Loaded, n: int) -> str:
    return model.labels[n] if n < len(model.labels) else str(n)


def _number(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)
