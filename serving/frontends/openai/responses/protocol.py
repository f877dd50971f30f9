"""/v1/responses. https://platform.openai.com/docs/api-reference/responses"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from serving.engine.api.sampling_params import MAX_LOGPROBS
from serving.errors import invalid
from serving.frontends.http.models import LEAVE, ApiBody, ApiReply, ApiRequest, Many, Refused, number
from serving.frontends.openai.protocol.chat import ChatRequest, Effort
from serving.frontends.openai.protocol.common import SAMPLING_REFUSED, StructuredOutputsBody
from serving.frontends.openai.responses.items import add_item

RESPONSES_REFUSED: Refused = {
    **SAMPLING_REFUSED,
    "prompt": ((), "this server stores no prompts. Send the text in input."),
    "context_management": (([],), LEAVE),
    "n": ((1,), "a response has one answer."),
}
LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = "reasoning.encrypted_content"
CUSTOM_INPUT = "input"
"""The one argument of the function that stands for a custom tool."""


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

    def as_function(self) -> dict[str, Any]:
        """The same as chats have it."""
        return {k: v for k, v in self.model_dump(exclude_unset=True).items() if k != "type"}


class TextGrammar(ApiRequest):
    """What a custom tool's input looks like. The model is told; a regular expression also holds calls that are forced."""

    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None


class CustomTool(ApiRequest):
    """A tool that takes a text. To the model it is a function with that one argument."""

    type: Literal["custom"]
    name: str
    description: str | None = None
    format: TextGrammar | None = None

    def as_function(self) -> dict[str, Any]:
        """The function that stands for it."""
        argument: dict[str, Any] = {"type": "string"}
        told = [self.description] if self.description else []
        form = self.format
        if form is not None and form.type == "grammar" and form.definition:
            told.append(f"{CUSTOM_INPUT} must match this {form.syntax} grammar:\n{form.definition}")
            if form.syntax == "regex":
                argument["pattern"] = f"^(?:{form.definition})$"
        schema = {"type": "object", "properties": {CUSTOM_INPUT: argument}, "required": [CUSTOM_INPUT]}
        return {"name": self.name, "description": "\n\n".join(told), "parameters": schema}


class NamedChoice(ApiRequest):
    type: Literal["function", "custom"]
    name: str


class AllowedChoice(ApiRequest):
    """Of all tools that the model sees, those that it may call."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Many[NamedChoice]


class ConversationId(ApiRequest):
    id: str


class HostedTool(ApiRequest):
    """A tool that OpenAI's servers run. Agents offer these two unasked: the model is not told of them."""

    type: Literal["web_search", "web_search_preview"]


class ResponsesRequest(ApiBody):
    REFUSED: ClassVar[Refused] = RESPONSES_REFUSED
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)
    _earlier: Sequence[dict[str, Any]] = PrivateAttr(default=())

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
    tools: Many[FunctionTool | CustomTool | HostedTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    stream: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    stream_options: dict[str, Any] | None = Field(default=None, description="Accepted and ignored.")
    store: bool | None = Field(default=None, description="Left out: true, where the server has a store.")
    previous_response_id: str | None = None
    conversation: str | ConversationId | None = None
    background: bool | None = Field(
        default=None, description="Answer at once; the response is to be asked for. Is stored."
    )
    priority: int | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    timeout: float | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    user: str | None = Field(default=None, description="Accepted and ignored.")

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.include and LOGPROBS in self.include) or self.top_logprobs is not None

    @property
    def wants_encrypted(self) -> bool:
        return bool(self.include and ENCRYPTED in self.include)

    @property
    def conversation_id(self) -> str | None:
        return self.conversation.id if isinstance(self.conversation, ConversationId) else self.conversation

    @property
    def custom_tools(self) -> frozenset[str]:
        """Names of the tools that take a text."""
        return frozenset(tool.name for tool in self.tools or () if isinstance(tool, CustomTool))

    @property
    def earlier(self) -> Sequence[dict[str, Any]]:
        """What `follow` put ahead of `input`."""
        return self._earlier

    def follow(self, earlier: Sequence[dict[str, Any]]) -> None:
        """Puts the items of a conversation ahead of `input`."""
        self._earlier = earlier

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
        fields["stream"] = bool(self.stream or self.background)  # what runs in the background can be followed
        fields["max_completion_tokens"] = self.max_output_tokens
        if self.wants_logprobs:
            fields["logprobs"], fields["top_logprobs"] = True, self.top_logprobs or 0
        if self.reasoning and self.reasoning.effort:
            fields["reasoning_effort"] = self.reasoning.effort
        if self.truncation == "auto":
            fields["truncate_prompt_tokens"] = -1
        functions = [tool.as_function() for tool in self.tools or () if not isinstance(tool, HostedTool)]
        if functions:
            fields["tools"] = [{"type": "function", "function": function} for function in functions]
        if isinstance(self.tool_choice, NamedChoice):
            fields["tool_choice"] = _named(self.tool_choice)
        elif isinstance(self.tool_choice, AllowedChoice):
            allowed = {"mode": self.tool_choice.mode, "tools": [_named(tool) for tool in self.tool_choice.tools]}
            fields["tool_choice"] = {"type": "allowed_tools", "allowed_tools": allowed}
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
        for item in self._earlier:
            add_item(messages, item, "input", self._origins)
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        if not self.input and not self._earlier:
            raise invalid("input is empty: give text or at least one item.", "input")
        for i, item in enumerate(self.input):
            add_item(messages, item, f"input[{i}]", self._origins)
        return messages


def _named(choice: NamedChoice) -> dict[str, Any]:
    return {"type": "function", "function": {"name": choice.name}}


class ResponsesReply(ApiReply):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["queued", "completed", "incomplete", "in_progress", "failed", "cancelled"]
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
