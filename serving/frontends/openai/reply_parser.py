"""How a chat's completion is read: plain content, or content with reasoning and tool calls."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from serving.engine.sampling_params import StructuredOutputs
from serving.errors import invalid
from serving.frontends.openai.protocol.chat import ChatRequest, NamedToolChoice
from serving.service import PreparedRequest, TextService
from serving.service.prepare import ConstraintFactory
from serving.text.tools import (
    ContentDelta,
    Event,
    ReasoningDelta,
    ReasoningFamily,
    ToolCallArguments,
    ToolCallStart,
    ToolFamily,
    ToolPlan,
    detect_reasoning,
    detect_tools,
    kept_token_ids,
    plan_tools,
    reasoning_family,
    tool_family,
)
from serving.text.tools import ReplyParser as FamilyParser

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
        return cls(tools, reasoning, bool(kept_token_ids(service.tokenizer, tools, reasoning)))


@dataclasses.dataclass(frozen=True)
class PreparedChat:
    """A chat that was found good, and one parser a completion; None where the text is the content."""

    request: PreparedRequest
    parsers: list[ReplyParser] | None


async def prepare_chat(service: TextService, style: ChatStyle, body: ChatRequest, request_id: str) -> PreparedChat:
    """Validates and tokenizes a chat, and compiles what holds its tool calls to their schemas. Raises RequestError."""
    params = body.params()
    structured = "structured_outputs" in params
    if structured and _forces_call(body):
        raise invalid("tool_choice and a structured output exclude each other: a call has its own form.", "tool_choice")
    reasoning = None if structured else style.reasoning  # a structured output leaves no room for thinking
    given = body.to_input(request_id)
    thinking = False
    if reasoning is not None and _forces_call(body):
        prompt, _ = await service.tokenize(given)
        thinking = reasoning.opened_by(prompt or "")
    plan = _plan(service, style, body, reasoning, thinking)
    if not plan.offered:
        given = dataclasses.replace(given, tools=None)
    family = None if structured else plan.family
    reads = family is not None or reasoning is not None
    if reads and style.keep_special:
        params["skip_special_tokens"] = False
    constraint = None
    if plan.grammar is not None and not structured:
        constraint, params["structured_outputs"] = await _compile(service, plan.grammar)
    prepared = await service.prepare(given, service.make_params(params), constraint=constraint)
    if not reads:
        return PreparedChat(prepared, None)
    thinking = reasoning is not None and reasoning.opened_by(prepared.prompt or "")

    def make() -> ReplyParser:
        schemas = plan.schemas if family is not None else None
        parser = FamilyParser(family, reasoning, schemas=schemas, in_reasoning=thinking)
        return ReplyParser(parser, body.include_reasoning is not False, body.parallel_tool_calls is not False)

    return PreparedChat(prepared, [make() for _ in range(prepared.params.n)])


def _forces_call(body: ChatRequest) -> bool:
    return body.tool_choice not in (None, "none", "auto")


def _plan(
    service: TextService, style: ChatStyle, body: ChatRequest, reasoning: ReasoningFamily | None, thinking: bool
) -> ToolPlan:
    choice = body.tool_choice
    return plan_tools(
        [tool.model_dump(exclude_unset=True) for tool in body.tools or ()],
        choice.model_dump() if isinstance(choice, NamedToolChoice) else choice,
        style.tools,
        service.tokenizer,
        parallel=body.parallel_tool_calls is not False,
        reasoning=reasoning,
        in_reasoning=thinking,
    )


async def _compile(service: TextService, grammar: str) -> tuple[ConstraintFactory | None, StructuredOutputs]:
    """The grammar's factory, made off the event loop; None where the engine is remote and compiles the source itself."""
    source = StructuredOutputs(grammar=grammar)
    compile_tools = getattr(service.grammar_compiler, "compile_tools", None)
    if compile_tools is None:
        return None, source
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(service.limits.grammar_timeout_s):
            return await loop.run_in_executor(None, compile_tools, grammar), source
    except TimeoutError:
        raise invalid("The tools' schemas took too long to compile. Simplify them.", "tools") from None


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
