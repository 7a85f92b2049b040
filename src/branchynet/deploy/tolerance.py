"""How far two engines' answers may lie apart, for every figure by itself.

Two right engines differ by rounding, and rounding is relative to what is added up. Of a sum no more is known here than
other results of its kind: the same output for other samples (a column), and the other outputs of the same sample (a
row), which read the same features. Neither counts where it is of another scale: a class masked by -1e9, or a price
beside a share, says nothing about the rounding of other figures, and would hide that they are wrong.

- A column is of one weight vector, so its largest figure is near what was added up, or above what a single figure, in
  which products may cancel, is.
- A row matters where all of a column is small beside it. In float32 its rounding is some units in the last place (1e-7)
  times the square root of the number of products, which deep networks add up: 1e-5 holds that. TF32 and half precision
  round the products themselves, to 2^-11 and coarser, so that a row counts as much as a column.
- A figure near 0 in a column of far larger ones is off by float32's rounding of those.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

FLOAT = 1e-3  # of a column's figures; float32 in another order takes a hundredth of it, TF32 about half
_ROW = 1e-5  # of a row's figures in float32
_NEAR_ZERO = 1e-6, 1e6  # of a column's figures in float32, however much larger up to so many times
_SCALE, _COARSE_SCALE = 1e2, 1e4  # figures so many times larger than the next smaller one are of another scale


def differences(got: NDArray[Any], want: NDArray[Any]) -> NDArray[Any]:
    """How far every figure of two answers is off; infinite where they are not finite in the same way."""
    with np.errstate(invalid="ignore", over="ignore"):  # infinity less infinity
        apart = np.abs(got - want)
    same = np.equal(got, want) | (np.isnan(got) & np.isnan(want))
    return np.where(same, 0.0, np.where(np.isnan(apart), np.inf, apart))


def difference(got: NDArray[Any], want: NDArray[Any]) -> float:
    """The largest difference of two answers; infinite where they are not finite in the same way."""
    return float(differences(got, want).max(initial=0.0))


def tolerances(want: NDArray[Any], share: float = FLOAT, *, coarse: bool = False) -> NDArray[Any]:
    """How far every figure of an answer `(S, C, ...)` may be off, float64 of the same shape.

    Args:
        want: S samples; the more, the better their scale is known.
        share: of the largest figure of the same scale.
        coarse: products are rounded to fewer bits than float32 has (TF32, half precision).
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
    """For every figure, the largest one of its row that is reached by steps to the next larger of at most `scale`."""
    order = np.argsort(sizes, axis=1)
    ascending = np.take_along_axis(sizes, order, axis=1)
    last = np.ones(sizes.shape, bool)
    last[:, :-1] = ascending[:, 1:] > scale * ascending[:, :-1]
    ends = np.where(last, ascending, np.inf)
    reached = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    found = np.empty_like(sizes)
    np.put_along_axis(found, order, reached, axis=1)
    return found
