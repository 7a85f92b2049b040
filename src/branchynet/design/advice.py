"""Advice: the result of a search for exits, with predicted times."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ..errors import InputError, counted
from ..files import read_json, write_json
from ..nn.network import BranchyNet
from ..policy.exit_cost import ExitCost
from ..profiling.target import Target, TargetRuntime
from ..stored_values import from_stored

WORTH = 1.05  # lower bound of the speed-up from which exits are worth it


@dataclass(frozen=True)
class CandidateResult:
    """The result of one candidate as the only early exit.

    Attributes:
        tap, branch: the submodule and the name of the branch.
        depth: share of the trunk's multiply-accumulates before the tap.
        accuracy: accuracy of this exit alone on the validation samples.
        us: microseconds per sample up to this exit's output.
        added_us: microseconds that it adds to a sample that does not leave there.
        break_even: the share of samples that must leave there for it to save time; None if it never can.
    """

    tap: str
    branch: str
    depth: float
    accuracy: float
    us: float
    added_us: float
    break_even: float | None


@dataclass(frozen=True)
class Design:
    """A set of early exits with thresholds, and its results on validation samples.

    Values per exit end with the trunk's exit.

    Attributes:
        taps, branches: submodule and branch per early exit.
        thresholds: threshold per early exit, chosen with branches trained on the frozen trunk.
        us: predicted mean microseconds per sample.
        interval_us: 95% interval of `us` for other samples and another measurement.
        accuracy: accuracy on the samples used to choose the design, which is optimistic.
        exit_share: share of samples that leave at each exit.
        trunk_us, branch_us: microseconds per sample of trunk segments and of branches, as in `ExitCost`.
        break_even: for each early exit, the share of all samples that must leave there for it to save time in this
            design.
        oracle_us: a lower bound on `us` with these exits at the accuracy limit: the time of a rule that knows which
            predictions are right.
    """

    taps: tuple[str, ...]
    branches: tuple[str, ...]
    thresholds: tuple[float, ...]
    us: float
    interval_us: tuple[float, float]
    accuracy: float
    exit_share: tuple[float, ...]
    trunk_us: tuple[float, ...]
    branch_us: tuple[float, ...]
    break_even: tuple[float, ...]
    oracle_us: float


@dataclass(frozen=True)
class Advice:
    """The best exits for a trained network, with predicted times. Made by `advise`.

    Attributes:
        batch_size, threads, score, runtime: the target and the score of the designs.
        plain_us: microseconds per sample of the network without exits.
        accuracy: accuracy of the network without exits on the samples used to choose the design.
        min_accuracy: the accuracy limit that every design meets on those samples.
        samples: number of those samples.
        designs: the best design per number of exits; the first has only the trunk's exit.
        tried: the result of every candidate alone.
        best: index of the fastest design; among equally fast ones, the one with the fewest exits.
        fingerprint: fingerprint of the network.
        selected_on: the sketch (see `branchynet.policy.sample_digests`) of the validation samples used to choose the
            design; empty if the samples have no digests.
        device: the processor or GPU on which the parts were timed.
        network: the best design, with branches trained on the frozen network; `save` leaves it out.

    Example:
        >>> from branchynet import Advice
        >>> from branchynet.design.advice import Design
        >>> plain = Design((), (), (), 90.0, (85.0, 95.0), 0.9, (1.0,), (90.0,), (0.0,), (), 90.0)
        >>> print(Advice(1, 1, "entropy", 90.0, 0.9, 0.9, 500, (plain,), (), best=0, fingerprint=""))
        Do not bother: no early exit helps at batch 1, 1 thread at 90.00% accuracy. ...
    """

    batch_size: int
    threads: int
    score: str
    plain_us: float
    accuracy: float
    min_accuracy: float
    samples: int
    designs: tuple[Design, ...]
    tried: tuple[CandidateResult, ...]
    best: int
    fingerprint: str
    selected_on: str = field(default="", repr=False)
    runtime: TargetRuntime = "onnxruntime"
    device: str = ""
    network: BranchyNet | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.best < len(self.designs):
            raise InputError(f"best must be the index of one of the {len(self.designs)} designs; got {self.best}")

    @property
    def design(self) -> Design:
        """The fastest design."""
        return self.designs[self.best]

    @property
    def target(self) -> Target:
        """The target of the designs."""
        return Target(self.batch_size, self.threads, self.runtime)

    @property
    def cost(self) -> ExitCost:
        """The predicted costs of the best design."""
        return ExitCost(
            self.design.trunk_us,
            self.design.branch_us,
            batch_size=self.batch_size,
            threads=self.threads,
            runtime=self.runtime,
            device=self.device or None,
        )

    @property
    def speedup(self) -> float:
        """The predicted speed-up of the best design over the network without exits."""
        return self.plain_us / self.design.us

    @property
    def speedup_interval(self) -> tuple[float, float]:
        """The 95% interval of `speedup`."""
        low, high = self.design.interval_us
        return self.plain_us / high, self.plain_us / low

    @property
    def worth(self) -> bool:
        """Whether the lower bound of the best design's speed-up is large enough to matter."""
        return bool(self.design.taps) and self.speedup_interval[0] >= WORTH

    def __str__(self) -> str:
        """Return the advice in words."""
        each = f"at batch {self.batch_size}, {counted(self.threads, 'thread')}"
        each += f" in {self.runtime}" * (self.runtime != "onnxruntime")
        each += f" on {self.device}" * self.runtime.endswith("cuda")
        if not self.design.taps:
            return f"Do not bother: no early exit helps {each} at {self.min_accuracy:.2%} accuracy. {self._least()}"
        low, high = self.speedup_interval
        exits = ", then ".join(
            f"{branch} at {tap!r}" for branch, tap in zip(self.design.branches, self.design.taps, strict=True)
        )
        text = (
            f"{exits}: {self.speedup:.2f}x ({low:.2f}x to {high:.2f}x) faster {each}, "
            f"{self.design.us:.1f} us per sample instead of {self.plain_us:.1f}, at {self.design.accuracy:.2%} "
            f"accuracy on validation (without exits {self.accuracy:.2%}); {_shares(self.design.exit_share)} leave at "
            f"exits 1 to {len(self.design.exit_share)}. No score could make these exits more than "
            f"{self.plain_us / self.design.oracle_us:.2f}x faster."
        )
        return text if self.worth else f"Do not bother: the best design is {text}"

    def _least(self) -> str:
        pays = [(t.break_even, t) for t in self.tried if t.break_even is not None]
        if not pays:
            if not self.tried:
                return "There is no candidate."
            first = min(self.tried, key=lambda one: one.us)
            return (
                "No candidate would save time, even if all samples left there: the network takes "
                f"{self.plain_us:.1f} us per sample, and the fastest candidate, {first.branch} at {first.tap!r}, takes "
                f"{first.us:.1f} us."
            )
        share, first = min(pays, key=lambda pair: pair[0])
        return f"{first.branch} at {first.tap!r} would save time if {share:.0%} of the samples left there."

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON. Raise `FileError`."""
        write_json(path, {k: v for k, v in asdict(replace(self, network=None)).items() if k != "network"})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Advice":
        """Read a file that `save` wrote. Raise `FileError`."""
        stored = read_json(path)
        remedy = f"advise(...), after removing {Path(path).parent} if it is a run's design"
        return from_stored(cls, stored, path, remedy)


def _shares(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:.1%}" for share in shares)
