"""A chat's body as the service's request, and the service's events as deltas of OpenAI's message."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from serving.errors import named
from serving.frontends.openai.protocol.chat import AllowedToolsChoice, ChatRequest, NamedToolChoice
from serving.service import ChatOptions, PreparedRequest, TextService, prepare_chat
from serving.text.tools import ContentDelta, Event, ReasoningDelta, ToolCallArguments, ToolCallStart


def options_of(body: ChatRequest) -> ChatOptions:
    """What a chat says about tools and thinking."""
    choice, allowed = body.tool_choice, None
    if isinstance(choice, AllowedToolsChoice):
        allowed = tuple(tool.function.name for tool in choice.allowed_tools.tools)
        choice = choice.allowed_tools.mode
    return ChatOptions(
        choice.model_dump() if isinstance(choice, NamedToolChoice) else choice,
        allowed_tools=allowed,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        include_reasoning=body.include_reasoning is not False,
    )


async def prepare_body(service: TextService, body: ChatRequest, request_id: str) -> PreparedRequest:
    """Validates and tokenizes a chat. Raises RequestError."""
    with named(body.names()):
        return await prepare_chat(service, body.to_input(request_id), body.params(), options_of(body))


def deltas(events: Iterable[Event]) -> list[dict[str, Any]]:
    """The deltas (`content`, `reasoning`, `tool_calls`) that clients put together to a message."""
    return [delta for event in events if (delta := _delta(event)) is not None]


def _delta(event: Event) -> dict[str, Any] | None:
    if isinstance(event, ContentDelta):
        return {"content": event.text}
    if isinstance(event, ReasoningDelta):
        return {"reasoning": event.text}
    if isinstance(event, ToolCallStart):
        function = {"name": event.name, "arguments": ""}
        return {"tool_calls": [{"index": event.index, "id": event.call_id, "type": "function", "function": function}]}
    if isinstance(event, ToolCallArguments):
        return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
    return None
