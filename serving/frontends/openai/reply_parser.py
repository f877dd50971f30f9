"""How a chat's completion is read: plain content, or content with reasoning and tool calls."""

from __future__ import annotations

from typing import Any, Protocol

from serving.frontends.openai.protocol.chat import ChatRequest
from serving.service import PreparedRequest, TextService


class ReplyParser(Protocol):
    """Splits one completion's text into the fields of OpenAI's message, however the text is cut into pieces."""

    @property
    def called(self) -> bool:
        """Whether a tool call was seen."""
        ...

    def push(self, text: str, last: bool) -> list[dict[str, Any]]:
        """Deltas (`content`, `reasoning`, `tool_calls`) for new text; `last` flushes what was held back."""
        ...

    def whole(self, text: str) -> tuple[dict[str, Any], bool]:
        """The message's fields for a whole completion, and whether it calls a tool."""
        ...


async def prepare_chat(service: TextService, body: ChatRequest, request_id: str) -> PreparedRequest:
    """Validates and tokenizes a chat request. Raises RequestError."""
    return await service.prepare(body.to_input(request_id), service.make_params(body.params()))


def parsers_for(service: TextService, body: ChatRequest, prepared: PreparedRequest) -> list[ReplyParser] | None:
    """One parser a completion, or None where the text is the content."""
    return None
