"""uvicorn's HTTP protocol with bounds on every part of a message, which it does not have, and with HTTP/1.0."""

from __future__ import annotations

import asyncio
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from serving.service import Limits

READ_BYTES = 16 * 1024
"""What is handed to the parser at once: the bounds are looked at in between, so nothing outgrows them by more than this."""


def bounded_protocol(limits: Limits) -> type[HttpToolsProtocol]:
    """uvicorn makes one protocol object a connection, from a class alone: the bounds are the class's."""
    return type("BoundedHttpProtocol", (_Bounded,), {"limits": limits})


class _Bounded(HttpToolsProtocol):
    """Answers 400 and closes when a part of a message is too large, and closes when one takes too long.

    A message's parts, and what bounds them:
    - its head: bytes, lines, and seconds from connecting or from its first byte;
    - lines between the pieces of a body (lengths, extensions): bytes each. Nothing of them is kept;
    - trailers: bytes and lines, as a head. They are dropped;
    - its body: bytes and seconds, by `BodyLimit` in middleware.py; seconds of the whole here, as a handler that reads no body
      would never look;
    - further messages in the same connection while the first is answered: a number.
    An offer to go on in another protocol is not taken up, and the message is answered as if it were not there (RFC 9110,
    7.8): the JDK's client offers HTTP/2 with every request.
    """

    limits = Limits()
    _in_head = True
    _head_bytes = 0
    _line_bytes = 0
    _num_trailers = 0
    _trailer_bytes = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch(self.limits.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes, self._line_bytes = True, 0, 0
        self._num_trailers = self._trailer_bytes = 0
        self._unwatch()
        self._watch(self.limits.head_timeout_s)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._line_bytes = 0
        if self._in_head:
            if len(self.headers) >= self.limits.max_headers:
                raise ValueError("too many headers")  # the parser turns it into its own error, and that into a 400
            super().on_header(name, value)
            return
        self._num_trailers += 1
        self._trailer_bytes += len(name) + len(value) + 4
        if self._num_trailers > self.limits.max_headers or self._trailer_bytes > self.limits.max_head_bytes:
            raise ValueError("too many trailers")

    def on_headers_complete(self) -> None:
        self._in_head, self._line_bytes = False, 0
        self._unwatch()
        self._watch(self.limits.body_timeout_s)
        # A head that came in one piece was never counted: one read takes up to 256 KiB.
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > self.limits.max_head_bytes:
            raise ValueError("too large a head")
        if len(self.pipeline) >= self.limits.max_pipelined:
            raise ValueError("too many requests ahead of their replies")
        if self.parser.should_upgrade():
            return  # `_decline` comes next
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0" and type(self.cycle) is RequestResponseCycle:
            self.cycle.__class__ = _UntilClosed

    def on_chunk_header(self) -> None:
        self._line_bytes = 0

    def on_body(self, body: bytes) -> None:
        self._line_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._unwatch()
        super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), READ_BYTES):
            if self.transport.is_closing():
                return
            piece = data[start : start + READ_BYTES]
            self._line_bytes += len(piece)
            self._feed(piece)
            if self.transport.is_closing():
                return
            if self._in_head:
                self._head_bytes += len(piece)
                if self._head_bytes > self.limits.max_head_bytes:
                    self.send_400_response(f"The request's head has more than {self.limits.max_head_bytes} bytes.")
            elif self._line_bytes > self.limits.max_head_bytes:
                self.send_400_response(f"A line of the request has more than {self.limits.max_head_bytes} bytes.")

    def _feed(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade as offer:
            self._decline(data[offer.args[0] :])
        except HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def _decline(self, rest: bytes) -> None:
        """Begins a message anew whose head offered another protocol, without the offer: the parser stops behind such a head.

        Args:
            rest: what came behind the head.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.send_400_response("This server is no proxy: it takes no CONNECT.")
            return
        lines = [method + b" " + self.url + b" HTTP/1.1", *(k + b": " + v for k, v in self.headers if k != b"upgrade")]
        self.parser = HttpRequestParser(self)
        self._feed(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def _watch(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._give_up)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.close()


class _UntilClosed(RequestResponseCycle):
    """Answers HTTP/1.0, which knows no chunks: a body of unknown length ends with the connection."""

    _unknown = False

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", ())}
            if not names & {b"content-length", b"transfer-encoding"}:
                self._unknown, self.chunked_encoding, self.keep_alive = True, False, False
        elif self._unknown:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)
