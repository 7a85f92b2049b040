"""Figures 3 and 4 of the paper, as data and as matplotlib figures.

Shape letters: S samples, P threshold vectors.
"""

import itertools
import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..policy.evaluation import evaluate, frontier
from ..policy.record_scores import scores_of_record
from ..policy.search import between, beyond
from ..policy.values import Policy
from ..report import figure_leaving, figure_tradeoff
from .results import NetworkResult

SWEEP = 17
"""Number of values per threshold in the sweep, spaced geometrically up to the largest entropy."""

_CURVE = 200  # number of points of a curve


def figure_3(found: NetworkResult) -> tuple[dict[str, Any], Figure]:
    """Plot accuracy against mean time on test images, for thresholds of the validation frontier.

    The figure also shows the plain network, the smaller plain networks, and a sweep that tries `SWEEP` values and
    *never* at each exit.
    """
    curve = frontier(found.val, found.cost)
    places = np.unique(np.linspace(0, len(curve) - 1, min(len(curve), _CURVE)).astype(int))
    best = [_evaluated(found, curve.policy(int(i))) for i in places]
    assert found.test.outputs is not None
    ladder = np.geomspace(1e-4, 1.0, SWEEP) * math.log(found.test.outputs.shape[2])  # up to the largest entropy
    combinations = itertools.product((None, *ladder), repeat=found.cost.num_exits - 1)
    sweep = [_evaluated(found, Policy(thresholds=c)) for c in combinations]
    point = found.points[0]
    outcome = point.outcome
    data = {
        "name": found.recipe.name,
        "network": found.recipe.title,
        "frontier": best,
        "sweep": sweep,
        "knee": _evaluated(found, curve.policy(curve.knee)),
        "chosen": {
            "thresholds": list(point.policy.thresholds), "us": outcome.mean_us, "accuracy": outcome.accuracy,
            "interval": list(outcome.accuracy_interval),
        },
        "plain": vars(found.plain),
        "smaller": [vars(plain) for plain in found.smaller],
    }  # fmt: skip
    picture = figure_tradeoff(
        [p["us"] for p in best],
        [p["accuracy"] for p in best],
        plain=(found.plain.us, found.plain.accuracy),
        tested=(outcome.mean_us or 0.0, outcome.accuracy, *outcome.accuracy_interval),
        rivals={s.network: (s.us, s.accuracy) for s in found.smaller},
        sweep=([p["us"] for p in sweep], [p["accuracy"] for p in sweep]),
    )
    return data, picture


def figure_4(found: NetworkResult) -> tuple[dict[str, Any], Figure]:
    """Plot accuracy and largest entropy against the share of test images that leave at exit 1, not at the last exit.

    The knee is the point of the entropy curve that is farthest below the chord between its ends.
    """
    entropy = scores_of_record(found.test)[:, 0].astype(np.float64)
    order = np.argsort(entropy, kind="stable")
    gain = found.test.losses[order, 0].astype(np.float64) - found.test.losses[order, -1]
    loss = found.test.losses[:, -1].sum(dtype=np.float64) + np.cumsum(gain)
    samples = found.test.samples
    places = np.unique(np.linspace(0, samples - 1, _CURVE).astype(int))
    share, accuracy, largest = (places + 1) / samples, 1 - loss[places] / samples, entropy[order][places]
    knee = int((share - (largest - largest[0]) / max(np.ptp(largest), 1e-12)).argmax())
    ordered = entropy[order].astype(np.float32)
    last = places[knee]
    above = ordered[last + 1 :][:1]
    threshold = between(ordered[last : last + 1], above) if len(above) else beyond(ordered[-1:])
    data = {
        "name": found.recipe.name,
        "network": found.recipe.title,
        "share": share.tolist(),
        "accuracy": accuracy.tolist(),
        "largest_entropy": largest.tolist(),
        "knee": {
            "share": float(share[knee]), "accuracy": float(accuracy[knee]), "entropy": float(largest[knee]),
            "threshold": float(threshold[0]),
        },
        "last_exit_accuracy": 1 - float(found.test.losses[:, -1].mean(dtype=np.float64)),
    }  # fmt: skip
    return data, figure_leaving(share, accuracy, largest, knee=knee)


def _evaluated(found: NetworkResult, policy: Policy) -> dict[str, Any]:
    outcome = evaluate(found.test, policy, found.cost)
    return {"thresholds": list(policy.thresholds), "us": outcome.mean_us, "accuracy": outcome.accuracy}
