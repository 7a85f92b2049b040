"""Run a network stage by stage.

Shape letters: B samples in a batch, R samples that reach a stage.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..argument_checks import described, instance
from ..errors import InputError
from ..graph.lengths import Length
from ..policy.exit_rule import as_deployed, stays
from ..policy.prediction import Prediction
from ..policy.values import Floats, Ints
from .input_checks import Input, check_sizes, checked_inputs

Rows = Mapping[str, NDArray[Any]]
Answers = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]  # label, score, output
Reached = tuple[int, Ints | None, Answers, NDArray[np.bool_] | None]  # see `reached`


@dataclass(frozen=True)
class Stage:
    """One stage of a network with early exits.

    Attributes:
        exit: the number of its exit, from 1.
        inputs: inputs of the network and values from earlier stages, without their batch dimension.
        threshold: samples with a lower score leave; None at the last exit, where all leave.
        keeps: names of the values that later stages read.
        macs: multiply-accumulates per sample; None if unknown.
        lengths: the free lengths of its inputs besides the batch size.

    A stage pickles and deep-copies as the arguments of `load` and its number: the copy reads the folder again.
    """

    exit: int
    threshold: float | None
    inputs: tuple[Input, ...]
    keeps: tuple[str, ...]
    macs: float | None
    lengths: tuple[Length, ...]
    _run: Any = field(repr=False)  # maps arrays by name, `_reads`, to label, score, output, then `_gives`
    _reads: tuple[str, ...] = field(repr=False)
    _gives: tuple[str, ...] = field(repr=False)
    _passes: tuple[Input, ...] = field(repr=False)  # what later stages read, and this one neither reads nor gives
    _reopen: tuple[Any, ...] = field(repr=False)  # a function and its arguments, which open this stage again

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reopen

    def leave(self, scores: Floats) -> NDArray[np.bool_]:
        """Return which samples leave at this exit, `(R,)` bool, by their scores `(R,)` and the exported threshold.

        Raises:
            InputError: `scores` is not one number per sample.
        """
        given = np.asarray(scores)
        if given.ndim != 1 or given.dtype.kind not in "fiu":
            raise InputError(f"scores must be one number per sample, (R,), as run gives them; got {described(scores)}")
        if self.threshold is None:
            return np.ones(len(given), bool)
        return ~stays(given.astype(np.float32), as_deployed([self.threshold]))

    def run(self, rows: Rows) -> tuple[Prediction, Floats, dict[str, NDArray[Any]]]:
        """Compute the answers of this exit for R samples, and what later stages need.

        Args:
            rows: a dict of arrays `(R, ...)` by name. The first stage takes the inputs of the network. A later stage
                takes ``carried`` of the previous stage, without the rows of the samples that have left.

        Returns:
            A tuple ``(answers, scores, carried)``. ``answers`` is a `Prediction` with the answers of this exit for all
            R samples, whether they leave here or not. ``scores`` `(R,)` are their scores, for `leave`. ``carried`` is a
            dict of the arrays `(R, ...)` that later stages read.

        Raises:
            InputError: `rows` is not a dict, a value is missing or has the wrong shape or dtype, a free length has a
                size that the network does not take, or the values have different numbers of rows.
        """
        instance("rows", rows, Mapping, "give a dict of arrays by name, such as the carried values of the stage before")
        needed = (*self.inputs, *self._passes)
        if missing := [i.name for i in needed if i.name not in rows]:
            raise InputError(
                f"the stage of exit {self.exit} needs {missing[0]!r}: give the first stage the inputs of the network, "
                "and the others the carried values of the previous stage"
            )
        feeds, samples = checked_inputs([rows[i.name] for i in needed], {}, needed)
        check_sizes(feeds, self.lengths)
        return self.answer(feeds, samples)

    def answer(self, rows: Rows, samples: int) -> tuple[Prediction, Floats, dict[str, NDArray[Any]]]:
        """As `run`, for `(samples, ...)` rows that are known to be valid."""
        label, score, output, *given = self._run({name: rows[name] for name in self._reads})
        held = {**rows, **dict(zip(self._gives, given, strict=True))}
        answers = Prediction(label, np.full(samples, self.exit), score, output)
        return answers, score, {name: held[name] for name in self.keeps}


def reached(stages: Sequence[Stage], inputs: Rows, thresholds: Sequence[Floats]) -> Iterator[Reached]:
    """Run stage after stage until all samples have left.

    Args:
        stages: all stages, in order.
        inputs: the inputs of the network, `(B, ...)` each, B at least 1.
        thresholds: for each stage except the last, `(1,)` or `(B,)` float32.

    Yields:
        For each stage that runs, ``(exit, rows, answers, stay)``: the number of its exit; the positions `(R,)` in the
        batch of the samples that reach it, or None for all; their labels, scores and outputs; and whether they
        continue, or None if all leave.
    """
    rows, held = None, inputs  # at small batches every numpy call counts: after a stage, no code is in the caches
    for stage, threshold in zip(stages, (*thresholds, None), strict=True):
        label, score, output, *given = stage._run({name: held[name] for name in stage._reads})
        answers = label, score, output
        if threshold is None:
            yield stage.exit, rows, answers, None
            return
        stay = stays(score, threshold if rows is None or len(threshold) == 1 else threshold[rows])
        kept = stay.nonzero()[0]
        if not len(kept):
            yield stage.exit, rows, answers, None
            return
        found = stage.exit, rows, answers, stay
        if given:
            held = {**held, **dict(zip(stage._gives, given, strict=True))}
        if len(kept) < len(stay):  # before the answers go out: the caller may then change the inputs
            rows = kept if rows is None else rows[kept]
            held = {name: held[name].take(kept, axis=0) for name in stage.keeps}
        else:
            held = {name: held[name] for name in stage.keeps}
        yield found


def leaving(parts: Iterable[Reached]) -> Iterator[tuple[Ints, Prediction]]:
    """Yield the samples that leave at each stage as soon as it has run: their positions, and their answers."""
    for exit, rows, (label, score, output), stay in parts:
        if rows is None:
            rows = np.arange(len(score))
        if stay is not None:
            leave = (~stay).nonzero()[0]
            rows, label = rows[leave], label.take(leave, axis=0)
            score, output = score[leave], output.take(leave, axis=0)
        if len(rows):
            yield rows, Prediction(label, np.full(len(rows), exit), score, output)


def collected(parts: Iterator[Reached]) -> Prediction:
    """Return the answers of all samples in the order of the batch. A sample's last stage decides."""
    exit, _, (label, score, output), _ = next(parts)
    exits = np.empty(len(score), np.int64)
    exits.fill(exit)
    for exit, rows, answers, _ in parts:
        if rows is None:
            label, score, output = answers
            exits.fill(exit)
        else:
            label[rows], score[rows], output[rows] = answers
            exits[rows] = exit
    return Prediction(label, exits, score, output)
