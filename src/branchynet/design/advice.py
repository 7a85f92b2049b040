"""What a search over designs found: the design, what it will take, and whether it is worth the trouble."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ..deploy.loading import Runtime
from ..errors import InputError, counted
from ..files import read_json, write_json
from ..nn.network import BranchyNet
from ..policy.values import ExitCost
from ..profiling.target import Target
from ..stored import from_stored

WORTH = 1.05  # times faster, for sure, below which exits are not worth their trouble


@dataclass(frozen=True)
class CandidateResult:
    """One candidate by itself.

    Attributes:
        tap, branch: where and what; `depth` is the share of the trunk's multiply-accumulates before the tap.
        accuracy: of this exit alone, on validation.
        us: microseconds a sample until it has answered.
        added_us: what it adds to a sample that does not leave there.
        break_even: the share of samples that must leave there for it to pay for itself as the only early exit; None
            where it never can.
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
    """A set of early exits with thresholds, and what it does on validation; an entry an exit, the trunk's own last.

    Attributes:
        taps, branches: of the early exits.
        thresholds: of the early exits, chosen with branches trained on the frozen trunk.
        us: mean microseconds a sample, predicted before the design was ever built.
        interval_us: 95 % of what these should be for other samples and another run of the clock.
        accuracy: on the samples that chose the design, which flatters.
        exit_share: who leaves where.
        trunk_us, branch_us: microseconds a sample of trunk segments and of branches, as in `ExitCost`.
        break_even: for each early exit, the share of all samples that must leave there for it to save time in this
            design.
        oracle_us: the least that any rule of leaving could take with these exits at the limit, if it knew which answers
            are right: no score and no thresholds can do better.
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
    """Where exits should go on a trained network, and what they will bring.

    Attributes:
        batch_size, threads, score, runtime: what the design is for.
        plain_us: microseconds a sample of the network without exits.
        accuracy: of the network without exits, on the samples that chose the design.
        min_accuracy: the limit that every design keeps, on the samples that chose it.
        samples: how many those were.
        designs: the best of each number of exits; the first has none but the trunk's own.
        tried: every candidate by itself.
        best: which of the designs takes least; of those that take as long, the one with fewest exits.
        fingerprint: of the network advised on.
        selected_on: the sketch (see `branchynet.policy.digests`) of the validation samples that chose the design, half
            of them; empty where the inputs' tensors could not be told apart.
        network: the best design, its branches trained on the frozen network; not kept on disk.
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
    selected_on: str = ""
    runtime: Runtime = "onnxruntime"
    network: BranchyNet | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.best < len(self.designs):
            raise InputError(f"an Advice names one of its {len(self.designs)} designs as the best; got {self.best}")

    @property
    def design(self) -> Design:
        """The design that takes least."""
        return self.designs[self.best]

    @property
    def target(self) -> Target:
        """What the design is for."""
        return Target(self.batch_size, self.threads, self.runtime)

    @property
    def cost(self) -> ExitCost:
        """What the best design's stages cost, by the predicted times."""
        return ExitCost(self.design.trunk_us, self.design.branch_us, batch_size=self.batch_size, threads=self.threads)

    @property
    def speedup(self) -> float:
        """Of the best design beside the network without exits, predicted."""
        return self.plain_us / self.design.us

    @property
    def speedup_interval(self) -> tuple[float, float]:
        """95 % of what that should be."""
        low, high = self.design.interval_us
        return self.plain_us / high, self.plain_us / low

    @property
    def worth(self) -> bool:
        """Whether the best design is faster for sure by enough to matter."""
        return bool(self.design.taps) and self.speedup_interval[0] >= WORTH

    def __str__(self) -> str:
        """The advice in words."""
        each = f"at batch {self.batch_size}, {counted(self.threads, 'thread')}"
        each += f" in {self.runtime}" * (self.runtime != "onnxruntime")
        if not self.design.taps:
            return f"Do not bother: no early exit helps {each} at {self.min_accuracy:.2%} accuracy. {self._least()}"
        low, high = self.speedup_interval
        exits = ", then ".join(
            f"{branch} at {tap!r}" for branch, tap in zip(self.design.branches, self.design.taps, strict=True)
        )
        told = (
            f"{exits}: {self.speedup:.2f}x ({low:.2f}x to {high:.2f}x) faster {each}, "
            f"{self.design.us:.1f} us a sample instead of {self.plain_us:.1f}, at {self.design.accuracy:.2%} accuracy "
            f"on validation (without exits {self.accuracy:.2%}); {_shares(self.design.exit_share)} leave at exits 1 to "
            f"{len(self.design.exit_share)}. No score could make these exits more than "
            f"{self.plain_us / self.design.oracle_us:.2f}x faster."
        )
        return told if self.worth else f"Do not bother: the best that was found is {told}"

    def _least(self) -> str:
        pays = [(t.break_even, t) for t in self.tried if t.break_even is not None]
        if not pays:
            return "None of those tried could pay for itself, even if all samples left there."
        share, first = min(pays, key=lambda pair: pair[0])
        return f"{first.branch} at {first.tap!r} would pay for itself if {share:.0%} of the samples left there."

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON. Raises `FileError`."""
        write_json(path, {k: v for k, v in asdict(replace(self, network=None)).items() if k != "network"})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Advice":
        """Read what `save` wrote. Raises `FileError`."""
        again = f"advise(...), after removing {Path(path).parent} if it is a run's design"
        return from_stored(cls, read_json(path), path, again)


def _shares(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:.1%}" for share in shares)
