"""Bounds on HTTP bodies: their size, as sent and inflated; their pace; and of all that are being read, together."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.service import Limits

LINGER_BYTES = 32 * 2**20
LINGER_S = 2.0
"""How much of a body that is too large is read and dropped: a client that is still sending when the connection closes
sees a reset instead of the reply."""

INFLATE_BYTES = 1 << 20
"""Of an inflated body, made at once; other requests come in between."""

SOUND = "/v1/audio/"
FORM_BYTES = 2**20
"""Of a form, beside its sound."""

_WINDOWS = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}


class BodyLimit:
    """Refuses bodies over `Limits.max_body_bytes` (of sound `max_sound_bytes`) with 413, by their declared length or as they come,
    inflates those that say gzip or deflate within the same bound (others: 415), gives up those of which nothing comes for
    `body_gap_s` seconds (408), and those for which there is no room beside the others (503): what sound is sent lies on disk as it
    comes, and has room of its own."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app = app
        self._limits = limits
        self._held = {False: 0, True: 0}  # of sound, which lies on disk, and of all else

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        sound = scope["path"].startswith(SOUND)
        most = self._limits.max_sound_bytes + FORM_BYTES if sound else self._limits.max_body_bytes
        body = _Body(self, scope, receive, self._limits, most, sound)
        try:
            await self.app(scope, body.receive, send)
        finally:
            body.release()

    def hold(self, num_bytes: int, sound: bool) -> None:
        """Counts bytes in (or out), or refuses them."""
        most = self._limits.max_sounds_bytes if sound else self._limits.max_bodies_bytes
        if num_bytes > 0 and self._held[sound] + num_bytes > most:
            raise HTTPException(
                503,
                "Too many large bodies are being read. Try again later.",
                headers={"Retry-After": "1", "Connection": "close"},
            )
        self._held[sound] += num_bytes


class _Body:
    """One request's body on its way in."""

    def __init__(
        self, owner: BodyLimit, scope: Scope, receive: Receive, limits: Limits, most: int, sound: bool
    ) -> None:
        self._owner, self._sound = owner, sound
        self._receive = receive
        self._limits, self._most = limits, most
        declared = next((v for k, v in scope["headers"] if k == b"content-length"), b"")
        self._too_large = declared.isdigit() and int(declared[:18]) > most
        codings = b",".join(v for k, v in scope["headers"] if k == b"content-encoding").lower().strip()
        self._coding = codings if codings not in (b"", b"identity") else None
        self._inflater: Any = zlib.decompressobj(_WINDOWS[codings]) if codings in _WINDOWS else None
        self._seen = self._sent = self._held = 0
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:
            self.release()  # read, and parsed by now: whoever asks again waits for the client to go
            return await self._receive()
        if self._coding is not None and self._inflater is None:
            await _discard(self._receive)
            self._complete = True
            name = self._coding[:64].decode("latin-1")
            raise HTTPException(
                415, f"The body's coding {name!r} is not taken: send it plain, or as gzip or deflate.",
                headers={"Accept-Encoding": "gzip, deflate", "Connection": "close"},
            )  # fmt: skip
        if self._too_large:
            await _discard(self._receive)
            raise self._refusal()
        try:
            async with asyncio.timeout(self._limits.body_gap_s):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "The body stopped coming.", headers={"Connection": "close"}) from None
        if message["type"] != "http.request":
            return message
        more = bool(message.get("more_body"))
        body = message.get("body", b"")
        self._sent += len(
            body
        )  # of a compressed body, too: blocks that hold nothing could follow each other without end
        if self._sent > self._most:
            if more:
                await _discard(self._receive)
            raise self._refusal()
        if self._inflater is not None:
            body = await self._inflate(body, last=not more)
            message = {**message, "body": body}
        self._complete = not more
        self._seen += len(body)
        if self._seen > self._most:
            if more:
                await _discard(self._receive)
            raise self._refusal()
        try:
            self._owner.hold(len(body), self._sound)
        except HTTPException:
            if more:  # or the client, which is still sending, sees a reset
                await _discard(self._receive)
            raise
        self._held += len(body)
        return message

    def release(self) -> None:
        """What was held is no longer, or belongs to a request that other bounds count."""
        self._owner.hold(-self._held, self._sound)
        self._held = 0

    async def _inflate(self, data: bytes, last: bool) -> bytes:
        pieces, total = [], self._seen
        try:
            while data and not self._inflater.eof and total <= self._most:
                piece = self._inflater.decompress(data, INFLATE_BYTES)
                data = self._inflater.unconsumed_tail
                pieces.append(piece)
                total += len(piece)
                await asyncio.sleep(0)
        except zlib.error:
            raise HTTPException(400, "The body is not what its Content-Encoding says.") from None
        if self._inflater.eof and (data or self._inflater.unused_data):
            # zlib would keep all of it; and what it is nobody says.
            raise HTTPException(400, "More follows behind the compressed body's end.", headers={"Connection": "close"})
        if last and total <= self._most and not self._inflater.eof and self._sent:
            raise HTTPException(400, "The compressed body is cut off.")
        return b"".join(pieces)

    def _refusal(self) -> HTTPException:
        # Not reading on means that the connection cannot be used again.
        return HTTPException(
            413, f"The body has more than {self._most} bytes. Send less.", headers={"Connection": "close"}
        )


async def _discard(receive: Receive) -> None:
    left = LINGER_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
