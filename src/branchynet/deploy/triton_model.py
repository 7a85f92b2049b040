"""The ``model.py`` that Triton's Python backend runs for a folder of stages; `triton_repository` copies it.

It asks Triton for one stage after another, and only for the samples that stay, which an ensemble cannot express. All
requests of a batch are answered at the same time, so Triton batches the samples that reach a stage.

Shape letters: B samples of a request, R samples that reach a stage.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # part of Triton


class TritonPythonModel:
    """The name that the Python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read ``stages.json``, which lies beside this file."""
        path = Path(args["model_repository"]) / args["model_version"] / "stages.json"
        about = json.loads(path.read_text())
        self._name, self._inputs, self._stages = args["model_name"], about["inputs"], about["stages"]

    async def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all requests of a batch."""
        return await asyncio.gather(*map(self._answer, requests))

    async def _answer(self, request: Any) -> Any:
        try:
            outputs = await self._run(request)
        except Exception as error:  # Triton's own, or of wrong thresholds; the other requests are answered
            return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(k, v) for k, v in outputs.items()])

    async def _run(self, request: Any) -> dict[str, Any]:
        held = {value["name"]: _given(request, value["name"]) for value in self._inputs}
        samples = len(next(iter(held.values())))
        rows, outputs = np.arange(samples), {"exit": np.zeros((samples, 1), np.int64)}
        for number, stage in enumerate(self._stages, 1):
            found = await self._stage(number, stage, held)
            for name in ("label", "score", "output"):
                value = found[name].reshape(len(rows), -1) if found[name].ndim == 1 else found[name]
                outputs.setdefault(name, np.zeros((samples, *value.shape[1:]), value.dtype))[rows] = value
            outputs["exit"][rows] = stage["exit"]
            if stage["threshold"] is None:
                break
            stay = ~(found["score"] < self._threshold(request, stage, samples)[rows])
            rows = rows[stay]
            if not len(rows):
                break
            held = {name: value[stay] for name, value in {**held, **found}.items()}
        return outputs

    def _threshold(self, request: Any, stage: dict[str, Any], samples: int) -> Any:
        given = _given(request, f"threshold_{stage['exit']}")
        value = np.float32(stage["threshold"]) if given is None else given.reshape(-1)
        return np.broadcast_to(value, samples)

    async def _stage(self, number: int, stage: dict[str, Any], held: dict[str, Any]) -> dict[str, Any]:
        """Return the outputs `(R, ...)` of a stage by name."""
        tensors = [
            pb_utils.Tensor(value["name"], _shaped(held[value["name"]], value["shape"] or [1]))
            for value in stage["inputs"]
        ]
        asked = pb_utils.InferenceRequest(
            model_name=f"{self._name}_stage_{number}",
            requested_output_names=[value["name"] for value in stage["outputs"]],
            inputs=tensors,
        )
        answer = await asked.async_exec()
        if answer.has_error():
            raise RuntimeError(f"stage {number} failed: {answer.error().message()}")
        return {
            value["name"]: _shaped(pb_utils.get_output_tensor_by_name(answer, value["name"]).as_numpy(), value["shape"])
            for value in stage["outputs"]
        }


def _given(request: Any, name: str) -> Any:
    """Return an input of a request; None if it is optional and left out."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def _shaped(value: Any, shape: list[int]) -> Any:
    """Return `(R, ...)` values; Triton has no samples without dimensions, so those are `(R, 1)` there."""
    return np.ascontiguousarray(value).reshape(len(value), *shape)
