"""Fit scores on a record: one temperature per exit, or one small model per exit that detects wrong answers.

Fit on other samples than those that choose thresholds or report results, such as one half of the validation record. A
score remembers its samples, and `choose` tests no promise on them. The fits are deterministic; the order of the samples
changes only the rounding. Shape letters: S samples, N exits, C classes, F features.
"""

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import expit, softmax

from ..errors import InputError, nearest
from .exit_record import ExitRecord, bounded, outputs_and_labels
from .fitted_scores import LearnedScore, TemperedScore
from .scores import SCORES, features
from .values import Floats, Ints

FEW = 5
"""A fit needs this many right and this many wrong answers of each exit except the last."""

_COOLEST, _HOTTEST = 0.05, 20.0
_FREE = 1e-3  # instead of no penalty: a fit then exists even if the features separate wrong and right answers


def fit_temperature(record: ExitRecord, score: str = "entropy") -> TemperedScore:
    """Fit one temperature per exit, which minimizes the cross-entropy of that exit.

    Args:
        record: must hold outputs.
        score: a name in `branchynet.policy.scores`.

    Returns:
        The score, with temperatures in 0.05..20. If the last exit has too few right or wrong answers for a fit, its
        temperature is 1.

    Raises:
        InputError: a record without outputs or of one class, an exit before the last with fewer than 5 right or 5 wrong
            answers, or an unknown score.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> labels = rng.integers(0, 3, 500)
        >>> logits = rng.normal(size=(500, 2, 3)) + 2 * np.eye(3)[labels][:, None]  # 500 samples, 2 exits, 3 classes
        >>> fit_temperature(ExitRecord(3 * logits, labels))  # the factor of 3 makes the exits too confident
        tempered entropy

    Source: Guo et al. 2017, arXiv 1706.04599, section 4.2.
    """
    if score not in SCORES:
        raise InputError(f"temperatures are for named scores, and {score!r} is none{nearest(str(score), SCORES)}")
    outputs, labels, fits = _checked(record)
    logits = outputs.astype(np.float64)
    temperatures = tuple(_temperature(logits[:, n], labels) if fit else 1.0 for n, fit in enumerate(fits))
    return TemperedScore(score, temperatures, record.sketch)


def fit_score(record: ExitRecord, *, earlier: bool = True, strength: float = 10.0) -> LearnedScore:
    """Fit one logistic regression per exit, which predicts from the outputs whether the exit is wrong.

    Args:
        record: must hold outputs.
        earlier: let each exit also use how far earlier exits agree with it. Their branches then stay in the graph, even
            with the threshold *never*; pass the score to `measure`, which includes their cost.
        strength: factor of the squared penalty on the weights of the standardized features. The weight of the log-odds
            of the softmax has no penalty, so with few wrong answers the score depends mostly on these log-odds.

    Returns:
        The score: the log-odds that the exit is wrong. If the last exit has too few right or wrong answers for a fit,
        its score is the same for every sample.

    Raises:
        InputError: a record without outputs or of one class, an exit before the last with fewer than 5 right or 5 wrong
            answers, or a strength that is not above 0.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> labels = rng.integers(0, 3, 500)
        >>> logits = rng.normal(size=(500, 2, 3)) + 2 * np.eye(3)[labels][:, None]  # 500 samples, 2 exits, 3 classes
        >>> score = fit_score(ExitRecord(logits, labels))
        >>> score.num_exits, score.classes
        (2, 3)

    Source: the future work of Teerapittayanon et al. 2016, section V-B.
    """
    if not 0 < strength < np.inf:
        raise InputError(f"strength must be a finite number above 0; got {strength}")
    outputs, _, fits = _checked(record)
    exits = tuple(torch.from_numpy(np.ascontiguousarray(outputs[:, n])) for n in range(record.num_exits))
    weights, biases = [], []
    for n, fit in enumerate(fits, 1):
        seen = features(exits[:n], earlier).double().numpy()
        wrong = record.losses[:, n - 1].astype(np.float64)
        found, bias = _logistic(seen, wrong, strength) if fit else (np.zeros(seen.shape[1]), _prior(wrong))
        weights.append(tuple(found.tolist()))
        biases.append(bias)
    return LearnedScore(outputs.shape[2], earlier, tuple(weights), tuple(biases), record.sketch)


def _checked(record: ExitRecord) -> tuple[Floats, Ints, list[bool]]:
    """Return outputs, labels, and whether each exit has enough answers for a fit; only the last may have too few."""
    outputs, labels = outputs_and_labels(record, "fitting")
    if (labels == labels[0]).all():
        raise InputError(f"all {record.samples} samples of the record are of class {labels[0]}; record several classes")
    wrong = record.losses.sum(axis=0).astype(int)
    fits = [bool(FEW <= count <= record.samples - FEW) for count in wrong]
    for n, (fit, count) in enumerate(zip(fits, wrong, strict=True), 1):
        if not fit and n < record.num_exits:
            raise InputError(
                f"exit {n} is wrong on {count} of the {record.samples} samples of the record; a fit needs at least "
                f"{FEW} wrong and {FEW} right answers: record more samples"
            )
    return outputs, labels, fits


def _temperature(logits: Floats, labels: Ints) -> float:
    """Find where the cross-entropy, which is convex in the inverse temperature, has the slope 0, within bounds."""
    possible = np.isfinite(logits[np.arange(len(labels)), labels])  # no temperature makes a ruled-out class more likely
    logits, labels = bounded(logits[possible]), labels[possible]
    answered = logits[np.arange(len(labels)), labels]

    def slope(inverse: float) -> float:
        return float(((softmax(inverse * logits, axis=1) * logits).sum(axis=1) - answered).mean())

    if slope(1 / _HOTTEST) >= 0:
        return _HOTTEST
    if slope(1 / _COOLEST) <= 0:
        return _COOLEST
    return 1 / brentq(slope, 1 / _HOTTEST, 1 / _COOLEST, xtol=1e-12)  # type: ignore[operator]


def _logistic(seen: Floats, wrong: Floats, strength: float) -> tuple[Floats, float]:
    """Fit weights `(F,)` and bias for features `(S, F)` before standardization; the first has almost no penalty."""
    mean, spread = seen.mean(axis=0), seen.std(axis=0)
    spread[spread < 1e-9] = np.inf  # a constant feature gets the weight 0
    design = np.column_stack([(seen - mean) / spread, np.ones(len(seen))])
    penalty = np.append(np.full(seen.shape[1], strength), 0.0)
    penalty[0] = _FREE

    def objective(weights: Floats) -> float:
        odds = design @ weights
        return float((np.logaddexp(0, odds) - wrong * odds).sum() + (penalty * weights**2).sum() / 2)

    weights = np.append(np.zeros(seen.shape[1]), _prior(wrong))
    value = objective(weights)
    for _ in range(100):
        p = expit(design @ weights)
        gradient = design.T @ (p - wrong) + penalty * weights
        step = np.linalg.solve((design.T * (p * (1 - p))) @ design + np.diag(penalty), gradient)
        size = 1.0
        while (after := objective(weights - size * step)) > value and size > 1e-6:
            size /= 2
        if size <= 1e-6 or np.abs(step).max() < 1e-10:
            break
        weights, value = weights - size * step, after
    found = weights[:-1] / spread
    return found, float(weights[-1] - found @ mean)


def _prior(wrong: Floats) -> float:
    """Return the log-odds of a wrong answer without any feature."""
    return float(np.log((wrong.sum() + 0.5) / (len(wrong) - wrong.sum() + 0.5)))
