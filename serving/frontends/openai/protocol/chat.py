"""/v1/chat/completions. https://platform.openai.com/docs/api-reference/chat"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from serving.engine.api.sampling_params import MAX_LOGPROBS
from serving.errors import invalid
from serving.frontends.openai.protocol.common import ApiReply, ApiRequest, SamplingFields, UsageReply, number
from serving.service.inputs import GenerateInput

MESSAGE_SCHEMA = {"type": "object", "required": ["role"], "properties": {"role": {"type": "string", "minLength": 1}}}
"""For the API document. What a message may hold is the chat template's affair; the service checks it."""


class FunctionDef(ApiRequest):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(ApiRequest):
    type: Literal["function"] = "function"
    function: FunctionDef


class NamedFunction(ApiRequest):
    name: str


class NamedToolChoice(ApiRequest):
    type: Literal["function"] = "function"
    function: NamedFunction


class ChatRequest(SamplingFields):
    model: str | None = None
    messages: list[dict[str, Any]] = Field(json_schema_extra={"items": MESSAGE_SCHEMA, "minItems": 1})
    max_tokens: int | None = number(1, text="Old name of max_completion_tokens.")
    max_completion_tokens: int | None = number(1, text="Left out: up to the context's end.")
    logprobs: bool | None = None
    top_logprobs: int | None = number(0, MAX_LOGPROBS)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None

    def params(self) -> dict[str, Any]:
        """Sampling parameters that were named. Raises RequestError naming the field at fault."""
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs needs logprobs: true.", "top_logprobs")
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self.sampling(max_tokens=limit, logprobs=(self.top_logprobs or 0) if self.logprobs else None)

    def template_kwargs(self) -> dict[str, Any]:
        """`chat_template_kwargs` without what is not a scalar: templates get no nested values from a request."""
        kwargs = self.chat_template_kwargs or {}
        return {k: v for k, v in kwargs.items() if v is None or isinstance(v, str | int | float | bool)}

    def to_input(self, request_id: str) -> GenerateInput:
        """The service's request."""
        tools = [tool.model_dump(exclude_unset=True) for tool in self.tools or ()]
        return GenerateInput(
            messages=self.messages,
            tools=None if self.tool_choice == "none" else tools or None,
            chat_template_kwargs=self.template_kwargs(),
            add_generation_prompt=not self.continue_final_message
            if self.add_generation_prompt is None
            else self.add_generation_prompt,
            continue_final_message=bool(self.continue_final_message),
            add_special_tokens=self.add_special_tokens,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            model=self.model,
            request_id=self.request_id or request_id,
            priority=self.priority or 0,
            timeout_s=self.timeout,
            ttft_timeout_s=self.ttft_timeout,
            cache_salt=self.cache_salt,
        )


class FunctionCall(ApiReply):
    name: str
    arguments: str


class ToolCall(ApiReply):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessageReply(ApiReply):
    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None


class TopLogprob(ApiReply):
    token: str
    logprob: float
    bytes: list[int] | None = None


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(ApiReply):
    content: list[ChatTokenLogprob] | None = None
    refusal: list[ChatTokenLogprob] | None = None


class ChatChoice(ApiReply):
    index: int
    message: ChatMessageReply
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls", "abort"]
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatReply(ApiReply):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageReply
    system_fingerprint: str | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[Any] | None = None
