"""/v1/chat/completions. https://platform.openai.com/docs/api-reference/chat"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from serving.engine.api.sampling_params import MAX_LOGPROBS
from serving.errors import invalid
from serving.frontends.http.models import LEAVE, ApiReply, ApiRequest, Many, Refused, number
from serving.frontends.openai.protocol.common import SAMPLING_REFUSED, SamplingFields, UsageReply
from serving.service.requests.inputs import GenerateInput, effort_variables

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
CHAT_REFUSED: Refused = {
    **SAMPLING_REFUSED,
    "chat_template": ((), "the server's own is used; --chat-template sets it."),
    "echo": ((False,), "put the text in front of the reply yourself, or use /v1/completions."),
    "functions": (([],), "use tools."),
    "function_call": (("none", "auto"), "use tool_choice."),
    "modalities": ((["text"],), "this server writes text."),
    "audio": ((), "this server writes text."),
    "web_search_options": ((), LEAVE),
    "verbosity": (("medium",), LEAVE),
}

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


class AllowedTools(ApiRequest):
    mode: Literal["auto", "required"]
    tools: Many[NamedToolChoice]


class AllowedToolsChoice(ApiRequest):
    """Of all tools that the model sees, those that it may call."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class ChatRequest(SamplingFields):
    REFUSED: ClassVar[Refused] = CHAT_REFUSED

    model: str | None = None
    messages: Many[dict[str, Any]] = Field(json_schema_extra={"items": MESSAGE_SCHEMA, "minItems": 1})
    max_tokens: int | None = number(1, text="Old name of max_completion_tokens.")
    max_completion_tokens: int | None = number(1, text="Left out: up to the context's end.")
    logprobs: bool | None = None
    top_logprobs: int | None = number(0, MAX_LOGPROBS)
    tools: Many[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolsChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    reasoning_effort: Effort | None = Field(
        default=None, description="For the chat template; none turns thinking off where the template can."
    )
    documents: Many[dict[str, Any]] | None = Field(default=None, description="For chat templates that quote from them.")
    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = Field(
        default=None, description="How images are cut: min_pixels and max_pixels, where a model's can be of any size."
    )
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None

    def params(self) -> dict[str, Any]:
        """Sampling parameters that were named. Raises RequestError naming the field at fault."""
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs needs logprobs: true.", "top_logprobs")
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self.sampling(max_tokens=limit, logprobs=(self.top_logprobs or 0) if self.logprobs else None)

    def names(self) -> dict[str, str]:
        limit = {"max_tokens": "max_completion_tokens"} if self.max_completion_tokens is not None else {}
        return {**super().names(), **limit, "logprobs": "top_logprobs"}

    def to_input(self, request_id: str) -> GenerateInput:
        """The service's request."""
        tools = [tool.model_dump(exclude_unset=True) for tool in self.tools or ()]
        return GenerateInput(
            messages=self.messages,
            tools=None if self.tool_choice == "none" else tools or None,
            documents=self.documents,
            chat_template_kwargs={**effort_variables(self.reasoning_effort), **(self.chat_template_kwargs or {})},
            add_generation_prompt=not self.continue_final_message
            if self.add_generation_prompt is None
            else self.add_generation_prompt,
            continue_final_message=bool(self.continue_final_message),
            add_special_tokens=self.add_special_tokens,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            truncation_side=self.truncation_side,
            model=self.model,
            request_id=self.request_id or request_id,
            priority=self.priority or 0,
            timeout_s=self.timeout,
            ttft_timeout_s=self.ttft_timeout,
            cache_salt=self.cache_salt,
            mm_processor_kwargs=self.mm_processor_kwargs,
            transfer=self.kv_transfer_params and self.kv_transfer_params.to_service(),
            whole=not self.stream,
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
    kv_transfer_params: dict[str, Any] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[Any] | None = None
