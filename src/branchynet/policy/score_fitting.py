"""Fitting scores on a record: a temperature an exit, or a small model an exit that tells wrong answers from right ones.

Fit on other samples than those that thresholds are calibrated or reported on, such as one half of the validation
record: a score knows the samples that it was fitted on, and `choose` tests no promise on these. Everything here is
deterministic, and the order of the samples matters to nothing but rounding.
Shape letters: S samples, N exits, C classes, F features.
"""

import numpy as np
import torch

from ..arguments import instance
from ..errors import InputError, nearest
from .digests import sketch
from .exit_record import ExitRecord, bounded
from .fitted_scores import LearnedScore, TemperedScore
from .scores import SCORES, features
from .values import Floats, Ints

FEW = 5
"""So many right and so many wrong answers an exit must have given, the last excepted, for a fit to mean anything."""

_COOLEST, _HOTTEST = 0.05, 20.0
_FREE = 1e-3  # in place of no penalty, so that a fit exists where wrong and right answers part completely


def fit_temperature(record: ExitRecord, score: str = "entropy") -> TemperedScore:
    """A named score with one temperature an exit, each of which minimises the cross-entropy of its exit's answers.

    Args:
        record: with outputs `(S, N, C)`.
        score: a name in `branchynet.policy.record_scores`.

    Returns:
        The score; temperatures lie in 0.05..20. That of a last exit that is right, or wrong, too often to tell is 1.

    Raises:
        InputError: a record without outputs or of one class, an exit before the last with fewer than 5 right or 5 wrong
            answers, or an unknown score.

    Source: Guo et al. 2017, arXiv 1706.04599, section 4.2.
    """
    if score not in SCORES:
        raise InputError(f"temperatures are for named scores, and {score!r} is none{nearest(str(score), SCORES)}")
    outputs, labels, fits = _checked(record)
    logits = outputs.astype(np.float64)
    temperatures = tuple(_temperature(logits[:, n], labels) if fit else 1.0 for n, fit in enumerate(fits))
    return TemperedScore(score, temperatures, _fitted_on(record))


def fit_score(record: ExitRecord, *, earlier: bool = True, strength: float = 10.0) -> LearnedScore:
    """A score that has learned, exit by exit, how outputs look when the answer is wrong: logistic regressions.

    Args:
        record: with outputs `(S, N, C)`.
        earlier: let each exit also see how far earlier exits agree with it. Their branches then stay in the graph even
            where their threshold is *never*: give `measure` the score, so that costs know.
        strength: of the squared penalty on the weights of standardised features, all but the odds that the softmax
            itself gives: the fewer wrong answers there are, the more is left to those.

    Returns:
        The score: log-odds that the answer is wrong. At a last exit that is right, or wrong, too often to tell, which
        nobody leaves early, it is the same for every sample.

    Raises:
        InputError: a record without outputs or of one class, an exit before the last with fewer than 5 right or 5 wrong
            answers, or a strength that is not above 0.

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
    return LearnedScore(outputs.shape[2], earlier, tuple(weights), tuple(biases), _fitted_on(record))


def _fitted_on(record: ExitRecord) -> str:
    found = record.sample_digests
    assert found is not None  # the record has outputs
    return sketch(found)


def _checked(record: ExitRecord) -> tuple[Floats, Ints, list[bool]]:
    """Outputs, labels, and whether each exit can be fitted; all but the last must."""
    instance("record", record, ExitRecord, "give what record(...) returns")
    if record.outputs is None or record.labels is None:
        raise InputError("this record holds scores and losses; fitting reads outputs: record without loss=")
    if (record.labels == record.labels[0]).all():
        raise InputError(f"all {record.samples} samples of the record are of class {record.labels[0]}; record several")
    wrong = record.losses.sum(axis=0).astype(int)
    fits = [bool(FEW <= count <= record.samples - FEW) for count in wrong]
    for n, (fit, count) in enumerate(zip(fits, wrong, strict=True), 1):
        if not fit and n < record.num_exits:
            raise InputError(
                f"exit {n} is wrong on {count} of the {record.samples} samples of the record; to learn from, it needs "
                f"at least {FEW} wrong and {FEW} right answers: record more samples"
            )
    return record.outputs, record.labels, fits


def _temperature(logits: Floats, labels: Ints) -> float:
    """Newton's method on the inverse temperature, in which the cross-entropy is convex, kept within its bounds."""
    low, high, inverse = 1 / _HOTTEST, 1 / _COOLEST, 1.0
    possible = np.isfinite(logits[np.arange(len(labels)), labels])  # no temperature makes a ruled-out class more likely
    logits, labels = bounded(logits[possible]), labels[possible]
    logits = logits - logits.max(axis=1, keepdims=True)
    answered = logits[np.arange(len(labels)), labels]
    for _ in range(100):
        p = np.exp(inverse * logits)
        p /= p.sum(axis=1, keepdims=True)
        mean = (p * logits).sum(axis=1)
        slope = (mean - answered).mean()
        bend = ((p * logits**2).sum(axis=1) - mean**2).mean()
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        moved = inverse - slope / bend if bend > 0 else high
        if not low < moved < high:
            moved = (low * high) ** 0.5
        if abs(moved - inverse) <= 1e-12 * inverse:
            break
        inverse = moved
    return float(1 / inverse)


def _logistic(seen: Floats, wrong: Floats, strength: float) -> tuple[Floats, float]:
    """Weights `(F,)` and bias of the logistic regression, for features as they come; the first is not penalised."""
    mean, spread = seen.mean(axis=0), seen.std(axis=0)
    spread[spread < 1e-9] = np.inf  # what never changes tells nothing
    design = np.column_stack([(seen - mean) / spread, np.ones(len(seen))])
    penalty = np.append(np.full(seen.shape[1], strength), 0.0)
    penalty[0] = _FREE

    def objective(weights: Floats) -> float:
        odds = design @ weights
        return float((np.logaddexp(0, odds) - wrong * odds).sum() + (penalty * weights**2).sum() / 2)

    weights = np.append(np.zeros(seen.shape[1]), _prior(wrong))
    value = objective(weights)
    for _ in range(100):
        p = 1 / (1 + np.exp(-(design @ weights)))
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
    """The log-odds of a wrong answer where nothing else is known."""
    return float(np.log((wrong.sum() + 0.5) / (len(wrong) - wrong.sum() + 0.5)))
