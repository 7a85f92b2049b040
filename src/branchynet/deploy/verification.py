"""Files that check themselves: whether an engine answers the stored samples as the file says."""

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..environment import processor
from ..errors import VerificationError
from ..policy.prediction import Prediction
from ..policy.values import Policy, thresholds_text
from .engine import Engine
from .onnx_file import parse_model
from .stored_samples import Samples, samples_in
from .thresholds import moved_thresholds
from .tolerance import FLOAT, difference, differences, tolerances

_TIE = 1e-5  # engines may decide either way on scores so near to a threshold
_TAIL = 10  # a sample's score may be off so many times what scores are off in the mean between int8 and float
_ALWAYS = 3e38  # a threshold that every score passes


@dataclass(frozen=True)
class Verification:
    """Whether an engine gives the answers that are stored in its file. Made by `verify`.

    Attributes:
        where: runtime and processor.
        samples: S, how many were compared.
        same_labels, same_exits: how many of them got the stored label and left at the stored exit. Others are ties
            where nothing is listed under `problems`.
        difference: by exit, how far outputs are off: where they come closest to what is allowed or exceed it by most
            (float), or in the mean over all samples (int8).
        allowed: by exit, how far they may be off there.
        problems: what is wrong; () where all is well.
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
        """Whether labels, exits and outputs are those of the file, within `allowed`."""
        return not self.problems

    def __str__(self) -> str:
        told = (
            f"{self.samples} samples in {self.where}: {self.same_labels} labels and {self.same_exits} exits as stored; "
            + "; ".join(
                f"exit {n} differs by {d:.2g} (allowed {self.allowed[n]:.2g})" for n, d in self.difference.items()
            )
        )
        return f"{told}. Wrong: {'; '.join(self.problems)}" if self.problems else told


def check_file(engine: Engine, path: str | os.PathLike[str]) -> Verification:
    """Compare an engine's answers with those stored in its file, and the file's thresholds with its metadata.

    Raises `FileError` where the file holds no samples, or damaged ones.
    """
    model = parse_model(path)
    found = check(engine, samples_in(model, path, engine))
    return replace(found, problems=(*moved_thresholds(engine.policy, model, path), *found.problems))


def check_or_raise(engine: Engine, path: str | os.PathLike[str]) -> None:
    """Raises `VerificationError` where the engine does not give the answers that are stored in its file."""
    found = check_file(engine, path)
    if not found.passed:
        scheme = engine.metadata.get("quantize", {}).get("scheme")
        remedy = "export it with quantize='int8'" if scheme == "int8-full-range" else "use another runtime or provider"
        raise VerificationError(f"{path} answers otherwise here than where it was exported; {remedy}. {found}")


def check(engine: Engine, samples: Samples, *, strict: bool = False) -> Verification:
    """Compare an engine's answers with stored ones.

    Every exit is asked for, by one sample a call and by all in one; then samples leave by the file's own thresholds
    and by thresholds that part them. Outputs of a float network may be off by about a thousandth of the largest of
    their class (see `tolerances`). Two engines round values of an int8 network to neighbouring steps, so its outputs
    may be off in the mean by twice what int8 is off from float; sums that saturate are off by five times as much and
    more. A label may be another one where the stored outputs of both lie that near.

    Args:
        engine: of the file that holds the samples.
        samples: from `read_samples`.
        strict: ask of every single output of an int8 network what is else asked of their mean.
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
                seen.problems.append(f"samples leave at exits {answer.exit} where exit {n} is asked for")
            else:
                seen.output(n, answer.output, part)
    for thresholds in (None, _middle(policy, samples)) if movable else (None,):
        answers = [engine(*_rows(samples, part), thresholds=thresholds) for part in (parts[-1:] if dynamic else alone)]
        answer = Prediction(*(np.concatenate(a) for a in zip(*answers, strict=True)))
        seen.answer(answer)
        if engine.policy:
            seen.exits(answer, thresholds or policy.thresholds)
    difference, allowed = seen.differences(strict)
    return Verification(
        _where(engine),
        len(samples),
        seen.same_labels,
        seen.same_exits,
        difference,
        allowed,
        tuple(dict.fromkeys(seen.problems)),
    )


def _rows(samples: Samples, part: slice) -> list[NDArray[Any]]:
    return [i[part] for i in samples.inputs]


def _middle(policy: Policy, samples: Samples) -> tuple[float | None, ...]:
    """Thresholds that part the samples, where the file's own may not."""
    return tuple(
        None if t is None else float(np.median(s)) if np.isfinite(s).all() else t
        for t, s in zip(policy.thresholds, samples.scores, strict=False)
    )


class _Comparison:
    """What an engine answered beside what is stored."""

    def __init__(self, samples: Samples, *, coarse: bool = False) -> None:
        self.samples = samples
        self.tolerances = [tolerances(o, coarse=coarse) if o.ndim > 1 else o for o in samples.outputs]
        self.off: dict[int, list[tuple[NDArray[Any], NDArray[Any]]]] = {}
        self.same_labels = self.same_exits = len(samples)
        self.problems: list[str] = []

    def output(self, n: int, got: NDArray[Any], rows: slice | NDArray[Any]) -> None:
        """Outputs of exit n for some of the samples."""
        want = self.samples.outputs[n - 1][rows]
        allowed = self.tolerances[n - 1][rows]
        off = differences(got, want) if got.shape == want.shape else np.full(want.shape, np.inf)
        self.off.setdefault(n, []).append((off.ravel(), allowed.ravel()))

    def answer(self, answer: Prediction) -> None:
        """An answer for all samples, each from the exit where it left."""
        largest = np.take_along_axis(answer.output, answer.label[:, None], axis=1)[:, 0]
        if not np.array_equal(largest, answer.output.max(axis=1), equal_nan=True):
            self.problems.append("a label is not the largest of its outputs")
        rows = list(enumerate(answer.exit - 1))
        wanted = np.array([self.samples.outputs[n][s].argmax(axis=0) for s, n in rows])
        self.same_labels = min(self.same_labels, _same(wanted, answer.label))
        if wrong := sum(self._beyond_a_tie(n, s, answer.label[s], wanted[s]) for s, n in rows):
            self.problems.append(f"{wrong} of {len(rows)} samples get another label, beyond a tie")
        for n in np.unique(answer.exit).tolist():
            self.output(n, answer.output[answer.exit == n], answer.exit == n)

    def _beyond_a_tie(self, n: int, s: int, got: NDArray[Any], wanted: NDArray[Any]) -> bool:
        """Whether the stored outputs of two labels lie further apart than rounding explains, at exit n + 1."""
        if got.shape != wanted.shape or ((got < 0) | (got >= len(self.samples.outputs[n][s]))).any():
            return True
        (low, high), (a, b) = (
            [np.take_along_axis(of[n][s], label[None], axis=0) for label in (got, wanted)]
            for of in (self.samples.outputs, self.tolerances)
        )
        with np.errstate(invalid="ignore"):  # infinity less infinity
            return bool((high.astype(np.float64) - low > a + b + 2 * _TAIL * self.samples.slack[n]).any())

    def exits(self, answer: Prediction, thresholds: Sequence[float | None]) -> None:
        """Where the samples left, and with what score."""
        paths = [self._exits(s, thresholds) for s in range(len(self.samples))]
        left = answer.exit.tolist()
        self.same_exits = min(self.same_exits, sum(n == path[-1] for n, path in zip(left, paths, strict=True)))
        wrong = sum(n not in path for n, path in zip(left, paths, strict=True))
        if wrong:
            told = f"{wrong} of {len(paths)} samples leave at another exit"
            self.problems.append(f"{told}, at thresholds {thresholds_text(thresholds)}")
        for s, n in enumerate(left):
            score, slack = self.samples.scores[n - 1][s], self.samples.score_slack[n - 1]
            off = difference(answer.score[s], score)
            if not off <= FLOAT * max(1.0, abs(score)) + _TAIL * slack:
                self.problems.append(f"scores differ by {off:.3g} at exit {n}")

    def _exits(self, sample: int, thresholds: Sequence[float | None]) -> list[int]:
        """Where a sample may leave: at ties, and, last in the list, where its stored scores say."""
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
        """By exit, how far outputs are off and may be; puts what is too far before the other `problems`."""
        difference, allowed, far = {}, {}, []
        for n, off in sorted(self.off.items()):
            slack = self.samples.slack[n - 1]
            every, most = (np.concatenate(parts) for parts in zip(*off, strict=True))
            if slack and not strict:
                difference[n], allowed[n] = float(every.mean()), max(float(np.median(most)), 2 * slack)
            else:
                most = np.maximum(most, slack)
                worst = int((every / most).argmax())
                difference[n], allowed[n] = float(every[worst]), float(most[worst])
            if not difference[n] <= allowed[n]:
                far.append(f"outputs differ by {difference[n]:.3g} at exit {n} (allowed {allowed[n]:.3g})")
        self.problems[:0] = far
        return difference, allowed


def _same(a: NDArray[Any], b: NDArray[Any]) -> int:
    """In how many rows the arrays are equal throughout."""
    return int((a == b).reshape(len(a), -1).all(axis=1).sum())


def _where(engine: Engine) -> str:
    package = importlib.import_module(engine.runtime.split("-")[0])
    return f"{engine.runtime} {package.__version__.split('-')[0]} on {processor()}"
