"""Limits on clients: the size and speed of what they send, and the API key."""

import asyncio
import hmac
import time
from collections.abc import Mapping
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .faults import KeyMissing, SlowClient, TooLarge, WrongEncoding

_GRACE = 0.25  # seconds
_SLOWEST = 100_000  # bytes per second of a body, after the first `seconds`


class ClientGone(Exception):  # nobody reads its answer
    """The client closed the connection before its request was answered."""


async def read_body(receive: Any, headers: Mapping[str, str], most: int, seconds: float) -> bytes:
    """Read the body of a request as it arrives.

    Args:
        receive: the function of ASGI.
        headers: the headers of the request.
        most: the most bytes; a longer body is refused before it is read, or as soon as it is longer.
        seconds: how long it may take; a body that takes longer must arrive at 100 kB per second.

    Raises:
        TooLarge, SlowClient: the body is too long, or too slow.
        WrongEncoding: it is compressed.
        ClientGone: the connection was closed.
    """
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise WrongEncoding(
            f"the body has the Content-Encoding {headers['content-encoding']!r:.40}; send it without compression"
        )
    declared = headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > most:
        raise TooLarge(f"the body has {declared:.20} bytes; the server takes {most}: send fewer samples per request")
    message = None
    started, received, chunks = time.monotonic(), 0, []
    while message is None or message.get("more_body"):
        left = started + seconds + received / _SLOWEST - time.monotonic()
        try:
            async with asyncio.timeout(left):
                message = await receive()
        except TimeoutError:
            raise SlowClient(
                f"only {received} bytes of the body arrived in time ({seconds:g} s and 10 s per MB); send it faster"
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        received += len(chunk)
        if received > most:
            raise TooLarge(f"the body has more than {most} bytes; send fewer samples per request")
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def check_key(headers: Mapping[str, str], key: str | None) -> None:
    """Raise `KeyMissing` unless the request has the key, compared in constant time; None takes every request."""
    if key is None:
        return
    given = headers.get("authorization", "").removeprefix("Bearer ").strip() or headers.get("x-api-key", "")
    if not hmac.compare_digest(given.encode(), key.encode()):
        raise KeyMissing("the request has no valid API key; send it as 'Authorization: Bearer KEY'")


def guarded(seconds: float) -> type[HttpToolsProtocol]:
    """Return uvicorn's protocol with two additions for which uvicorn has no option.

    Uvicorn's keep-alive ends idle connections. In addition, a connection is closed if the headers of a request, or the
    rest of a body that was refused, take longer than `seconds`. When the server stops, a request that is already on its
    way over an idle connection is answered.
    """

    class Guarded(HttpToolsProtocol):
        _timer: asyncio.TimerHandle | None = None
        _complete = True
        _draining = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._start()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel()
            super().connection_lost(exc)

        def on_message_begin(self) -> None:
            self._complete = False
            if self._timer is None:
                self._start()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._cancel()
            super().on_headers_complete()
            if self._draining:
                self.cycle.keep_alive = False

        def on_message_complete(self) -> None:
            self._complete = True
            self._cancel()
            super().on_message_complete()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if not self._complete and self._timer is None:
                self._start()

        def shutdown(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self._draining = True
                self.loop.call_later(_GRACE, self._close_idle)
            else:
                super().shutdown()

        def _close_idle(self) -> None:
            if self._complete and (self.cycle is None or self.cycle.response_complete):
                self._close()

        def _start(self) -> None:
            self._timer = self.loop.call_later(seconds, self._close)

        def _cancel(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _close(self) -> None:
            self._timer = None
            if not self.transport.is_closing():
                self.transport.close()

    return Guarded


class watched:  # used as a function
    """Cancel the current task if the client closes the connection while the block runs.

    Watching costs a task, so it starts after a moment; most answers are faster than that.

    Raises:
        ClientGone: instead of the cancellation.
    """

    def __init__(self, receive: Any, after: float = 0.05) -> None:
        self._receive, self._after = receive, after
        self._watcher: asyncio.Task[None] | None = None
        self._gone = False

    async def __aenter__(self) -> None:
        loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._handle = loop.call_later(self._after, self._start)

    async def __aexit__(self, kind: Any, error: Any, _: Any) -> None:
        self._handle.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._gone and kind is asyncio.CancelledError:
            raise ClientGone from None

    def _start(self) -> None:
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        if self._task is not None:
            self._task.cancel()
