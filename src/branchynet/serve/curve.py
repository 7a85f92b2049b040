"""The accuracy and speed that the record and the cost beside a model predict for other thresholds of its file.

Shape letters: S samples, N exits.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..deploy.engine import Engine
from ..errors import BranchyNetError, FileError
from ..policy.evaluation import Frontier, evaluate, frontier
from ..policy.exit_cost import ExitCost
from ..policy.exit_record import ExitRecord, check_same_network
from ..policy.record_scores import scores_of_record
from ..policy.values import Policy

CHOOSE_ON = ("record-val.npz", "record.npz", "record-test.npz")
"""The records that thresholds are chosen on; the first that exists."""

PREDICT_ON = ("record-test.npz", "record.npz", "record-val.npz")
"""The records that accuracy and speed are predicted from; the first that exists."""

_STOPS = 60  # of the slider

log = logging.getLogger("branchynet.serve")


def predicted(folder: Path | None, engine: Engine | None, presets: Mapping[str, Policy]) -> dict[str, Any]:
    """Predict accuracy and time for thresholds of a file, as JSON values.

    A file runs the branches of all its exits, even if nothing leaves there, so the costs include all of them.

    Args:
        folder: the folder of the model; None if it has none of its own.
        engine: the engine of the file; None for a file of another tool.
        presets: the policies of the file by name.

    Returns:
        ``points``, fastest first, from the frontier; the last one sends every sample to the last exit. ``own`` is the
        point of the thresholds in the file; ``presets`` has the points of the presets by name. Each point has
        ``thresholds``, ``accuracy``, ``mean_us``, ``share`` and ``speedup`` over the network without exits. Without a
        record and a cost that fit, there are no points, and ``reason`` says why. ``settable`` is whether requests may
        give thresholds. ``samples`` is S.
    """
    found: dict[str, Any] = {"settable": False, "reason": "", "samples": 0, "own": None, "presets": {}, "points": []}
    policy = None if engine is None else engine.policy
    if engine is None or policy is None or not any(policy.enabled[:-1]):
        return {**found, "reason": "The file has no early exits."}
    if engine.fixed:
        return {**found, "reason": "The thresholds of the file are constants."}
    found["settable"] = True
    chosen_on, predicted_on = _first(folder, CHOOSE_ON), _first(folder, PREDICT_ON)
    if folder is None or chosen_on is None or predicted_on is None:
        return {**found, "reason": "No record lies beside the model, so accuracy and speed are unknown."}
    if not (folder / "cost.json").is_file():
        return {**found, "reason": "No cost.json lies beside the model, so accuracy and speed are unknown."}
    try:
        cost = ExitCost.load(folder / "cost.json")
        _check("cost.json", cost, engine)
        records = [ExitRecord.load(path) for path in (chosen_on, predicted_on)]
        for path, record in zip((chosen_on, predicted_on), records, strict=True):
            _check(path.name, record, engine)
        return found | _points(records[0], records[1], cost, policy, presets)
    except BranchyNetError as error:
        log.warning("no accuracy or speed is predicted: %s", error)
        return {**found, "reason": f"Accuracy and speed are unknown: {error}."}


def _points(
    candidates: ExitRecord, test: ExitRecord, cost: ExitCost, policy: Policy, presets: Mapping[str, Policy]
) -> dict[str, Any]:
    """Return the points of thresholds chosen on one record, with their outcomes on another."""
    used = [n for n, enabled in enumerate(policy.enabled) if enabled]
    at = cost.latency_us(policy.enabled)[used]
    own_cost = ExitCost(np.diff(at, prepend=0.0).tolist(), (0.0,) * len(at))  # branches always run, so they are trunk
    plain = sum(cost.trunk_us) if cost.plain_us is None else cost.plain_us
    candidates, test = (_at_exits(record, used, policy) for record in (candidates, test))

    def point(thresholds: tuple[float | None, ...]) -> dict[str, Any]:
        outcome = evaluate(test, Policy(thresholds=thresholds), own_cost)
        share, full = np.zeros(policy.num_exits), np.full(policy.num_exits, None)
        share[used], full[used] = outcome.exit_share, (*thresholds, None)
        return {
            "thresholds": full[:-1].tolist(),
            "accuracy": outcome.accuracy,
            "mean_us": outcome.mean_us,
            "speedup": plain / outcome.mean_us if outcome.mean_us else None,
            "share": share.tolist(),
        }

    never = (None,) * (len(used) - 1)
    stops = dict.fromkeys([*_stops(frontier(candidates, own_cost)), never])
    named = {name: point(tuple(one.thresholds[n] for n in used[:-1])) for name, one in {"": policy, **presets}.items()}
    own = named.pop("")
    return {"samples": test.samples, "own": own, "presets": named, "points": [point(one) for one in stops]}


def _first(folder: Path | None, names: tuple[str, ...]) -> Path | None:
    return None if folder is None else next((folder / name for name in names if (folder / name).is_file()), None)


def _check(name: str, value: ExitRecord | ExitCost, engine: Engine) -> None:
    check_same_network(f"{name} and the model", value.network, engine.metadata.get("network"))
    if value.num_exits != engine.num_exits:
        raise FileError(f"{name} has {value.num_exits} exits, but the model has {engine.num_exits}; make it again")


def _at_exits(record: ExitRecord, used: list[int], policy: Policy) -> ExitRecord:
    """Return the scores and losses of a record at some exits."""
    return ExitRecord.from_scores(scores_of_record(record, policy.score)[:, used], record.losses[:, used])


def _stops(curve: Frontier) -> list[tuple[float | None, ...]]:
    """Return thresholds of at most `_STOPS` points, evenly along the curve of accuracy over time."""
    steps = sum(np.abs(np.diff(v, prepend=v[0])) / (np.ptp(v) or 1.0) for v in (curve.mean_us, curve.accuracy))
    way = np.cumsum(steps)
    chosen = np.unique(np.searchsorted(way, np.linspace(0, way[-1], _STOPS)).clip(0, len(curve) - 1))
    return [curve.policy(int(n)).thresholds for n in chosen]
