"""The errors that a server answers with, and the status of each.

BranchyNetError
├── InputError        400
├── DataError         400
├── KeyMissing        401
├── UnknownModel      404
├── SlowClient        408
├── TooLarge          413
├── WrongEncoding     415
├── DeadlineError     422
│   └── TooSlow       504
├── QueueFull         429, with Retry-After
├── RunError          500
├── NotReady          503
└── StoppedError      503

A deadline that a request sets is part of the request, so the status is a client error. It is not 408, because 408 asks
clients to repeat the request on a new connection, and browsers and others do so at once.
"""

import math

from ..errors import BranchyNetError, DataError, InputError


class KeyMissing(BranchyNetError, PermissionError):
    """The request has no API key, or a wrong one."""


class UnknownModel(BranchyNetError, LookupError):
    """There is no model of this name and version."""


class SlowClient(BranchyNetError, TimeoutError):
    """The body of a request did not arrive in time."""


class TooLarge(BranchyNetError, ValueError):
    """A body has more bytes than the server takes."""


class WrongEncoding(BranchyNetError, ValueError):
    """A body is compressed, or of a type that the server does not read."""


class QueueFull(BranchyNetError, RuntimeError):
    """The queue has no room for a request.

    Attributes:
        retry_after: seconds until the queue is probably empty.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type["QueueFull"], tuple[str, float]]:
        return QueueFull, (str(self), self.retry_after)  # it travels between the processes of a cluster


class RunError(BranchyNetError, RuntimeError):
    """The runtime failed on a request."""


class NotReady(BranchyNetError, RuntimeError):
    """The model is not loaded; the message says why."""


class StoppedError(BranchyNetError, RuntimeError):
    """The model is being unloaded, or the server stops."""


class DeadlineError(BranchyNetError, TimeoutError):
    """The deadline of a request passed before every sample had an answer."""


class TooSlow(DeadlineError):
    """The deadline that passed was that of the server, because the request gave none or a later one."""


def too_late(seconds: float, missing: int, rows: int) -> DeadlineError:
    """Return the error of a request of `rows` samples, `missing` of which have no answer after `seconds`."""
    return DeadlineError(
        f"the deadline passed after {1e3 * seconds:.0f} ms, and {missing} of {rows} samples had reached no exit; allow "
        "more time, or send fewer requests"
    )


_STATUS: dict[type[BranchyNetError], int] = {
    InputError: 400,
    DataError: 400,
    KeyMissing: 401,
    UnknownModel: 404,
    SlowClient: 408,
    TooLarge: 413,
    WrongEncoding: 415,
    TooSlow: 504,
    DeadlineError: 422,
    QueueFull: 429,
    NotReady: 503,
    StoppedError: 503,
}


def status_of(error: BranchyNetError) -> int:
    """Return the HTTP status of an error; 500 for those that no request causes."""
    return next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)


def headers_of(error: BranchyNetError) -> dict[str, str]:
    """Return the headers of an error: ``Retry-After`` in whole seconds if the queue is full."""
    return {"retry-after": str(max(1, math.ceil(error.retry_after)))} if isinstance(error, QueueFull) else {}
