"""uvicorn's HTTP protocol with bounds on a request's head, which it does not have: bytes, headers, seconds."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 256
HEAD_S = 30.0
"""From connecting, or from the head's first byte on a connection in use, to its last. Whoever sends a byte now and then
would otherwise hold a connection for ever."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """Answers 400 and closes when a head is too large, and closes when it takes too long."""

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
        if len(self.headers) > MAX_HEADERS:
            raise ValueError("too many headers")  # the parser turns it into its own error, and that into a 400
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response(f"The request's head has more than {MAX_HEAD_BYTES} bytes.")

    def _watch(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(HEAD_S, self._give_up)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.close()
