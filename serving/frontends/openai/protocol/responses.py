"""/v1/responses. https://platform.openai.com/docs/api-reference/responses

Nothing is stored: a conversation comes whole in `input`, and `previous_response_id` is refused.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from serving.engine.api.sampling_params import MAX_LOGPROBS
from serving.errors import ErrorKind, RequestError, invalid
from serving.frontends.openai.protocol.chat import ChatRequest
from serving.frontends.openai.protocol.common import ApiReply, ApiRequest, StructuredOutputsBody, number

LOGPROBS = "message.output_text.logprobs"


class TextFormat(ApiRequest):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextConfig(ApiRequest):
    format: TextFormat | None = None
    verbosity: str | None = Field(default=None, description="Accepted and ignored.")


class FunctionTool(ApiRequest):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(ApiRequest):
    type: Literal["function"]
    name: str


class ResponsesRequest(ApiRequest):
    model: str | None = None
    input: str | list[dict[str, Any]] = Field(description="Text, or messages and tool calls with their outputs.")
    instructions: str | None = None
    max_output_tokens: int | None = number(1)
    temperature: float | None = number(0)
    top_p: float | None = number(0, 1)
    top_k: int | None = number(-1)
    min_p: float | None = number(0, 1)
    seed: int | None = None
    repetition_penalty: float | None = number(0)
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    top_logprobs: int | None = number(0, MAX_LOGPROBS)
    include: list[str] | None = None
    text: TextConfig | None = None
    structured_outputs: StructuredOutputsBody | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    stream: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    previous_response_id: str | None = Field(default=None, description="Not supported: nothing is stored.")
    background: bool | None = Field(default=None, description="Not supported.")
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
        if self.previous_response_id:
            raise RequestError(
                ErrorKind.INVALID_ARGUMENT,
                "previous_response_id is not supported: this server stores nothing. Send the conversation in input.",
                param="previous_response_id",
            )
        if self.background:
            raise invalid("background responses are not supported: this server stores nothing.", "background")
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

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        if not self.input:
            raise invalid("input is empty: give text or at least one item.", "input")
        for i, item in enumerate(self.input):
            _add_item(messages, item, f"input[{i}]")
        return messages


def _function(tool: FunctionTool) -> dict[str, Any]:
    return {k: v for k, v in tool.model_dump(exclude_unset=True).items() if k != "type"}


def _add_item(messages: list[dict[str, Any]], item: dict[str, Any], where: str) -> None:
    """Adds one input item to a chat. Calls of one turn become one assistant message, as templates expect."""
    kind = item.get("type", "message")
    if kind == "message":
        messages.append({"role": item.get("role"), "content": item.get("content")})
    elif kind == "function_call":
        name, arguments, call_id = item.get("name"), item.get("arguments"), item.get("call_id")
        if not (isinstance(name, str) and isinstance(arguments, str) and isinstance(call_id, str)):
            raise invalid(f"{where} needs name, arguments and call_id, each a string.", where)
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        last = messages[-1] if messages else {}
        if last.get("role") == "assistant" and last.get("tool_calls"):
            last["tool_calls"].append(call)
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    elif kind == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
    elif kind != "reasoning":  # what the model thought in earlier turns is not shown to it again
        raise invalid(f"{where} is of type {str(kind)[:64]!r}, which this server does not take.", f"{where}.type")


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
