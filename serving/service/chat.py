"""Chats with tools and thinking, the same for every entry: what is offered and enforced, and how the reply is read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from serving.engine.api.sampling_params import SamplingParams, StructuredOutputs
from serving.service.requests.inputs import GenerateInput
from serving.service.requests.prepare import ConstraintFactory, PreparedRequest
from serving.service.service import TextService
from serving.text.constraints.sources import schema_of
from serving.text.tools import ReasoningFamily, ToolFamily, ToolPlan, plan_tools
from serving.text.tools import ReplyParser as FamilyParser
from serving.text.tools.reply import ReplyReader


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """What a chat's client says about tools and thinking.

    Attributes:
        tool_choice: "none", "auto", "required", or OpenAI's {"type": "function", "function": {"name": ...}}; None is
            "auto" where there are tools.
        allowed_tools: names of the tools that may be called, of all that the model sees; None: all.
        parallel_tool_calls: False allows one call.
        include_reasoning: False leaves the thinking out of the reply.
    """

    tool_choice: str | Mapping[str, Any] | None = None
    allowed_tools: tuple[str, ...] | None = None
    parallel_tool_calls: bool = True
    include_reasoning: bool = True

    @property
    def forces_call(self) -> bool:
        return self.tool_choice not in (None, "none", "auto")


async def prepare_chat(
    service: TextService, given: GenerateInput, params: Mapping[str, Any], options: ChatOptions
) -> PreparedRequest:
    """Validates and tokenizes a chat, and compiles what holds its tool calls to their schemas. A forced call wins over a
    structured output: it has a form of its own. Where calls are left to the model, the reply is one or the other.

    Args:
        given: with `messages`, and the tools in OpenAI's shape.
        params: the sampling parameters that the client named, as for `TextService.make_params`.
    Raises:
        RequestError: as `TextService.prepare`; INVALID_ARGUMENT about tools and tool_choice.
    """
    await service.adapters.resolve(given.model)
    voice = service.voice(given.model, given.tenant)
    style = voice.style
    params = dict(params)
    structured = params.get("structured_outputs") is not None and not options.forces_call
    reasoning = None if structured else style.reasoning  # a structured output leaves no room for thinking
    answer = _answer(params["structured_outputs"]) if structured and given.tools else None
    if options.tool_choice == "none":
        answer = None
    structured = structured and answer is None
    if not structured:
        params.pop("structured_outputs", None)
    service.limits.check_count("tools", len(given.tools or ()), service.limits.max_tools, "tools")
    plan_for = functools.partial(
        plan_tools,
        given.tools,
        options.tool_choice,
        style.tools,
        voice.tokenizer,
        parallel=options.parallel_tool_calls,
        reasoning=reasoning,
        answer=answer,
        allowed=options.allowed_tools,
    )
    plan = plan_for()
    if not plan.offered:
        given = dataclasses.replace(given, tools=None)
    family = None if structured else plan.family
    made = service.make_params(params)
    if family is None and reasoning is None:
        return await service.prepare(given, made)

    async def constrain(prompt: str, params: SamplingParams) -> tuple[SamplingParams, ConstraintFactory | None]:
        """Holds the completion to its calls: the grammar depends on whether the prompt ends inside the thinking."""
        held = plan_for(in_reasoning=True) if _thinks(reasoning, given, prompt) else plan
        if held.grammar is None:
            return params, None
        constraint = await service.compile_tools(held.grammar, voice)
        return dataclasses.replace(params, structured_outputs=StructuredOutputs(grammar=held.grammar)), constraint

    prepared = await service.prepare(
        given,
        made,
        constrain=constrain if plan.grammar is not None and not structured else None,
        markers=style.markers,
    )
    thinking = _thinks(reasoning, given, prepared.prompt or "")
    return dataclasses.replace(prepared, reader=functools.partial(_reader, plan, family, reasoning, thinking, options))


def _answer(wanted: StructuredOutputs) -> Mapping[str, Any] | None:
    """The schema of the reply that a structured output asks for; None where it is no JSON."""
    if wanted.json is not None:
        return schema_of(wanted.json)
    return {"type": "object"} if wanted.json_object else None


def _thinks(reasoning: ReasoningFamily | None, given: GenerateInput, prompt: str) -> bool:
    """Whether the completion begins inside the thinking: the template opened it, or the turn to go on with did."""
    if reasoning is None:
        return False
    if reasoning.opened_by(prompt):
        return True
    if not given.continue_final_message or not given.messages:
        return False
    content = given.messages[-1].get("content")
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
    return isinstance(content, str) and content.rfind(reasoning.open) > content.rfind(reasoning.close)


def _reader(
    plan: ToolPlan, family: ToolFamily | None, reasoning: ReasoningFamily | None, thinking: bool, options: ChatOptions
) -> ReplyReader:
    schemas = plan.schemas if family is not None else None
    return ReplyReader(
        FamilyParser(family, reasoning, schemas=schemas, in_reasoning=thinking),
        reasoning=options.include_reasoning,
        parallel=options.parallel_tool_calls,
        calls_only=family is not None and options.forces_call,
    )
