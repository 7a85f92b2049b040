"""Run a network stage by stage.

Shape letters: B samples in a batch, R samples that reach a stage.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..policy.exit_rule import stays
from ..policy.prediction import Prediction
from ..policy.values import Floats, Ints
from .input_checks import Input, checked_inputs

Rows = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Stage:
    """One stage of a network with early exits.

    Attributes:
        exit: the number of its exit, from 1.
        inputs: inputs of the network and values from earlier stages, without their batch dimension.
        keeps: names of the values that later stages read.
        macs: multiply-accumulates per sample; None if unknown.
    """

    exit: int
    inputs: tuple[Input, ...]
    keeps: tuple[str, ...]
    macs: float | None
    _run: Any  # maps arrays by input name to label, score, output, then `_gives`
    _gives: tuple[str, ...]

    def run(self, rows: Rows) -> tuple[Prediction, Floats, dict[str, NDArray[Any]]]:
        """Compute the answers of this exit for R samples, and what later stages need.

        Args:
            rows: the arrays that `inputs` names, `(R, ...)` each, and those that only later stages read. For the first
                stage these are the inputs of the network; for a later stage, the rows of ``carried`` that stay.

        Returns:
            ``(answers, scores, carried)``: the `Prediction` as if all samples left here, its scores `(R,)`, and the
            values that later stages read, `(R, ...)` each.

        Raises:
            InputError: a value is missing, or has the wrong shape or dtype.
        """
        needed = dict.fromkeys((*(i.name for i in self.inputs), *self.keeps))
        if missing := [name for name in needed if name not in rows and name not in self._gives]:
            raise InputError(
                f"the stage of exit {self.exit} needs {missing[0]!r}: give the first stage the inputs of the network, "
                "and the others the carried values of the previous stage"
            )
        feeds, samples = checked_inputs([rows[i.name] for i in self.inputs], {}, self.inputs)
        return self.answer(rows, feeds, samples)

    def answer(
        self, rows: Rows, feeds: dict[str, NDArray[Any]], samples: int
    ) -> tuple[Prediction, Floats, dict[str, NDArray[Any]]]:
        """As `run`, for inputs that are known to be right."""
        label, score, output, *given = self._run(feeds)
        computed = dict(zip(self._gives, given, strict=True))
        carried = {name: computed[name] if name in computed else rows[name] for name in self.keeps}
        return Prediction(label, np.full(samples, self.exit), score, output), score, carried


def run_stages(
    stages: Sequence[Stage], inputs: Rows, samples: int, thresholds: Sequence[Floats]
) -> Iterator[tuple[Ints, Prediction]]:
    """Yield the samples that leave at each exit as soon as its stage has run: their rows, and their answers.

    Args:
        stages: all stages, in order.
        inputs: the inputs of the network, `(B, ...)` each.
        samples: B, at least 1.
        thresholds: for each stage except the last, `(1,)` or `(B,)` float32.
    """
    rows, held = np.arange(samples), inputs
    for stage, threshold in zip(stages, (*thresholds, None), strict=True):
        feeds = {i.name: held[i.name] for i in stage.inputs}
        answers, score, held = stage.answer(held, feeds, len(rows))
        if threshold is None:
            yield rows, answers
            return
        stay = stays(score, threshold if len(threshold) == 1 else threshold[rows])
        if stay.all():
            continue
        if not stay.any():
            yield rows, answers
            return
        leave = np.flatnonzero(~stay)
        yield rows[leave], _picked(answers, leave)
        kept = np.flatnonzero(stay)
        rows, held = rows[kept], {name: value.take(kept, axis=0) for name, value in held.items()}


def collected(parts: Iterator[tuple[Ints, Prediction]], samples: int) -> Prediction:
    """Return the answers of all samples in the order of the batch."""
    rows, first = next(parts)
    if len(rows) == samples:
        return first
    empty: list[Any] = [np.empty((samples, *part.shape[1:]), part.dtype) for part in first]
    for places, answers in ((rows, first), *parts):
        for values, part in zip(empty, answers, strict=True):
            values[places] = part
    return Prediction(*empty)


def _picked(answers: Prediction, rows: Ints) -> Prediction:
    picked: list[Any] = [part.take(rows, axis=0) for part in answers]
    return Prediction(*picked)
