"""/v1/messages and /v1/messages/count_tokens. https://platform.claude.com/docs/en/api/messages

Fields that tell Anthropic's own service what to do around the model (tiers, places, cache control, diagnostics) are taken and
change nothing here: prefixes are cached unasked.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from serving.engine.api.sampling_params import StructuredOutputs
from serving.errors import invalid
from serving.frontends.anthropic.messages import Conversation
from serving.frontends.http.models import ApiBody, ApiReply, ApiRequest, Many, Refused, number
from serving.service import ChatOptions
from serving.service.requests.inputs import GenerateInput, effort_variables

OWN_SERVERS = "Anthropic's own servers do that. Leave it out."
MESSAGES_REFUSED: Refused = {
    "mcp_servers": (([],), "connect to them from the client, and give their tools in tools."),
    "container": ((), OWN_SERVERS),
}
CLIENT_TOOLS = (None, "custom")
SYSTEM_NOISE = "x-anthropic-billing-header"
"""How a block of the system prompt begins that one agent writes anew for every request: it is meant for Anthropic's books, and
before everything else in the prompt it would keep any prefix from being found again."""


class ClientTool(ApiRequest):
    """A tool that the client runs. What Anthropic's servers run, or have a schema for, is told apart by `type`."""

    type: str | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None

    def as_function(self, where: str) -> dict[str, Any]:
        """The same in OpenAI's shape, which the service takes.

        Raises:
            RequestError: INVALID_ARGUMENT: a tool without a schema.
        """
        if self.type not in CLIENT_TOOLS:
            raise invalid(
                f"{where} is of type {str(self.type)[:64]!r}, which this server does not know: give a tool with a name and an "
                "input_schema.",
                f"{where}.type",
            )
        if self.input_schema is None:
            raise invalid(f"Missing required parameter: '{where}.input_schema'.", f"{where}.input_schema")
        function = {"name": self.name, "description": self.description, "strict": self.strict}
        told = {key: value for key, value in function.items() if value is not None}
        return {"type": "function", "function": {**told, "parameters": self.input_schema}}


class MessageToolChoice(ApiRequest):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def as_openai(self) -> str | dict[str, Any]:
        """The same as the service takes it."""
        if self.type == "tool":
            if self.name is None:
                raise invalid("Missing required parameter: 'tool_choice.name'.", "tool_choice.name")
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class Thinking(ApiRequest):
    """Whether to think. How long is the model's affair: `budget_tokens` is taken and not enforced."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(ApiRequest):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(ApiRequest):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(ApiRequest):
    user_id: str | None = Field(default=None, description="Accepted and ignored.")


class CountTokensRequest(ApiBody):
    """What a message is made from."""

    REFUSED: ClassVar[Refused] = MESSAGES_REFUSED
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    model: str | None = None
    messages: Many[dict[str, Any]] = Field(json_schema_extra={"items": {"type": "object"}, "minItems": 1})
    system: str | Many[dict[str, Any]] | None = None
    tools: Many[ClientTool] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = Field(default=None, description="Old name of output_config.format.")
    chat_template_kwargs: dict[str, Any] | None = None

    def names(self) -> dict[str, str]:
        """As `ApiBody.names`; complete after `to_input`."""
        form = "output_format" if self.output_format is not None else "output_config.format"
        return {"structured_outputs": form, "stop": "stop_sequences", **self._origins}

    @property
    def shows_thinking(self) -> bool:
        return self.thinking is None or self.thinking.display != "omitted"

    def options(self) -> ChatOptions:
        """What it says about tools."""
        choice = self.tool_choice
        return ChatOptions(
            choice.as_openai() if choice is not None else None,
            parallel_tool_calls=not (choice is not None and choice.disable_parallel_tool_use),
        )

    def to_input(self, request_id: str) -> GenerateInput:
        """The service's request.

        Raises:
            RequestError: INVALID_ARGUMENT naming the message or tool.
        """
        chat = Conversation()
        for i, block in enumerate([self.system] if isinstance(self.system, str) else self.system or ()):
            if isinstance(block, str):
                chat.add_system(block, "system")
            elif not str(block.get("text")).startswith(SYSTEM_NOISE):
                chat.add_system(block, f"system[{i}]")
        for i, message in enumerate(self.messages):
            chat.add(message, f"messages[{i}]")
        self._origins = chat.origins
        tools = [tool.as_function(f"tools[{i}]") for i, tool in enumerate(self.tools or ())]
        hidden = self.tool_choice is not None and self.tool_choice.type == "none"
        return GenerateInput(
            messages=chat.messages,
            tools=None if hidden else tools or None,
            chat_template_kwargs={**self._thinking_variables(), **(self.chat_template_kwargs or {})},
            add_generation_prompt=not chat.is_open,
            continue_final_message=chat.is_open,
            model=self.model,
            request_id=request_id,
        )

    def _thinking_variables(self) -> dict[str, Any]:
        """Left out, the template's own default holds: a model that always thinks would otherwise be told to think nothing."""
        effort = self.output_config.effort if self.output_config else None
        if self.thinking is None:
            return effort_variables(effort)
        if self.thinking.type == "disabled":
            return effort_variables("none")
        return {"enable_thinking": True, "thinking": True, **effort_variables(effort)}


class MessagesRequest(CountTokensRequest):
    max_tokens: int = number(1, default=..., text="More than the context leaves is what it leaves.")
    temperature: float | None = number(0)
    top_p: float | None = number(0, 1)
    top_k: int | None = number(-1)
    seed: int | None = None
    stop_sequences: Many[str] | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    priority: int | None = Field(default=None, description="Lower runs first.")
    timeout: float | None = Field(default=None, description="Seconds by which the reply must be complete.")
    cache_salt: str | None = Field(default=None, description="Cached pages are shared only under the same salt.")

    def params(self) -> dict[str, Any]:
        """Sampling parameters that were named."""
        names = ("max_tokens", "temperature", "top_p", "top_k", "seed")
        given: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.stop_sequences:
            given["stop"] = self.stop_sequences
        form = self.output_format or (self.output_config.format if self.output_config else None)
        if form is not None:
            given["structured_outputs"] = StructuredOutputs(json=form.schema_)
        return given

    def to_input(self, request_id: str) -> GenerateInput:
        given = super().to_input(request_id)
        more = {"priority": self.priority or 0, "timeout_s": self.timeout, "cache_salt": self.cache_salt}
        return dataclasses.replace(given, clip_max_tokens=True, whole=not self.stream, **more)


class MessageUsage(ApiReply):
    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class MessageReply(ApiReply):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage


class CountTokensReply(ApiReply):
    input_tokens: int


class MessagesErrorInfo(ApiReply):
    type: str
    message: str


class MessagesErrorReply(ApiReply):
    type: Literal["error"] = "error"
    error: MessagesErrorInfo
    request_id: str | None = None
