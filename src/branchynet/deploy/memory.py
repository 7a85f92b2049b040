"""Name a batch that fits when a runtime runs out of memory."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ..errors import InputError, first_line

T = TypeVar("T")

# What ONNX Runtime, CUDA, cuBLAS and OpenVINO say.
_SHORT = re.compile(r"failed to allocate|out of memory|bad_alloc|ALLOC_FAILED|not enough memory", re.IGNORECASE)


def is_memory_error(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that memory was short."""
    return any(isinstance(one, MemoryError) or _SHORT.search(str(one)) for one in _chain(error))


def largest_fitting(make: Callable[[int], T], sizes: Sequence[int]) -> tuple[T | None, int, str]:
    """Make something of the first size for which there is enough memory.

    Args:
        make: raises an error for which `is_memory_error` holds if memory is short.
        sizes: from the largest to the smallest.

    Returns:
        What was made (None if no size fits), the last size that was tried, and why the first one did not fit; the
        reason is empty if it did.
    """
    cause = ""
    for size in sizes:
        try:
            return make(size), size, cause
        except Exception as error:
            if not is_memory_error(error):
                raise
            cause = cause or first_line(error)
        # Here the error is gone, and with it the memory that its frames hold.
    return None, sizes[-1], cause


def memory_error(run: Callable[[int], Any], rows: int, error: Exception) -> InputError:
    """Return the error for a batch that does not fit. Smaller halves are tried until one fits.

    Args:
        run: computes the first rows of the batch.
        rows: the number of rows of the batch.
        error: what the runtime raised.
    """
    cause = next(first_line(one) for one in reversed([*_chain(error)]))
    text = f"there is not enough memory for a batch of {rows} ({cause})"
    for size in (rows >> k for k in range(1, rows.bit_length())):
        try:
            run(size)
        except Exception as again:
            if not is_memory_error(again):
                raise
        else:
            return InputError(
                f"{text}; a batch of {size} fits: give fewer samples, or call answer_all(..., rows={size})"
            )
    return InputError(f"{text}, nor for one sample: free memory of the device, or export a smaller network")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that led to it: an error that ends a CUDA capture replaces the one that broke it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
