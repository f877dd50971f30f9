"""A chat's reply while it is written: content, thinking and calls told apart, and put together to a message."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from serving.text.tools import ContentDelta, Event, ReasoningDelta, ToolCallArguments, ToolCallStart
from serving.text.tools import ReplyParser as FamilyParser


class ReplyReader:
    """Splits one completion's text into content, thinking and tool calls, however the text is cut into pieces.

    Args:
        reasoning: tell the thinking; else it is dropped.
        parallel: several calls; else those after the first are dropped.
        calls_only: the completion is held to calls: half a one, cut off, is no content.
    Attributes:
        reasoning_tokens: those that were thinking so far, with the marker that begins it.
    """

    def __init__(
        self, parser: FamilyParser, *, reasoning: bool = True, parallel: bool = True, calls_only: bool = False
    ) -> None:
        self._parser = parser
        self._tells_reasoning = reasoning
        self._parallel = parallel
        self._calls_only = calls_only
        self._undecided = 0
        self.reasoning_tokens = 0

    @property
    def called(self) -> bool:
        """Whether a tool call was seen."""
        return self._parser.num_calls > 0

    def push(self, text: str, num_tokens: int = 1) -> list[Event]:
        """What is new with `text`, which is that of `num_tokens` tokens."""
        self._undecided += num_tokens
        return self._wanted(self._parser.push(text))

    def finish(self) -> list[Event]:
        """What was held back, at the completion's end."""
        return self._wanted(self._parser.finish())

    def _wanted(self, events: list[Event]) -> list[Event]:
        if events:
            if isinstance(events[0], ReasoningDelta):
                self.reasoning_tokens += self._undecided
            self._undecided = 0
        return [event for event in events if self._is_wanted(event)]

    def _is_wanted(self, event: Event) -> bool:
        if isinstance(event, ContentDelta):
            return not self._calls_only
        if isinstance(event, ReasoningDelta):
            return self._tells_reasoning
        return self._parallel or event.index == 0


class Message:
    """Events put together to an assistant's message in OpenAI's shape."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._arguments: list[list[str]] = []

    def add(self, events: Iterable[Event]) -> None:
        """Takes in the next events."""
        for event in events:
            if isinstance(event, ContentDelta):
                self._content.append(event.text)
            elif isinstance(event, ReasoningDelta):
                self._reasoning.append(event.text)
            elif isinstance(event, ToolCallStart):
                self._calls.append({"id": event.call_id, "type": "function", "function": {"name": event.name}})
                self._arguments.append([])
            elif isinstance(event, ToolCallArguments):
                self._arguments[-1].append(event.text)

    def as_dict(self, calls_only: bool = False) -> dict[str, Any]:
        """`role`, `content` (None for calls alone, and for the rest of what was to be calls), `reasoning` where there is some,
        `tool_calls` where there are any."""
        content = "".join(self._content)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content or (None if self._calls or calls_only else ""),
        }
        if self._reasoning:
            message["reasoning"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": "".join(pieces)}}
                for call, pieces in zip(self._calls, self._arguments, strict=True)
            ]
        return message
