"""Run a network stage by stage.

Shape letters: B samples in a batch, R samples that reach a stage.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..argument_checks import instance
from ..errors import InputError
from ..policy.exit_rule import as_deployed, stays
from ..policy.prediction import Prediction
from ..policy.values import Floats, Ints
from .input_checks import Input, checked_inputs

Rows = Mapping[str, NDArray[Any]]
Reached = tuple[Ints, Prediction, NDArray[np.bool_]]


@dataclass(frozen=True)
class Stage:
    """One stage of a network with early exits.

    Attributes:
        exit: the number of its exit, from 1.
        inputs: inputs of the network and values from earlier stages, without their batch dimension.
        threshold: samples with a lower score leave; None at the last exit, where all leave.
        keeps: names of the values that later stages read.
        macs: multiply-accumulates per sample; None if unknown.
    """

    exit: int
    threshold: float | None
    inputs: tuple[Input, ...]
    keeps: tuple[str, ...]
    macs: float | None
    _run: Any = field(repr=False)  # maps arrays by input name to label, score, output, then `_gives`
    _gives: tuple[str, ...] = field(repr=False)
    _passes: tuple[Input, ...] = field(repr=False)  # what later stages read, and this one neither reads nor gives
    _reopen: tuple[Any, ...] = field(repr=False)  # a function and its arguments, which open this stage again

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reopen

    def leave(self, scores: Floats) -> NDArray[np.bool_]:
        """Return which samples leave at this exit, `(R,)` bool, by their scores `(R,)` and the exported threshold."""
        if self.threshold is None:
            return np.ones(len(scores), bool)
        return ~stays(np.asarray(scores, np.float32), as_deployed([self.threshold]))

    def run(self, rows: Rows) -> tuple[Prediction, Floats, dict[str, NDArray[Any]]]:
        """Compute the answers of this exit for R samples, and what later stages need.

        Args:
            rows: for the first stage, a dict of the inputs of the network, `(R, ...)` each, by their names. For a later
                stage, the ``carried`` of the stage before, with the rows of the samples that stay.

        Returns:
            ``(answers, scores, carried)``: the `Prediction` as if all samples left here, its scores `(R,)`, and the
            values that later stages read, `(R, ...)` each.

        Raises:
            InputError: `rows` is no dict, a value is missing or has the wrong shape or dtype, or the values have
                different numbers of rows.
        """
        instance("rows", rows, Mapping, "give a dict of arrays by name, such as the carried values of the stage before")
        needed = (*self.inputs, *self._passes)
        if missing := [i.name for i in needed if i.name not in rows]:
            raise InputError(
                f"the stage of exit {self.exit} needs {missing[0]!r}: give the first stage the inputs of the network, "
                "and the others the carried values of the previous stage"
            )
        return self.answer(*checked_inputs([rows[i.name] for i in needed], {}, needed))

    def answer(self, rows: Rows, samples: int) -> tuple[Prediction, Floats, dict[str, NDArray[Any]]]:
        """As `run`, for `(samples, ...)` rows that are known to be right."""
        label, score, output, *given = self._run({i.name: rows[i.name] for i in self.inputs})
        computed = dict(zip(self._gives, given, strict=True))
        carried = {name: computed[name] if name in computed else rows[name] for name in self.keeps}
        return Prediction(label, np.full(samples, self.exit), score, output), score, carried


def reached(stages: Sequence[Stage], inputs: Rows, samples: int, thresholds: Sequence[Floats]) -> Iterator[Reached]:
    """Run stage after stage until all samples have left.

    Args:
        stages: all stages, in order.
        inputs: the inputs of the network, `(B, ...)` each.
        samples: B, at least 1.
        thresholds: for each stage except the last, `(1,)` or `(B,)` float32.

    Yields:
        For each stage that runs, ``(rows, answers, stay)``: the positions `(R,)` in the batch of the samples that reach
        it, their answers at its exit, and whether they continue.
    """
    rows, held = np.arange(samples), inputs
    for stage, threshold in zip(stages, (*thresholds, None), strict=True):
        answers, score, held = stage.answer(held, len(rows))
        if threshold is None:
            yield rows, answers, np.zeros(len(rows), bool)
            return
        stay = stays(score, threshold if len(threshold) == 1 else threshold[rows])
        kept, found = stay.nonzero()[0], (rows, answers, stay)
        if 0 < len(kept) < len(rows):  # before the answers go out: the caller may then change the inputs
            rows, held = rows[kept], {name: value.take(kept, axis=0) for name, value in held.items()}
        yield found
        if not len(kept):
            return


def leaving(parts: Iterable[Reached]) -> Iterator[tuple[Ints, Prediction]]:
    """Yield the samples that leave at each stage as soon as it has run: their positions, and their answers."""
    for rows, answers, stay in parts:
        leave = (~stay).nonzero()[0]
        if len(leave) == len(rows):
            yield rows, answers
        elif len(leave):
            picked: list[Any] = [part.take(leave, axis=0) for part in answers]
            yield rows[leave], Prediction(*picked)


def collected(parts: Iterator[Reached]) -> Prediction:
    """Return the answers of all samples in the order of the batch. All samples reach the first stage."""
    _, found, _ = next(parts)
    for rows, answers, _ in parts:
        if len(rows) == len(found.exit):
            found = answers
        else:
            for values, part in zip(found, answers, strict=True):
                values[rows] = part  # a sample keeps the answer of the last stage that it reaches
    return found
