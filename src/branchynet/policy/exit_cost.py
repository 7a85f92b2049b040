"""The measured cost of every stage of a network, from which thresholds are chosen.

Shape letters: N exits. Position n - 1 of a tuple or axis belongs to exit n.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ..argument_checks import ordered, real
from ..errors import InputError
from ..files import read_sealed, write_sealed
from ..stored_values import from_stored
from .values import Floats, set_fields


@dataclass(frozen=True)
class ExitCost:
    """The cost per sample of each trunk segment and each branch.

    Trunk and branches are separate, so removing an exit removes its cost. Every tuple has one number per exit. The
    "branch" of the last exit is the work that the backbone does not have: its score, and deciding to continue.

    Attributes:
        trunk_us, branch_us: microseconds per sample, measured in the deployment engine.
        trunk_macs, branch_macs: multiply-accumulates per sample.
        batch_size, threads: of the timed calls.
        network: the `fingerprint` of the measured network; None if unknown.
        plain_us: microseconds per sample of the backbone alone, timed with the others; None if unknown.
        spread: relative 95% uncertainty of the times, from their variation during the measurement; None if unknown.
        runtime, device: what ran the calls, and on which processor or GPU; None if unknown.

    Raises:
        InputError: tuples of different lengths, or a number that is negative or not finite.

    Example:
        >>> cost = ExitCost(trunk_us=(10.0, 30.0), branch_us=(5.0, 0.0))
        >>> cost.latency_us([True, True])  # leaving at exit 1, at exit 2
        array([15., 45.])
    """

    trunk_us: tuple[float, ...]
    branch_us: tuple[float, ...]
    trunk_macs: tuple[float, ...] = ()
    branch_macs: tuple[float, ...] = ()
    batch_size: int = 1
    threads: int = 1
    network: str | None = None
    plain_us: float | None = None
    spread: float | None = None
    runtime: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("trunk_us", "branch_us", "trunk_macs", "branch_macs"):
            given = ordered(f"ExitCost.{name}", getattr(self, name), "give one number per exit, such as (12.5, 40.0)")
            values = tuple(real(f"an entry of ExitCost.{name}", v) for v in given)
            if name.endswith("_macs") and not values:
                values = (0.0,) * len(self.trunk_us)
            if len(values) != len(self.trunk_us) or not values:
                raise InputError(f"ExitCost.{name} has {len(values)} numbers but trunk_us has {len(self.trunk_us)}")
            if min(values) < 0:
                raise InputError(f"ExitCost.{name} must not be negative; got {values}")
            set_fields(self, **{name: values})

    @property
    def num_exits(self) -> int:
        """N, the number of exits."""
        return len(self.trunk_us)

    def latency_us(self, enabled: Sequence[bool]) -> Floats:
        """Return the microseconds `(N,)` to leave at each exit, with the branches that `enabled` `(N,)` marks.

        Without an early exit, this is the trunk alone, as in the plain network: the last exit needs no score.
        """
        return _cumulative(self.trunk_us, self.branch_us, enabled)

    def macs(self, enabled: Sequence[bool]) -> Floats:
        """Return the multiply-accumulates `(N,)` to leave at each exit, with the branches that `enabled` marks."""
        return _cumulative(self.trunk_macs, self.branch_macs, enabled)

    def __str__(self) -> str:
        """One line per exit, and one about the calls."""
        times = enumerate(zip(self.trunk_us, self.branch_us, strict=True), 1)
        lines = [f"exit {n}: trunk {trunk:.1f} us, branch {branch:.1f} us" for n, (trunk, branch) in times]
        spread = "" if self.spread is None else f", within {self.spread:.0%}"
        return "\n".join([*lines, f"per sample, {self.where}{spread}"])

    @property
    def where(self) -> str:
        """The calls that were timed, in words."""
        runtime = "" if self.runtime is None else f", {self.runtime}"
        device = "" if self.device is None else f" on {self.device}"
        return f"batch {self.batch_size}, threads {self.threads}{runtime}{device}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file with a checksum. Raises `FileError`."""
        write_sealed(path, "cost", asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ExitCost":
        """Read a file that `save` wrote. Raises `FileError`."""
        return from_stored(cls, read_sealed(path, "cost", "measure it again with measure(...)"), path, "measure(...)")


def _cumulative(trunk: Sequence[float], branch: Sequence[float], enabled: Sequence[bool]) -> Floats:
    if len(enabled) != len(trunk):
        raise InputError(f"enabled has {len(enabled)} flags for {len(trunk)} exits")
    counted = [*enabled[:-1], any(enabled[:-1])]
    return np.cumsum(trunk) + np.cumsum(np.where(counted, branch, 0.0))
