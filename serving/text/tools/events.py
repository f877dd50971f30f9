"""What a completion of a chat is made of, in the order in which it comes."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ReasoningDelta:
    """More of the model's thinking."""

    text: str


@dataclasses.dataclass(frozen=True)
class ContentDelta:
    """More of the answer."""

    text: str


@dataclasses.dataclass(frozen=True)
class ToolCallStart:
    """A tool call begins.

    Attributes:
        index: 0, 1, ... within the message.
        call_id: made up here, unique.
    """

    index: int
    name: str
    call_id: str


@dataclasses.dataclass(frozen=True)
class ToolCallArguments:
    """More of a call's arguments: pieces of one JSON object's text."""

    index: int
    text: str


@dataclasses.dataclass(frozen=True)
class ToolCallEnd:
    """A tool call ended.

    Attributes:
        complete: the arguments are a whole JSON object. False where the completion was cut off or went wrong inside.
    """

    index: int
    complete: bool


Event = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallArguments | ToolCallEnd


def merge(events: list[Event]) -> list[Event]:
    """Joins neighbouring deltas of the same kind."""
    merged: list[Event] = []
    for event in events:
        last = merged[-1] if merged else None
        if isinstance(event, ReasoningDelta) and isinstance(last, ReasoningDelta):
            merged[-1] = ReasoningDelta(last.text + event.text)
        elif isinstance(event, ContentDelta) and isinstance(last, ContentDelta):
            merged[-1] = ContentDelta(last.text + event.text)
        elif isinstance(event, ToolCallArguments) and isinstance(last, ToolCallArguments) and last.index == event.index:
            merged[-1] = ToolCallArguments(event.index, last.text + event.text)
        else:
            merged.append(event)
    return merged
