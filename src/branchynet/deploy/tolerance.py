"""How much the outputs of two correct engines may differ, per value.

Rounding is relative to the terms of a sum, which are unknown here. Their size is estimated from other results: the same
output for other samples (a column) and the other outputs of the same sample (a row), which read the same features.
Values of another scale (a class masked by -1e9, a price next to a share) do not count, because they would hide errors.

- A column has one weight vector, so its largest value estimates the terms better than a single value, in which products
  may cancel.
- A row matters if its whole column is small in comparison. In float32 its rounding is some units in the last place
  (1e-7) times the square root of the number of products, over all layers: below 1e-5. TF32 and half precision round the
  products themselves, to 2^-11 and coarser, so there a row counts as much as a column.
- A value near 0 in a column of far larger values differs by float32's rounding of those.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

FLOAT = 1e-3  # relative to a column; float32 in another order needs a hundredth of it, TF32 about half
_ROW = 1e-5  # relative to a row, in float32
_NEAR_ZERO = 1e-6, 1e6  # relative to a column, and the ratio of neighboring values up to which it counts
_SCALE, _COARSE_SCALE = 1e2, 1e4  # ratio of neighboring values above which another scale begins


def differences(got: NDArray[Any], want: NDArray[Any]) -> NDArray[Any]:
    """Return the absolute difference per value; infinite if only one is finite or both are different infinities."""
    with np.errstate(invalid="ignore", over="ignore"):  # infinity minus infinity
        apart = np.abs(got - want)
    same = np.equal(got, want) | (np.isnan(got) & np.isnan(want))
    return np.where(same, 0.0, np.where(np.isnan(apart), np.inf, apart))


def difference(got: NDArray[Any], want: NDArray[Any]) -> float:
    """Return the largest of the `differences`."""
    return float(differences(got, want).max(initial=0.0))


def tolerances(want: NDArray[Any], share: float = FLOAT, *, coarse: bool = False) -> NDArray[Any]:
    """Return the allowed difference per value of an output `(S, C, ...)`, float64 of the same shape.

    Args:
        want: the expected output; more samples give a better estimate of the scale.
        share: allowed difference, relative to the largest value of the same scale.
        coarse: products are rounded to fewer bits than in float32 (TF32, half precision).
    """
    sizes = np.abs(want.astype(np.float64))
    sizes = np.maximum(np.where(np.isfinite(sizes), sizes, 1.0), 1.0)  # below 1, an error is not relative
    scale = _COARSE_SCALE if coarse else _SCALE
    by_class = np.moveaxis(sizes, 1, 0)
    columns = by_class.reshape(len(by_class), -1)
    allowed = np.maximum(share * _largest_near(columns, scale), _NEAR_ZERO[0] * _largest_near(columns, _NEAR_ZERO[1]))
    rows = _largest_near(columns.T, scale).T
    allowed = np.maximum(allowed, (share if coarse else _ROW) * rows)
    return np.moveaxis(allowed.reshape(by_class.shape), 0, 1)


def _largest_near(sizes: NDArray[Any], scale: float) -> NDArray[Any]:
    """Return, per value, the largest of its row that steps of at most a factor `scale` to the next larger reach."""
    order = np.argsort(sizes, axis=1)
    ascending = np.take_along_axis(sizes, order, axis=1)
    last = np.ones(sizes.shape, bool)
    last[:, :-1] = ascending[:, 1:] > scale * ascending[:, :-1]
    ends = np.where(last, ascending, np.inf)
    reached = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    found = np.empty_like(sizes)
    np.put_along_axis(found, order, reached, axis=1)
    return found
