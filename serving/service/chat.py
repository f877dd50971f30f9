"""Chats with tools and thinking, the same for every entry: what is offered and enforced, and how the reply is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from serving.engine.api.sampling_params import StructuredOutputs
from serving.errors import invalid
from serving.service.inputs import GenerateInput
from serving.service.prepare import PreparedRequest
from serving.text.tools import (
    ContentDelta,
    Event,
    ReasoningDelta,
    ReasoningFamily,
    ToolCallArguments,
    ToolCallStart,
    ToolFamily,
    ToolPlan,
    plan_tools,
)
from serving.text.tools import ReplyParser as FamilyParser

if TYPE_CHECKING:
    from serving.service.service import TextService


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """What a chat's client says about tools and thinking.

    Attributes:
        tool_choice: "none", "auto", "required", or OpenAI's {"type": "function", "function": {"name": ...}}; None is
            "auto" where there are tools.
        parallel_tool_calls: False allows one call.
        include_reasoning: False leaves the thinking out of the reply.
    """

    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool = True
    include_reasoning: bool = True

    @property
    def forces_call(self) -> bool:
        return self.tool_choice not in (None, "none", "auto")


@dataclasses.dataclass(frozen=True)
class PreparedChat:
    """A chat that was found good, and one parser a completion; None where the text is the content."""

    request: PreparedRequest
    parsers: list[ReplyParser] | None


async def prepare_chat(
    service: TextService, given: GenerateInput, params: Mapping[str, Any], options: ChatOptions
) -> PreparedChat:
    """Validates and tokenizes a chat, and compiles what holds its tool calls to their schemas.

    Args:
        given: with `messages`, and the tools in OpenAI's shape.
        params: the sampling parameters that the client named, as for `TextService.make_params`.
    Raises:
        RequestError: as `TextService.prepare`; INVALID_ARGUMENT about tools and tool_choice.
    """
    style = service.style
    params = dict(params)
    structured = params.get("structured_outputs") is not None
    if structured and options.forces_call:
        raise invalid("tool_choice and a structured output exclude each other: a call has its own form.", "tool_choice")
    reasoning = None if structured else style.reasoning  # a structured output leaves no room for thinking
    thinking = False
    if reasoning is not None and options.forces_call:
        prompt, _ = await service.tokenize(given)
        thinking = reasoning.opened_by(prompt or "")
    service.limits.check_count("tools", len(given.tools or ()), service.limits.max_tools, "tools")
    plan = plan_tools(
        given.tools,
        options.tool_choice,
        style.tools,
        service.tokenizer,
        parallel=options.parallel_tool_calls,
        reasoning=reasoning,
        in_reasoning=thinking,
    )
    if not plan.offered:
        given = dataclasses.replace(given, tools=None)
    family = None if structured else plan.family
    reads = family is not None or reasoning is not None
    constraint = None
    if plan.grammar is not None and not structured:
        constraint = await service.compile_tools(plan.grammar)
        params["structured_outputs"] = StructuredOutputs(grammar=plan.grammar)
    prepared = await service.prepare(
        given, service.make_params(params), constraint=constraint, markers=style.markers if reads else frozenset()
    )
    if not reads:
        return PreparedChat(prepared, None)
    thinking = reasoning is not None and reasoning.opened_by(prepared.prompt or "")
    return PreparedChat(
        prepared, [_parser(plan, family, reasoning, thinking, options) for _ in range(prepared.params.n)]
    )


def _parser(
    plan: ToolPlan, family: ToolFamily | None, reasoning: ReasoningFamily | None, thinking: bool, options: ChatOptions
) -> ReplyParser:
    schemas = plan.schemas if family is not None else None
    parser = FamilyParser(family, reasoning, schemas=schemas, in_reasoning=thinking)
    return ReplyParser(parser, options.include_reasoning, options.parallel_tool_calls)


class ReplyParser:
    """Splits one completion's text into content, thinking and tool calls, however the text is cut into pieces.

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

    def push(self, text: str, last: bool) -> list[Event]:
        """What is new with `text`; `last` flushes what was held back."""
        events = self._parser.push(text)
        if last:
            events += self._parser.finish()
        return [event for event in events if self._wanted(event)]

    def _wanted(self, event: Event) -> bool:
        if isinstance(event, ContentDelta):
            return True
        if isinstance(event, ReasoningDelta):
            return self._tells_reasoning
        return self._parallel or event.index == 0

    def whole(self, text: str) -> tuple[dict[str, Any], bool]:
        """A whole completion as an assistant's message in OpenAI's shape, and whether it calls a tool.

        Returns:
            `role`, `content` (None for calls alone), `reasoning` where there is some, `tool_calls` where there are any.
        """
        content, reasoning, calls = "", "", []
        for event in self.push(text, last=True):
            if isinstance(event, ContentDelta):
                content += event.text
            elif isinstance(event, ReasoningDelta):
                reasoning += event.text
            elif isinstance(event, ToolCallStart):
                function = {"name": event.name, "arguments": ""}
                calls.append({"id": event.call_id, "type": "function", "function": function})
            elif isinstance(event, ToolCallArguments):
                calls[-1]["function"]["arguments"] += event.text
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else "")}
        if reasoning:
            message["reasoning"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return message, bool(calls)
