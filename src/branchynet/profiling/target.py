"""How a deployed network runs: the batch size, the threads and the runtime."""

from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

from ..argument_checks import instance, whole
from ..deploy.loading import RUNTIMES, check_threads
from ..errors import InputError

TargetRuntime = Literal["onnxruntime", "openvino", "onnxruntime-cuda", "torch", "torch-cuda"]
TARGET_RUNTIMES = get_args(TargetRuntime)


@dataclass(frozen=True)
class Target:
    """How a deployed network runs, which determines the costs of its stages.

    Attributes:
        batch_size: samples per call.
        threads: threads within an operator; on a GPU, of what runs on the host.
        runtime: a runtime of files, as for `load`; or ``"torch"`` or ``"torch-cuda"``, the `TorchEngine` on the CPU or
            on an NVIDIA GPU.

    Raises:
        InputError: a batch size or number of threads below 1, or an unknown runtime.

    Example:
        >>> from branchynet import Target
        >>> Target(batch_size=64, threads=2)
        Target(batch_size=64, threads=2, runtime='onnxruntime')
    """

    batch_size: int = 1
    threads: int = 1
    runtime: TargetRuntime = "onnxruntime"

    def __post_init__(self) -> None:
        whole("batch_size", self.batch_size, 1)
        instance("threads", self.threads, Integral, "give the number of threads within an operator")
        check_threads(self.threads)
        if self.runtime not in TARGET_RUNTIMES:
            raise InputError(f"unknown runtime {self.runtime!r}; it is one of {', '.join(TARGET_RUNTIMES)}")

    @property
    def reads_files(self) -> bool:
        """Whether the runtime runs files that `export` wrote."""
        return self.runtime in RUNTIMES


def check_target(target: Any) -> Target:
    """Return `target`. Raise `InputError` if it is not a `Target`."""
    instance("target", target, Target, "give Target(batch_size=1, threads=1, runtime='onnxruntime')")
    return target
