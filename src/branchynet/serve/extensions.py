"""The configuration and the statistics of models, which Triton adds to the Open Inference Protocol.

The values are those of its messages ``ModelConfig`` and ``ModelStatistics``, and of their JSON.

Sources: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_model_configuration.md and
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_statistics.md.
"""

from collections.abc import Sequence
from typing import Any

from .metrics import ModelMetrics
from .models import VERSION, Loaded

EXTENSIONS = ("model_repository", "model_configuration", "statistics")
"""Parts of the protocol that a server may leave out, besides the binary tensors of HTTP."""


def config_of(model: Loaded) -> dict[str, Any]:
    """Return the configuration of a model.

    If requests share batches, ``max_batch_size`` is the most samples of a request, and shapes omit the batch; otherwise
    it is 0. ``parameters`` has the numbers of the exits, the score, and the thresholds of the file.
    """
    about, settings, backend = model.metadata, model.settings, model.backend
    shared = not backend.whole and all(one["shape"][0] == -1 for one in about["inputs"])
    found: dict[str, Any] = {
        "name": model.name,
        "platform": about["platform"],
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": settings.queue if shared else 0,
        "input": [_tensor(one, shared) for one in about["inputs"]],
        "output": [_tensor(one, shared) for one in about["outputs"]],
        "parameters": {name: {"string_value": text} for name, text in _parameters(model).items()},
    }
    if shared:
        wait = round(1e3 * settings.max_wait_ms)
        found["dynamic_batching"] = {
            "preferred_batch_size": [settings.max_batch],
            "max_queue_delay_microseconds": wait,
        }
    return found


def statistics_of(model: Loaded, counts: ModelMetrics, failed: int) -> dict[str, Any]:
    """Return the statistics of a model since the server started, without the times of failed requests.

    A request that passes several stages waits and runs in each of them, so ``queue`` and ``compute_infer`` count the
    parts of requests and the batches of all stages, as ``execution_count`` does.

    Args:
        model: the model.
        counts: the metrics of the model.
        failed: how many requests to it had a status of 400 or more.
    """
    found, _ = counts.snapshot()
    samples = found["branchynet_batch_samples"]
    first = samples.get(model.backend.exits[0])
    return {
        "name": model.name,
        "version": VERSION,
        "last_inference": counts.last_ms,
        "inference_count": 0 if first is None else round(first[1]),
        "execution_count": _count(samples),
        "inference_stats": {
            "success": _duration(found["branchynet_request_seconds"]),
            "fail": {"count": failed, "ns": 0},
            "queue": _duration(found["branchynet_queue_seconds"]),
            "compute_infer": _duration(found["branchynet_batch_seconds"]),
        },
    }


_Buckets = dict[int, tuple[list[tuple[str, float]], float]]


def _count(histograms: _Buckets) -> int:
    return int(sum(buckets[-1][1] for buckets, _ in histograms.values()))


def _duration(histograms: _Buckets) -> dict[str, int]:
    return {"count": _count(histograms), "ns": round(1e9 * sum(total for _, total in histograms.values()))}


def _tensor(entry: dict[str, Any], shared: bool) -> dict[str, Any]:
    kind = "STRING" if entry["datatype"] == "BYTES" else entry["datatype"]
    dims: Sequence[int] = entry["shape"][1:] if shared else entry["shape"]
    return {"name": entry["name"], "data_type": f"TYPE_{kind}", "dims": list(dims)}


def _parameters(model: Loaded) -> dict[str, str]:
    engine = model.backend.engine
    if engine is None:
        return {}
    found = {"exits": str(engine.num_exits)}
    if engine.policy is not None:
        stored = engine.policy.to_json()
        given = ("never" if t is None else f"{t:g}" for t in engine.policy.thresholds)
        found |= {"score": str(stored["score"]), "thresholds": ",".join(given)}
    return found
