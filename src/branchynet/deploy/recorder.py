"""Record operations on fixed memory once and replay them: a CUDA graph on a GPU, a plain call elsewhere."""

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch

Replay = Callable[[], object]

_WARM_UP = 3  # runs before a capture: libraries allocate workspaces and select algorithms in their first calls
_capturing = threading.Lock()  # a process captures one graph at a time


class Recorder:
    """The stream of one engine, on which it copies, records and replays. On other devices than CUDA, it calls.

    Args:
        device: where the recorded operations run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = torch.cuda.graph_pool_handle() if self._stream else None

    @property
    def pins(self) -> bool:
        """Whether memory of the host must be pinned, so that copies do not wait."""
        return self._stream is not None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run the block on the stream, after everything that the caller has started on the device."""
        with torch.inference_mode(False), torch.no_grad():
            if self._stream is None:
                yield
                return
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                yield

    def wait(self) -> None:
        """Wait until everything on the stream is done."""
        if self._stream is not None:
            self._stream.synchronize()

    def record(self, step: Callable[[], object]) -> Replay:
        """Return a function that repeats `step`, which has already run once.

        All graphs of a recorder share one memory pool, so a step may not read the temporary memory of another step.
        """
        if self._stream is None:
            return step
        for _ in range(_WARM_UP - 1):
            step()
        graph, failure = torch.cuda.CUDAGraph(), None
        try:  # other threads may use the device meanwhile
            with _capturing, torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                try:
                    step()
                except Exception as error:
                    failure = error
                    raise
        except Exception as error:
            raise failure or error from None  # the end of a broken capture hides what broke it
        finally:
            failure = None  # its traceback holds this frame, and so the memory of the step
        return graph.replay
