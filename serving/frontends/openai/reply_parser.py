"""How a chat's completion is read: plain content, or content with reasoning and tool calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from serving.errors import invalid
from serving.frontends.openai.protocol.chat import ChatRequest, NamedToolChoice
from serving.service import PreparedRequest, TextService
from serving.text.tools.events import ContentDelta, Event, ReasoningDelta, ToolCallArguments, ToolCallStart
from serving.text.tools.families import (
    ReasoningFamily,
    ToolFamily,
    detect_reasoning,
    detect_tools,
    reasoning_family,
    tool_family,
)
from serving.text.tools.parser import ReplyParser as FamilyParser

FALLBACK_TOOLS = "json"
"""For models whose template shows no known way to write calls: a JSON object with the name of an offered tool."""


@dataclasses.dataclass(frozen=True)
class ChatStyle:
    """How the served model writes tool calls and reasoning.

    Attributes:
        tools: also for models that show no style of their own, so that calls can be forced.
        reasoning: None for models that do not think aloud.
        keep_special: calls or thinking are marked with control tokens, which must then stay in the text.
    """

    tools: ToolFamily
    reasoning: ReasoningFamily | None
    keep_special: bool = False

    @classmethod
    def of(cls, service: TextService, tool_parser: str | None = None, reasoning_parser: str | None = None) -> ChatStyle:
        """The style that the chat template shows, or those named (a family's name or vLLM's for its parser).

        Raises:
            ValueError: there is no parser of that name; the sentence lists those there are.
        """
        source = getattr(service.chat_template, "source", "") or ""
        tools = tool_family(tool_parser) if tool_parser else detect_tools(source) or tool_family(FALLBACK_TOOLS)
        reasoning = reasoning_family(reasoning_parser) if reasoning_parser else detect_reasoning(source)
        markers = (*tools.markers, *(reasoning.markers if reasoning else ()))
        return cls(tools, reasoning, any(_is_control(service, marker) for marker in markers))


def _is_control(service: TextService, marker: str) -> bool:
    ids = service.tokenizer.encode(marker, add_special_tokens=False)
    return any(service.tokenizer.is_special(i) for i in ids)


async def prepare_chat(service: TextService, style: ChatStyle, body: ChatRequest, request_id: str) -> PreparedRequest:
    """Validates and tokenizes a chat request. Raises RequestError."""
    given = body.params()
    _check_tool_choice(body)
    if style.keep_special and _reads(style, body):
        given["skip_special_tokens"] = False
    return await service.prepare(body.to_input(request_id), service.make_params(given))


def _check_tool_choice(body: ChatRequest) -> None:
    choice = body.tool_choice
    if choice in (None, "none", "auto"):
        return
    if not body.tools:
        raise invalid("tool_choice needs tools to choose from.", "tool_choice")
    if isinstance(choice, NamedToolChoice):
        names = [tool.function.name for tool in body.tools]
        if choice.function.name not in names:
            raise invalid(
                f"tool_choice names {choice.function.name!r}, but the tools are {', '.join(names)}.", "tool_choice"
            )
    if body.constraint() is not None:
        raise invalid("tool_choice and a structured output exclude each other: a call has its own form.", "tool_choice")


def _offers_tools(body: ChatRequest) -> bool:
    return bool(body.tools) and body.tool_choice != "none"


def _reads(style: ChatStyle, body: ChatRequest) -> bool:
    """Whether the completion can hold more than content. A structured output leaves no room for thinking."""
    return _offers_tools(body) or (style.reasoning is not None and body.constraint() is None)


def parsers_for(style: ChatStyle, body: ChatRequest, prepared: PreparedRequest) -> list[ReplyParser] | None:
    """One parser a completion, or None where the text is the content."""
    if not _reads(style, body):
        return None
    tools = style.tools if _offers_tools(body) else None
    reasoning = style.reasoning if body.constraint() is None else None
    schemas: Mapping[str, Mapping[str, Any]] = {
        tool.function.name: tool.function.parameters or {} for tool in body.tools or ()
    }
    thinking = reasoning is not None and reasoning.opened_by(prepared.prompt or "")

    def make() -> ReplyParser:
        parser = FamilyParser(tools, reasoning, schemas=schemas if tools else None, in_reasoning=thinking)
        return ReplyParser(parser, body.include_reasoning is not False, body.parallel_tool_calls is not False)

    return [make() for _ in range(prepared.params.n)]


class ReplyParser:
    """Splits one completion's text into the fields of OpenAI's message, however the text is cut into pieces.

    Args:
        reasoning: tell the thinking; else it is dropped.
        parallel: several calls; else those after the first are dropped.
    """

    def __init__(self, parser: FamilyParser, reasoning: bool, parallel: bool) -> None:
        self._parser = parser
        self._tells_reasoning = reasoning
        self._parallel = parallel

    @property
    def called(self) -> bool:
        """Whether a tool call was seen."""
        return self._parser.num_calls > 0

    def push(self, text: str, last: bool) -> list[dict[str, Any]]:
        """Deltas (`content`, `reasoning`, `tool_calls`) for new text; `last` flushes what was held back."""
        events = self._parser.push(text)
        if last:
            events += self._parser.finish()
        return [delta for event in events if (delta := self._delta(event)) is not None]

    def _delta(self, event: Event) -> dict[str, Any] | None:
        if isinstance(event, ContentDelta):
            return {"content": event.text}
        if isinstance(event, ReasoningDelta):
            return {"reasoning": event.text} if self._tells_reasoning else None
        if event.index > 0 and not self._parallel:
            return None
        if isinstance(event, ToolCallStart):
            function = {"name": event.name, "arguments": ""}
            return {
                "tool_calls": [{"index": event.index, "id": event.call_id, "type": "function", "function": function}]
            }
        if isinstance(event, ToolCallArguments):
            return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
        return None

    def whole(self, text: str) -> tuple[dict[str, Any], bool]:
        """The message's fields for a whole completion, and whether it calls a tool."""
        content, reasoning, calls = "", "", []
        for delta in self.push(text, last=True):
            content += delta.get("content", "")
            reasoning += delta.get("reasoning", "")
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    calls.append({"id": call["id"], "type": "function", "function": call["function"]})
                else:
                    calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        message: dict[str, Any] = {"content": content or (None if calls else "")}
        if reasoning:
            message["reasoning"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return message, bool(calls)
