"""Answers that are means over the exits passed so far, which may be more accurate for next to no work."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax
from torch import Tensor

from ..arguments import instance
from ..errors import InputError
from .digests import averaged_fingerprint, sketch
from .exit_record import ExitRecord, bounded
from .values import Floats, Ints

Weights = Sequence[Sequence[float]]
Of = Literal["softmax", "logits"]


def average(outputs: Sequence[Tensor], weights: Weights | None = None, *, of: Of = "softmax") -> tuple[Tensor, ...]:
    """What `averaged` answers where the exits answer `outputs`, earliest first, each `(B, C, ...)`; shapes stay."""
    rows = weight_rows(weights, len(outputs))
    if known_kind(of) == "logits":
        parts = list(outputs)
    else:
        parts = [torch.softmax(output, dim=1) for output in outputs]
    means = [_mean(parts[: len(row)], row) for row in rows]
    return tuple(mean.log() for mean in means) if of == "softmax" else tuple(means)


def averaged_record(record: ExitRecord, weights: Weights | None = None, *, of: Of = "softmax") -> ExitRecord:
    """The record of `averaged(net)` from the record of `net`, without running it again.

    Raises:
        InputError: a record without outputs, or wrong weights.
    """
    instance("record", record, ExitRecord, "give what record(...) returns")
    if record.outputs is None or record.labels is None:
        raise InputError("this record holds scores and losses; averaging reads outputs: record without loss=")
    exits = [torch.from_numpy(np.ascontiguousarray(record.outputs[:, n])) for n in range(record.num_exits)]
    network = record.network and averaged_fingerprint(record.network, weight_rows(weights, record.num_exits), of)
    return ExitRecord(
        torch.stack(average(exits, weights, of=of), dim=1).numpy(),
        record.labels,
        network=network,
        inputs=record.sample_digests,
        selected_on=selected_on(record.selected_on, weights),
    )


class FittedWeights(tuple[tuple[float, ...], ...]):
    """Rows of weights that remember, as a sketch, the samples that they were fitted on."""

    fitted_on: str = ""


def fit_weights(record: ExitRecord, *, of: Of = "softmax", steps: int = 200) -> FittedWeights:
    """Weights for `averaged(net, weights, of=of)` that make the answers of a record the most likely; deterministic.

    Those of probabilities are a mixture's, found by expectation-maximisation from equal ones. Those of logits are found
    by L-BFGS-B together with a temperature, in which the likelihood is concave; the temperature, which changes no
    answer, is then left out.

    Args:
        record: of `net`, not averaged, with outputs; other samples than those that thresholds are chosen on.
        of: ``"softmax"`` or ``"logits"``, as for `averaged`.
        steps: at most so many.

    Returns:
        A row an exit; row n holds n weights that sum to 1. They remember the samples, on which `choose` then tests no
        promise.

    Raises:
        InputError: a record without outputs.

    Source: Dempster, Laird and Rubin 1977, doi:10.1111/j.2517-6161.1977.tb01600.x; for logits logistic regression.
    """
    if record.outputs is None or record.labels is None:
        raise InputError("this record holds scores and losses; fitting reads outputs: record without loss=")
    fit = _mixture if known_kind(of) == "softmax" else _combination
    logits = bounded(record.outputs.astype(np.float64))
    fitted = FittedWeights(fit(logits[:, :n], record.labels, steps) for n in range(1, record.num_exits + 1))
    assert record.sample_digests is not None  # the record has outputs
    fitted.fitted_on = sketch(record.sample_digests)
    return fitted


def _mixture(logits: Floats, labels: Ints, steps: int) -> tuple[float, ...]:
    """Weights of the exits' probabilities, from logits `(S, n, C)`."""
    answered = softmax(logits, axis=2)[np.arange(len(labels)), :, labels]
    answered = np.maximum(answered, _LEAST)
    weights = np.full(logits.shape[1], 1 / logits.shape[1])
    for _ in range(steps):
        parts = weights * answered
        after = (parts / parts.sum(axis=1, keepdims=True)).mean(axis=0)
        done, weights = np.abs(after - weights).max() < 1e-9, after
        if done:
            break
    return tuple(weights.tolist())


def _combination(logits: Floats, labels: Ints, steps: int) -> tuple[float, ...]:
    """Weights of the exits' logits `(S, n, C)`."""
    samples, exits, _ = logits.shape
    answered = logits[np.arange(samples), :, labels]

    def objective(weights: Floats) -> tuple[float, Floats]:
        mean = np.einsum("snc,n->sc", logits, weights)
        expected = np.einsum("snc,sc->sn", logits, softmax(mean, axis=1))
        loss = logsumexp(mean, axis=1) - answered @ weights
        return float(loss.mean()), (expected - answered).mean(axis=0)

    start = np.full(exits, 1 / exits)
    found = minimize(
        objective, start, jac=True, method="L-BFGS-B", bounds=[(0.0, None)] * exits, options={"maxiter": steps}
    )
    total = float(found.x.sum())
    return tuple((found.x / total).tolist()) if total > 0 else tuple(start.tolist())  # 0 where no exit knows anything


_LEAST = 1e-30  # instead of a probability of 0, whose logarithm is infinite


def selected_on(before: Sequence[str], weights: Weights | None) -> tuple[str, ...]:
    """The samples that the exits were selected on, and those that the weights were fitted on."""
    fitted = weights.fitted_on if isinstance(weights, FittedWeights) else ""
    return tuple(dict.fromkeys((*before, *filter(None, [fitted]))))


def _mean(parts: Sequence[Tensor], row: Sequence[float]) -> Tensor:
    # A weight of 0 leaves its exit out: 0 times a logit of minus infinity would be NaN.
    first, *others = [part * weight for part, weight in zip(parts, row, strict=True) if weight]
    for part in others:
        first = first + part
    return first


def known_kind(of: Of) -> Of:
    """`of`. Raises `InputError` where it is unknown."""
    if of not in ("softmax", "logits"):
        raise InputError(f"of must be 'softmax' or 'logits'; got {of!r}")
    return of


def weight_rows(weights: Weights | None, exits: int) -> tuple[tuple[float, ...], ...]:
    """The weights, each row summing to 1."""
    if weights is None:
        return tuple((1 / n,) * n for n in range(1, exits + 1))
    try:
        rows = [np.asarray(row, np.float64) for row in weights]
    except (TypeError, ValueError):
        rows = []
    fits = [
        row.shape == (n,) and np.isfinite(row).all() and row.min() >= 0 and row.sum() for n, row in enumerate(rows, 1)
    ]
    if len(rows) != exits or not all(fits):
        raise InputError(
            f"weights for {exits} exits must be {exits} rows, row n of n numbers that are not negative and not all 0; "
            f"got {weights!r}"
        )
    return tuple(tuple((row / row.sum()).tolist()) for row in rows)
