"""/v1/responses. https://platform.openai.com/docs/api-reference/responses

Nothing is stored: a conversation comes whole in `input`, and `previous_response_id` is refused.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from serving.engine.api.sampling_params import MAX_LOGPROBS
from serving.errors import invalid
from serving.frontends.http.models import LEAVE, ApiBody, ApiReply, ApiRequest, Many, Refused, number
from serving.frontends.openai.protocol.chat import ChatRequest, Effort
from serving.frontends.openai.protocol.common import SAMPLING_REFUSED, StructuredOutputsBody

NOT_STORED = "this server stores nothing. Send the conversation in input."
RESPONSES_REFUSED: Refused = {
    **SAMPLING_REFUSED,
    "previous_response_id": (("",), NOT_STORED),
    "conversation": ((), NOT_STORED),
    "background": ((False,), "this server stores nothing."),
    "prompt": ((), "this server stores no prompts. Send the text in input."),
    "context_management": (([],), LEAVE),
    "n": ((1,), "a response has one answer."),
}
LOGPROBS = "message.output_text.logprobs"


class TextFormat(ApiRequest):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextConfig(ApiBody):
    REFUSED: ClassVar[Refused] = {"verbosity": (("medium",), LEAVE)}

    format: TextFormat | None = None


class ReasoningConfig(ApiRequest):
    effort: Effort | None = None
    summary: str | None = Field(default=None, description="Accepted; the thinking comes whole, not summed up.")


class FunctionTool(ApiRequest):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(ApiRequest):
    type: Literal["function"]
    name: str


class ResponsesRequest(ApiBody):
    REFUSED: ClassVar[Refused] = RESPONSES_REFUSED
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    model: str | None = None
    input: str | Many[dict[str, Any]] = Field(description="Text, or messages and tool calls with their outputs.")
    instructions: str | None = None
    max_output_tokens: int | None = number(1)
    temperature: float | None = number(0)
    top_p: float | None = number(0, 1)
    top_k: int | None = number(-1)
    min_p: float | None = number(0, 1)
    seed: int | None = None
    repetition_penalty: float | None = number(0)
    stop: str | Many[str] | None = None
    ignore_eos: bool | None = None
    top_logprobs: int | None = number(0, MAX_LOGPROBS)
    include: Many[str] | None = None
    reasoning: ReasoningConfig | None = None
    text: TextConfig | None = None
    structured_outputs: StructuredOutputsBody | None = None
    tools: Many[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    stream: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    store: bool | None = Field(default=None, description="Accepted; nothing is stored.")
    priority: int | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    timeout: float | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    user: str | None = Field(default=None, description="Accepted and ignored.")

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.include and LOGPROBS in self.include) or self.top_logprobs is not None

    def to_chat(self) -> ChatRequest:
        """The same request as a chat, which is what is run.

        Raises:
            RequestError: INVALID_ARGUMENT about what has no equivalent.
        """
        fields: dict[str, Any] = {
            name: value
            for name in (
                "model", "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "stop", "ignore_eos",
                "parallel_tool_calls", "priority", "request_id", "cache_salt", "timeout", "chat_template_kwargs",
                "structured_outputs",
            )
            if (value := getattr(self, name)) is not None
        }  # fmt: skip
        fields["messages"] = self._messages()
        fields["max_completion_tokens"] = self.max_output_tokens
        if self.wants_logprobs:
            fields["logprobs"], fields["top_logprobs"] = True, self.top_logprobs or 0
        if self.reasoning and self.reasoning.effort:
            fields["reasoning_effort"] = self.reasoning.effort
        if self.truncation == "auto":
            fields["truncate_prompt_tokens"] = -1
        if self.tools:
            fields["tools"] = [{"type": "function", "function": _function(tool)} for tool in self.tools]
        if isinstance(self.tool_choice, FunctionChoice):
            fields["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        elif self.tool_choice is not None:
            fields["tool_choice"] = self.tool_choice
        form = self.text.format if self.text else None
        if form is not None and form.type == "json_schema":
            schema = {"name": form.name, "schema": form.schema_, "strict": form.strict}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif form is not None:
            fields["response_format"] = {"type": form.type}
        if "structured_outputs" in fields:
            fields["structured_outputs"] = fields["structured_outputs"].model_dump(by_alias=True)
        return ChatRequest.model_validate(fields)

    def names(self) -> dict[str, str]:
        """As `ApiBody.names`; complete after `to_chat`."""
        structured = "structured_outputs" if self.structured_outputs is not None else "text.format"
        return {
            "max_tokens": "max_output_tokens",
            "max_completion_tokens": "max_output_tokens",
            "logprobs": "top_logprobs",
            "prompt": "input",
            "messages": "input",
            "structured_outputs": structured,
            "response_format": "text.format",
            "truncate_prompt_tokens": "truncation",
            **self._origins,
        }

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
            self._origins["messages[0]"] = "instructions"
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        if not self.input:
            raise invalid("input is empty: give text or at least one item.", "input")
        for i, item in enumerate(self.input):
            where = f"input[{i}]"
            _add_item(messages, item, where)
            place = f"messages[{len(messages) - 1}]"
            self._origins[place] = where
            if item.get("type") == "function_call_output":
                self._origins[f"{place}.content"] = f"{where}.output"
        return messages


def _function(tool: FunctionTool) -> dict[str, Any]:
    return {k: v for k, v in tool.model_dump(exclude_unset=True).items() if k != "type"}


def _add_item(messages: list[dict[str, Any]], item: dict[str, Any], where: str) -> None:
    """Adds one input item to a chat. What the model wrote in one turn, texts and calls, becomes one assistant message: templates
    want roles to alternate."""
    kind = item.get("type", "message")
    last = messages[-1] if messages and messages[-1].get("role") == "assistant" else None
    if kind == "message":
        content = item.get("content")
        if item.get("role") == "assistant" and last is not None and isinstance(content, str | list):
            last["content"] = [*_parts(last["content"]), *_parts(content)] if last["content"] is not None else content
        else:
            messages.append({"role": item.get("role"), "content": content})
    elif kind == "function_call":
        name, arguments, call_id = item.get("name"), item.get("arguments"), item.get("call_id")
        if not (isinstance(name, str) and isinstance(arguments, str) and isinstance(call_id, str)):
            raise invalid(f"{where} needs name, arguments and call_id, each a string.", where)
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        if last is None:
            last = {"role": "assistant", "content": None}
            messages.append(last)
        last.setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
    elif kind != "reasoning":  # what the model thought in earlier turns is not shown to it again
        raise invalid(f"{where} is of type {str(kind)[:64]!r}, which this server does not take.", f"{where}.type")


def _parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class ResponsesReply(ApiReply):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["completed", "incomplete", "in_progress", "failed", "cancelled"]
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    tools: list[dict[str, Any]]
    tool_choice: Any
    error: dict[str, Any] | None = None
    incomplete_details: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None


class InputTokensReply(ApiReply):
    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int
