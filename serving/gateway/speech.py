"""Speech to text by the engines behind a gateway: the sound file goes to one of them as it came."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from serving.errors import ErrorKind, RequestError, invalid
from serving.service.speech.transcripts import Files, TranscribeInput, Transcript

if TYPE_CHECKING:
    from serving.gateway.pool import Pool
    from serving.service import TextService

MAX_BYTES = 16 * 2**20 - 2**16
"""Of a sound file: what an engine takes in one message, less what stands beside it."""


class RemoteSpeech:
    """As `serving.service.speech.transcribe.Speech`, elsewhere."""

    def __init__(self, pool: Pool) -> None:
        self._pool, self.files = pool, Files()

    async def transcribe(
        self, service: TextService, given: TranscribeInput, tell: Callable[[str], None] | None = None
    ) -> Transcript:
        """A sound file's text, by the engine with the least work. Others are tried where it refuses, before anything was told.

        Raises:
            RequestError: INVALID_ARGUMENT: the file is too large for an engine's messages; what the engine says.
        """
        if len(given.data) > MAX_BYTES:
            raise invalid(
                f"file has {len(given.data)} bytes; through a gateway at most {MAX_BYTES} are taken. Send it compressed, or in "
                "parts.", "file",
            )  # fmt: skip
        begun = False

        def told(text: str) -> None:
            nonlocal begun
            begun = True
            assert tell is not None
            tell(text)

        async def ask(client: Any) -> Transcript:
            try:
                return await client.transcribe(given, None if tell is None else told)
            except RequestError as error:
                if begun:  # nobody may say it again
                    raise RequestError(ErrorKind.INTERNAL, error.message) from error
                raise

        return await self._pool.once(ask)
