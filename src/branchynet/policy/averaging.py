"""Average the outputs of the exits passed so far, which often makes them more accurate at almost no cost."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax
from torch import Tensor

from ..errors import InputError
from .exit_record import ExitRecord, bounded, outputs_and_labels
from .sample_digests import averaged_fingerprint
from .values import Floats, Ints

WeightRows = Sequence[Sequence[float]]
Of = Literal["softmax", "logits"]


def average(
    outputs: Sequence[Tensor], exit_weights: WeightRows | None = None, *, of: Of = "softmax"
) -> tuple[Tensor, ...]:
    """Return the outputs of `averaged` for the `outputs` of the exits, earliest first, each `(B, C, ...)`."""
    rows = exit_weight_rows(exit_weights, len(outputs))
    parts = outputs if known_kind(of) == "logits" else [torch.softmax(output, dim=1) for output in outputs]
    means = [_mean(parts[: len(row)], row) for row in rows]
    return tuple(mean.log() for mean in means) if of == "softmax" else tuple(means)


def averaged_record(record: ExitRecord, exit_weights: WeightRows | None = None, *, of: Of = "softmax") -> ExitRecord:
    """Compute the record of `averaged(net)` from the record of `net`, without running the network again.

    Args:
        record: of the network before averaging; it must hold outputs.
        exit_weights: as for `averaged`; by default equal weights.
        of: ``"softmax"`` or ``"logits"``, as for `averaged`.

    Raises:
        InputError: the record has no outputs, or `exit_weights` has another shape.

    Example:
        >>> import numpy as np
        >>> logits = np.array([[[3, 0], [0, 1]], [[0, 1], [0, 2]]], dtype=np.float32)  # 2 samples, 2 exits, 2 classes
        >>> averaged_record(ExitRecord(logits, np.array([0, 1]))).losses[:, 1]  # exit 2 is now right on both samples
        array([0., 0.], dtype=float32)
    """
    outputs, _ = outputs_and_labels(record, "averaging")
    exits = [torch.from_numpy(np.ascontiguousarray(outputs[:, n])) for n in range(record.num_exits)]
    rows = exit_weight_rows(exit_weights, record.num_exits)
    return ExitRecord(
        torch.stack(average(exits, rows, of=of), dim=1).numpy(),
        record.labels,
        network=record.network and averaged_fingerprint(record.network, rows, of),
        inputs=record.sample_digests,
        selected_on=selected_on(record.selected_on, exit_weights),
    )


class ExitWeights(tuple[tuple[float, ...], ...]):
    """Rows of exit weights. `fitted_on` is the sketch of the samples that they were fitted on; slices keep it."""

    fitted_on: str = ""

    def __getitem__(self, index: Any) -> Any:
        """Return a row, or the `ExitWeights` of a slice."""
        found = super().__getitem__(index)
        if isinstance(index, slice):
            found = ExitWeights(found)
            found.fitted_on = self.fitted_on
        return found


def fit_averaging(record: ExitRecord, *, of: Of = "softmax", steps: int = 200) -> ExitWeights:
    """Fit the `exit_weights` of `averaged` by maximum likelihood on a record; deterministic.

    Mean probabilities are a mixture. Expectation-maximization finds its weights, starting from equal weights. For
    logits, L-BFGS-B fits the weights and a temperature together, which makes the likelihood concave. The temperature
    changes no label and is dropped.

    Args:
        record: of the network before averaging; it must hold outputs. `choose` must read other samples.
        of: ``"softmax"`` or ``"logits"``, as for `averaged`.
        steps: the maximum number of steps of the optimizer.

    Returns:
        One row per exit; row n holds n weights that sum to 1. The value remembers its samples, and `choose` tests no
        promise on them.

    Raises:
        InputError: the record has no outputs.

    Example:
        >>> import numpy as np
        >>> logits = np.array([[[3, 0], [1, 0]], [[2, 0], [0, 3]]], dtype=np.float32)  # 2 samples, 2 exits, 2 classes
        >>> [len(row) for row in fit_averaging(ExitRecord(logits, np.array([0, 1])))]
        [1, 2]

    Source: Dempster, Laird and Rubin 1977, doi:10.1111/j.2517-6161.1977.tb01600.x; for logits, logistic regression.
    """
    outputs, labels = outputs_and_labels(record, "fitting")
    fit = _mixture if known_kind(of) == "softmax" else _combination
    logits = bounded(outputs.astype(np.float64))
    fitted = ExitWeights(fit(logits[:, :n], labels, steps) for n in range(1, record.num_exits + 1))
    fitted.fitted_on = record.sketch
    return fitted


def _mixture(logits: Floats, labels: Ints, steps: int) -> tuple[float, ...]:
    """Fit one weight per exit for probabilities, from logits `(S, n, C)`."""
    answered = softmax(logits, axis=2)[np.arange(len(labels)), :, labels]
    answered = np.maximum(answered, 1e-30)  # the logarithm of 0 is infinite
    exit_weights = np.full(logits.shape[1], 1 / logits.shape[1])
    for _ in range(steps):
        parts = exit_weights * answered
        after = (parts / parts.sum(axis=1, keepdims=True)).mean(axis=0)
        done, exit_weights = np.abs(after - exit_weights).max() < 1e-9, after
        if done:
            break
    return tuple(exit_weights.tolist())


def _combination(logits: Floats, labels: Ints, steps: int) -> tuple[float, ...]:
    """Fit one weight per exit for logits `(S, n, C)`."""
    samples, exits, _ = logits.shape
    answered = logits[np.arange(samples), :, labels]

    def objective(exit_weights: Floats) -> tuple[float, Floats]:
        mean = np.einsum("snc,n->sc", logits, exit_weights)
        expected = np.einsum("snc,sc->sn", logits, softmax(mean, axis=1))
        loss = logsumexp(mean, axis=1) - answered @ exit_weights
        return float(loss.mean()), (expected - answered).mean(axis=0)

    start, bounds = np.full(exits, 1 / exits), [(0.0, None)] * exits
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": steps}).x
    return tuple((found / found.sum() if found.sum() > 0 else start).tolist())  # the sum is 0 if no exit helps


def selected_on(before: Sequence[str], exit_weights: WeightRows | None) -> tuple[str, ...]:
    """Return the sketches in `before`, and that of the samples that `exit_weights` were fitted on."""
    fitted = exit_weights.fitted_on if isinstance(exit_weights, ExitWeights) else ""
    return tuple(dict.fromkeys((*before, *filter(None, [fitted]))))


def _mean(parts: Sequence[Tensor], row: Sequence[float]) -> Tensor:
    # A weight of 0 leaves its exit out: 0 times a logit of minus infinity would be NaN.
    first, *others = [part * weight for part, weight in zip(parts, row, strict=True) if weight]
    return sum(others, first)


def known_kind(of: Of) -> Of:
    """Return `of`. Raises `InputError` if it is unknown."""
    if of not in ("softmax", "logits"):
        raise InputError(f"of must be 'softmax' or 'logits'; got {of!r}")
    return of


def exit_weight_rows(exit_weights: WeightRows | None, exits: int) -> tuple[tuple[float, ...], ...]:
    """Return the exit weights, with each row scaled to sum to 1; by default equal weights. Raises `InputError`."""
    if exit_weights is None:
        return tuple((1 / n,) * n for n in range(1, exits + 1))
    try:
        rows = [np.asarray(row, np.float64) for row in exit_weights]
    except (TypeError, ValueError):
        rows = []
    right = [r.shape == (n,) and np.isfinite(r).all() and r.min() >= 0 and r.sum() for n, r in enumerate(rows, 1)]
    if len(rows) != exits or not all(right):
        raise InputError(
            f"exit_weights for {exits} exits must be {exits} rows, row n of n numbers that are not negative and not "
            f"all 0; got {exit_weights!r}"
        )
    return tuple(tuple((row / row.sum()).tolist()) for row in rows)
