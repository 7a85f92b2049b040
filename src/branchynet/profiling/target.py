"""How a deployed file runs: the batch size, the threads and the runtime."""

from dataclasses import dataclass
from numbers import Integral
from typing import Any

from ..argument_checks import instance, whole
from ..deploy.loading import Runtime, check_runtime, check_threads


@dataclass(frozen=True)
class Target:
    """How a deployed file runs, which determines the costs of its stages.

    Attributes:
        batch_size: samples per call.
        threads: threads within an operator.
        runtime: the runtime, as for `load`.

    Raises:
        InputError: a batch size or number of threads below 1, or an unknown runtime.

    Example:
        >>> from branchynet import Target
        >>> Target(batch_size=64, threads=2)
        Target(batch_size=64, threads=2, runtime='onnxruntime')
    """

    batch_size: int = 1
    threads: int = 1
    runtime: Runtime = "onnxruntime"

    def __post_init__(self) -> None:
        whole("batch_size", self.batch_size, 1)
        instance("threads", self.threads, Integral, "give the number of threads within an operator")
        check_threads(self.threads)
        check_runtime(self.runtime)


def check_target(target: Any) -> Target:
    """Return `target`. Raise `InputError` if it is not a `Target`."""
    instance("target", target, Target, "give Target(batch_size=1, threads=1, runtime='onnxruntime')")
    return target
