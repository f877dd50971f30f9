"""uvicorn's HTTP protocol with bounds on a request's head, which it does not have: bytes, headers, seconds."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.service import Limits


def bounded_protocol(limits: Limits) -> type[HttpToolsProtocol]:
    """uvicorn makes one protocol object a connection, from a class alone: the bounds are the class's."""
    return type("BoundedHttpProtocol", (_Bounded,), {"limits": limits})


class _Bounded(HttpToolsProtocol):
    """Answers 400 and closes when a head is too large, and closes when it takes too long: from connecting, or from the
    head's first byte on a connection in use, to its last. Whoever sends a byte now and then would otherwise hold a connection
    for ever."""

    limits = Limits()
    _in_head = True
    _head_bytes = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        self._watch()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._unwatch()
        if len(self.headers) > self.limits.max_headers:
            raise ValueError("too many headers")  # the parser turns it into its own error, and that into a 400
        # A head that came in one piece was never counted: one read takes up to 256 KiB.
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > self.limits.max_head_bytes:
            raise ValueError("too large a head")
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > self.limits.max_head_bytes:
                self.send_400_response(f"The request's head has more than {self.limits.max_head_bytes} bytes.")

    def _watch(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.limits.head_timeout_s, self._give_up)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.close()
