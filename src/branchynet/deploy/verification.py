"""Compare an engine's outputs with those stored in its file."""

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..environment import processor
from ..errors import VerificationError
from ..onnx_files import parse_model
from ..policy.prediction import Prediction, concatenated
from ..policy.values import Policy, thresholds_text
from .engine import Engine
from .moved_thresholds import moved_thresholds
from .staged_engine import StagedEngine
from .stored_samples import Samples, samples_in
from .tolerance import FLOAT, difference, differences, tolerances

_TIE = 1e-5  # distance of a score to a threshold within which either decision is right
_TAIL = 10  # allowed difference of one score, relative to the mean difference between int8 and float
_ALIKE = 10  # largest ratio of slack between columns of one scale
_ALWAYS = 3e38  # a threshold that every score passes


@dataclass(frozen=True)
class Verification:
    """Result of comparing an engine with the outputs stored in its file. Made by `verify`.

    Attributes:
        where: runtime and processor.
        samples: number of samples compared.
        same_labels, same_exits: number of samples with the stored label and exit. The others are ties, unless
            `problems` lists them.
        difference: one difference of outputs per exit. For float, it is that of the output that comes closest to its
            tolerance, or exceeds it most; for int8, the mean over all samples and the columns of one scale.
        allowed: the tolerance of each of these differences.
        problems: what is wrong; () if the file passes.
    """

    where: str
    samples: int
    same_labels: int
    same_exits: int
    difference: dict[int, float]
    allowed: dict[int, float]
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether labels, exits and outputs agree with the file."""
        return not self.problems

    def __str__(self) -> str:
        exits = [f"exit {n} differs by {d:.2g} (allowed {self.allowed[n]:.2g})" for n, d in self.difference.items()]
        same = f"{self.same_labels} labels and {self.same_exits} exits as stored"
        text = "; ".join([f"{self.samples} samples in {self.where}: {same}", *exits])
        return f"{text}. Wrong: {'; '.join(self.problems)}" if self.problems else text


def check_file(engine: Engine, path: str | os.PathLike[str]) -> Verification:
    """Compare outputs with those stored in the file, and thresholds with the metadata. Raise `FileError`."""
    if isinstance(engine, StagedEngine):  # its thresholds are in the metadata alone
        return check(engine, samples_in(parse_model(Path(path) / "stage_1.onnx"), path, engine))
    model = parse_model(path)
    found = check(engine, samples_in(model, path, engine))
    return replace(found, problems=(*moved_thresholds(engine.policy, model, path), *found.problems))


def check_or_raise(engine: Engine, path: str | os.PathLike[str]) -> None:
    """Raise `VerificationError` if an engine's outputs differ from those stored in its file."""
    found = check_file(engine, path)
    if not found.passed:
        scheme = engine.metadata.get("precision", {}).get("scheme")
        remedy = "export it with precision='int8'" if scheme == "int8-full-range" else "use another runtime or provider"
        raise VerificationError(f"the outputs of {path} differ from those where it was exported; {remedy}. {found}")


def check(engine: Engine, samples: Samples, *, strict: bool = False) -> Verification:
    """Compare an engine's outputs with stored ones.

    Samples leave at every exit in turn, one per call and all in one call; then by the file's thresholds and by
    thresholds that split the samples. Outputs of a float network may differ by about a thousandth of the largest of
    their class (see `tolerances`). Two engines may round int8 values to neighboring steps, so the outputs of an int8
    network may differ by twice the difference between int8 and float, on average over all samples and columns of one
    scale; saturated sums differ by five times as much or more. The same holds for half precision, where two runtimes
    round at different places: each lies about as far from float32 as the stored outputs, so at most about twice as far
    from them. If the stored outputs of two labels are this close, either label is right.

    Args:
        engine: the engine of the file that holds the samples.
        samples: the samples from `read_samples`.
        strict: apply the limit of the mean of an int8 network to every single output.
    """
    dynamic = engine.metadata["batch"] == "dynamic"
    alone = [slice(row, row + 1) for row in range(len(samples))]
    parts = [*alone, slice(None)] if dynamic else alone
    seen = _Comparison(samples, coarse=not engine.float32)
    if engine.policy is None:
        for part in parts:
            for n, output in enumerate(engine.outputs(*_rows(samples, part))[1:], 1):
                seen.output(n, output, part)
    policy = engine.policy or Policy()
    movable = engine.policy is not None and not engine.fixed
    for n in (n for n, enabled in enumerate(policy.enabled, 1) if enabled and movable):
        forced = [None if t is None or k < n else _ALWAYS for k, t in enumerate(policy.thresholds, 1)]
        for part in parts:
            answer = engine(*_rows(samples, part), thresholds=forced)
            if (answer.exit != n).any():
                seen.problems.append(f"samples leave at exits {answer.exit} instead of exit {n}")
            else:
                seen.output(n, answer.output, part)
    for thresholds in (None, _middle(policy, samples)) if movable else (None,):
        whole = parts[-1:] if dynamic else alone
        answer = concatenated([engine(*_rows(samples, part), thresholds=thresholds) for part in whole])
        seen.answer(answer)
        if engine.policy:
            seen.exits(answer, thresholds or policy.thresholds)
    difference, allowed = seen.differences(strict)
    problems = tuple(dict.fromkeys(seen.problems))
    package = importlib.import_module(engine.runtime.split("-")[0])
    where = f"{engine.runtime} {package.__version__.split('-')[0]} on {processor()}"
    return Verification(where, len(samples), seen.same_labels, seen.same_exits, difference, allowed, problems)


def _rows(samples: Samples, part: slice) -> list[NDArray[Any]]:
    return [i[part] for i in samples.inputs]


def _middle(policy: Policy, samples: Samples) -> tuple[float | None, ...]:
    """Return thresholds that split the samples at the median score."""
    return tuple(
        None if t is None else float(np.median(s)) if np.isfinite(s).all() else t
        for t, s in zip(policy.thresholds, samples.scores, strict=False)
    )


class _Comparison:
    """Collects the differences between an engine's outputs and the stored ones."""

    def __init__(self, samples: Samples, *, coarse: bool = False) -> None:
        self.samples = samples
        self.tolerances = [tolerances(o, coarse=coarse) if o.ndim > 1 else o for o in samples.outputs]
        slacks = zip(samples.slack, samples.outputs, strict=True)
        self.slack = [np.broadcast_to(s, o.shape[1:2] or s.shape) for s, o in slacks]
        self.off: dict[int, list[tuple[NDArray[Any], NDArray[Any]]]] = {}
        self.same_labels = self.same_exits = len(samples)
        self.problems: list[str] = []

    def output(self, n: int, got: NDArray[Any], rows: slice | NDArray[Any]) -> None:
        """Compare outputs of exit n for some of the samples."""
        want = self.samples.outputs[n - 1][rows]
        allowed = self.tolerances[n - 1][rows]
        off = differences(got, want) if got.shape == want.shape else np.full(want.shape, np.inf)
        self.off.setdefault(n, []).append((_columns(off), _columns(allowed)))

    def answer(self, answer: Prediction) -> None:
        """Compare a prediction for all samples."""
        largest = np.take_along_axis(answer.output, answer.label[:, None], axis=1)[:, 0]
        if not np.array_equal(largest, answer.output.max(axis=1), equal_nan=True):
            self.problems.append("a label is not the index of its largest output")
        rows = list(enumerate(answer.exit - 1))
        wanted = np.array([self.samples.outputs[n][s].argmax(axis=0) for s, n in rows])
        self.same_labels = min(self.same_labels, _same(wanted, answer.label))
        if wrong := sum(self._beyond_a_tie(n, s, answer.label[s], wanted[s]) for s, n in rows):
            self.problems.append(f"{wrong} of {len(rows)} samples get another label, beyond a tie")
        for n in np.unique(answer.exit).tolist():
            self.output(n, answer.output[answer.exit == n], answer.exit == n)

    def _beyond_a_tie(self, n: int, s: int, got: NDArray[Any], wanted: NDArray[Any]) -> bool:
        """Whether the stored outputs of two labels at exit n + 1 differ by more than rounding."""
        if got.shape != wanted.shape or ((got < 0) | (got >= len(self.samples.outputs[n][s]))).any():
            return True
        (low, high), (a, b) = (
            [np.take_along_axis(of[n][s], label[None], axis=0) for label in (got, wanted)]
            for of in (self.samples.outputs, self.tolerances)
        )
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            return bool(
                (high.astype(np.float64) - low > a + b + _TAIL * (self.slack[n][got] + self.slack[n][wanted])).any()
            )

    def exits(self, answer: Prediction, thresholds: Sequence[float | None]) -> None:
        """Compare the exits and scores of a prediction."""
        paths = [self._exits(s, thresholds) for s in range(len(self.samples))]
        pairs = list(zip(answer.exit.tolist(), paths, strict=True))
        self.same_exits = min(self.same_exits, sum(n == path[-1] for n, path in pairs))
        wrong = sum(n not in path for n, path in pairs)
        if wrong:
            what = f"{wrong} of {len(paths)} samples leave at another exit"
            self.problems.append(f"{what}, at thresholds {thresholds_text(thresholds)}")
        for s, (n, _) in enumerate(pairs):
            score, slack = self.samples.scores[n - 1][s], self.samples.score_slack[n - 1]
            off = difference(answer.score[s], score)
            if not off <= FLOAT * max(1.0, abs(score)) + _TAIL * slack:
                self.problems.append(f"scores differ by {off:.3g} at exit {n}")

    def _exits(self, sample: int, thresholds: Sequence[float | None]) -> list[int]:
        """Return the exits at which a sample may leave: ties, then the exit by its stored scores."""
        ties, said = [], 0
        for n, threshold in enumerate([*thresholds, np.inf], 1):
            if threshold is None:
                continue
            score = self.samples.scores[n - 1][sample] if n <= len(thresholds) else -np.inf
            tie = _TIE * max(1.0, abs(threshold)) + _TAIL * self.samples.score_slack[n - 1]
            if score < threshold and not said:
                said = n
            if score < threshold + tie:
                ties.append(n)
            if score < threshold - tie:
                break
        return [*ties, said]

    def differences(self, strict: bool) -> tuple[dict[int, float], dict[int, float]]:
        """Return differences and tolerances by exit; add those that are too large to the front of `problems`."""
        difference, allowed, far = {}, {}, []
        for n, off in sorted(self.off.items()):
            slack = self.slack[n - 1]
            every, most = (np.concatenate(parts, axis=1) for parts in zip(*off, strict=True))
            if slack.any() and not strict:
                groups = _alike(slack)
                most = np.array([max(np.median(most[group]), 2 * slack[group].mean()) for group in groups])
                every = np.array([every[group].mean() for group in groups])
            else:
                most = np.maximum(most, slack[:, None])
            worst = int((every / most).argmax())
            difference[n], allowed[n] = float(every.flat[worst]), float(most.flat[worst])
            if not difference[n] <= allowed[n]:
                far.append(f"outputs differ by {difference[n]:.3g} at exit {n} (allowed {allowed[n]:.3g})")
        self.problems[:0] = far
        return difference, allowed


def _columns(values: NDArray[Any]) -> NDArray[Any]:
    """Return values `(S, C, ...)` as `(C, ...)`, one row per column."""
    return np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)


def _alike(slack: NDArray[Any]) -> list[NDArray[Any]]:
    """Return groups of columns whose `slack` differs by at most a factor `_ALIKE`, so that none hides the others."""
    groups: list[list[int]] = []
    for column in np.argsort(slack, kind="stable").tolist():
        if not groups or slack[column] > _ALIKE * slack[groups[-1][0]]:
            groups.append([])
        groups[-1].append(column)
    return [np.array(group) for group in groups]


def _same(a: NDArray[Any], b: NDArray[Any]) -> int:
    """Return the number of equal rows."""
    return int((a == b).reshape(len(a), -1).all(axis=1).sum())
