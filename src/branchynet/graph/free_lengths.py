"""Find out which lengths of its inputs a network takes, and which module fixes one.

`torch.export` assumes conditions on the sizes of the inputs, its guards, while it runs the network. A length is free as
far as all guards hold.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import SymInt, Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from ..argument_checks import described
from ..errors import GraphError, InputError
from .lengths import Length
from .onnx_builder import BATCH

Free = Mapping[str, Mapping[int, str]]

_LEAST = 2  # torch.export treats a size of 1 as a constant
_STEPS, _RUN = 64, 16  # the largest step, and how many lengths in a row must be allowed
_NEAR, _FAR = 1024, 1 << 20  # every length is tried up to `_NEAR` steps from the example


def free_axes(free: Free, names: Sequence[str], tensors: Sequence[Tensor]) -> list[dict[int, str]]:
    """Return the free dimensions of every input, with the names of their lengths.

    Raises:
        InputError: an input or dimension that does not exist, the batch, a dimension that has size 1 in the example, a
            name that is not an identifier or that the file uses, or one name for two sizes.
    """
    if not free or not all(isinstance(axes, Mapping) and axes for axes in free.values()):
        raise InputError(f"free must map inputs to dimensions, such as {{{names[0]!r}: {{1: 'length'}}}}; got {free!r}")
    if unknown := [name for name in free if name not in names]:
        raise InputError(f"free names {unknown[0]!r}, which is no input of the network: it reads {', '.join(names)}")
    sizes: dict[str, int] = {}
    known = dict(zip(names, tensors, strict=True))
    for given, axis, length in ((given, *pair) for given, axes in free.items() for pair in axes.items()):
        where, tensor = f"dimension {axis!r} of {given!r}", known[given]
        if axis == 0 and not isinstance(axis, bool):
            raise InputError(f"{where} is the batch, which is free already: leave it out of free")
        if not isinstance(axis, int) or isinstance(axis, bool) or not 0 < axis < tensor.dim():
            raise InputError(f"free names {where}, which has dimensions 1 to {tensor.dim() - 1} and the batch")
        if not _is_name(length):
            raise InputError(
                f"the name of {where} in free must be a word such as 'length', other than {BATCH!r}; got "
                f"{length if isinstance(length, str) else described(length)!r}"
            )
        size = tensor.shape[axis]
        if size < _LEAST:
            raise InputError(
                f"{where} is {size} in the example, so torch.export would fix it: give an example where it is at "
                f"least {_LEAST}"
            )
        if sizes.setdefault(length, size) != size:
            raise InputError(
                f"{where} is {size} in the example, but {length!r} is {sizes[length]} elsewhere: dimensions of one "
                "name have one size"
            )
    return [dict(free.get(name, {})) for name in names]


def _is_name(length: Any) -> bool:
    taken = isinstance(length, str) and (length == BATCH or length.startswith(("stay_", "rows_of_")))
    symbol = isinstance(length, str) and length[:1] in ("s", "u") and length[1:].isdigit()  # torch's own
    return isinstance(length, str) and length.isidentifier() and length.isascii() and not taken and not symbol


class Watch:
    """The guards that torch.export assumes, and the module that ran when it assumed each."""

    def __init__(self) -> None:
        self.shapes: list[tuple[Any, ...]] = []  # of the inputs, with torch's symbols
        self._events: list[tuple[int, nn.Module | None]] = []
        self._running: list[nn.Module] = []

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Watch the modules that run inside the context."""
        handles = [
            hooks.register_module_forward_pre_hook(self._enter),
            hooks.register_module_forward_hook(self._leave),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not self.shapes and any(isinstance(t, Tensor) and _symbols(t.shape) for t in args):
            self.shapes = [tuple(t.shape) for t in args]
        self._note()
        self._running.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._note()
        self._running.pop()

    def _note(self) -> None:
        self._events.append((len(self.guards()), self._running[-1] if self._running else None))

    def guards(self) -> list[Any]:
        """Return all guards so far."""
        symbols = [d for shape in self.shapes for d in _symbols(shape)]
        return symbols[0].node.shape_env.guards if symbols else []

    def module_of(self, guard: int) -> nn.Module | None:
        """Return the innermost module that ran when a guard was assumed."""
        return next((module for count, module in self._events if count > guard), None)


def _symbols(shape: Sequence[Any]) -> list[SymInt]:
    return [d for d in shape if isinstance(d, SymInt)]


def allowed_lengths(
    watch: Watch,
    names: Sequence[str],
    axes: Sequence[Mapping[int, str]],
    tensors: Sequence[Tensor],
    place: Callable[[nn.Module | None], str],
) -> tuple[Length, ...]:
    """Return the sizes that every free length may have.

    Args:
        watch: has watched the export.
        names: the names of the inputs.
        axes: the free dimensions of every input, as from `free_axes`.
        tensors: the inputs that were exported.
        place: names a module, for the error message.

    Raises:
        GraphError: the network takes one size of a length only.
    """
    at: dict[str, list[tuple[str, int]]] = {}
    sizes: dict[str, int] = {}
    symbols: dict[str, str] = {}  # torch's name of a size -> the length
    fixed: dict[str, int] = {}  # torch's name of any other size -> its value
    for name, named, tensor, shape in zip(names, axes, tensors, watch.shapes, strict=True):
        for axis, dim in enumerate(shape):
            symbol = str(dim.node._expr) if isinstance(dim, SymInt) else str(dim)
            if axis in named:
                at.setdefault(named[axis], []).append((name, axis))
                sizes[named[axis]] = tensor.shape[axis]
                symbols[symbol] = named[axis]
            else:  # the batch
                fixed[symbol] = tensor.shape[axis]
    guards = _Guards(watch, symbols, fixed, sizes)
    found = []
    for length, size in sizes.items():
        sizes_taken = guards.around(size, (length,))
        if sizes_taken is None:
            twins = [other for other in sizes if other != length and sizes[other] == size]
            if twins and guards.around(size, (length, *twins)) is not None:
                raise GraphError(
                    f"the network needs {' and '.join(map(repr, (length, *twins)))} to be equal: give them one name in "
                    "free"
                )
            where, axis = at[length][0]
            module = watch.module_of(guards.broken_near(size, length))
            if isinstance(module, nn.RNNBase):
                raise GraphError(
                    f"{length!r}, dimension {axis} of {where!r}, cannot stay free: PyTorch exports {place(module)} for "
                    f"a fixed length, here {size}; leave it out of free, and pad or cut the inputs to that length"
                )
            raise GraphError(
                f"{length!r}, dimension {axis} of {where!r}, cannot stay free: {place(module)} needs it to be {size}; "
                "leave it out of free, or change that module"
            )
        found.append(Length(length, tuple(at[length]), size, *sizes_taken))
    while guards.broken({one.name: one.least for one in found}) is not None:  # together they may be too small
        found = [replace(one, least=min(one.example, one.least + one.step)) for one in found]
    return tuple(found)


class _Guards:
    """The guards as functions of the lengths."""

    def __init__(
        self, watch: Watch, symbols: Mapping[str, str], fixed: Mapping[str, int], sizes: Mapping[str, int]
    ) -> None:
        self.symbols, self.fixed, self.sizes = symbols, fixed, sizes
        self.known = {**fixed, **{symbol: sizes[length] for symbol, length in symbols.items()}}
        self.expressions = [guard.expr for guard in watch.guards()]

    def broken(self, changed: Mapping[str, int]) -> int | None:
        """Return the first guard that does not hold if lengths have other sizes; None if all hold."""
        sizes = {**self.known, **{s: changed[length] for s, length in self.symbols.items() if length in changed}}
        return next((n for n, guard in enumerate(self.expressions) if not _holds(guard, sizes)), None)

    def around(self, size: int, lengths: Sequence[str]) -> tuple[int, int | None, int] | None:
        """Return the least and the largest allowed size, and the step; None if only one size is allowed."""

        def allowed(n: int) -> bool:
            return n >= _LEAST and self.broken(dict.fromkeys(lengths, n)) is None

        for step in range(1, _STEPS + 1):
            up = [size + k * step for k in range(1, _RUN + 1)]
            down = [n for k in range(1, _RUN + 1) if (n := size - k * step) >= _LEAST]
            if all(map(allowed, up)) or (len(down) >= 4 and all(map(allowed, down))):
                least = size
                while allowed(least - step):
                    least -= step
                return least, _most(allowed, size, step), step
        return None

    def broken_near(self, size: int, length: str) -> int:
        """Return a guard that fixes a length."""
        near = (self.broken({length: n}) for n in (2 * size, max(_LEAST, size // 2), size + 1, size - 1))
        return next((n for n in near if n is not None), len(self.expressions))


def _most(allowed: Callable[[int], bool], size: int, step: int) -> int | None:
    """Return the largest allowed size; None if there is no limit."""
    for k in range(1, _NEAR + 1):
        if not allowed(size + k * step):
            return size + (k - 1) * step
    good = _NEAR
    while allowed(size + 2 * good * step):
        good *= 2
        if good > _FAR:
            return None
    bad = 2 * good
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if allowed(size + middle * step) else (good, middle)
    return size + good * step


def _holds(guard: Any, sizes: Mapping[str, int]) -> bool:
    if any(str(symbol) not in sizes for symbol in guard.free_symbols):
        return True  # it is about a size that depends on values
    try:
        known = {symbol: sizes[str(symbol)] for symbol in guard.free_symbols}
        return bool(sympy_interp(PythonReferenceAnalysis, known, guard))
    except ZeroDivisionError:
        return False
