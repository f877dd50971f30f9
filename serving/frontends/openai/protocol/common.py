"""What several endpoints share: base classes, errors, usage, sampling fields, structured output."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.engine.api.sampling_params import MAX_LOGPROBS, MAX_N, StructuredOutputs
from serving.errors import invalid


class ApiRequest(BaseModel):
    """A request body. Unknown fields are ignored, as OpenAI's server does; wrong types are refused, not converted."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, protected_namespaces=())


class ApiReply(BaseModel):
    """A reply body. Extras that were not asked for are left out of the JSON by the endpoints."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class ErrorInfo(ApiReply):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(ApiReply):
    """The body of every reply that is not a success."""

    error: ErrorInfo


class PromptTokensDetails(ApiReply):
    cached_tokens: int = 0


class UsageReply(ApiReply):
    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class StreamOptions(ApiRequest):
    """`include_usage` adds a last chunk with token counts; `continuous_usage_stats` puts them into every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class StructuredOutputsBody(ApiRequest):
    """vLLM's `structured_outputs`: exactly one field is set."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    def to_service(self) -> StructuredOutputs:
        """The engine's form. Raises RequestError unless exactly one field is set."""
        return StructuredOutputs(
            json=self.json_,
            json_object=self.json_object,
            regex=self.regex,
            choice=tuple(self.choice) if self.choice is not None else None,
            grammar=self.grammar,
        )


class JsonSchemaFormat(ApiRequest):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(ApiRequest):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def to_service(self) -> StructuredOutputs | None:
        """The constraint it asks for, or None for plain text."""
        if self.type == "json_object":
            return StructuredOutputs(json_object=True)
        if self.type == "json_schema":
            if self.json_schema is None or self.json_schema.schema_ is None:
                raise invalid(
                    "response_format of type json_schema needs json_schema.schema, a JSON schema.",
                    "response_format.json_schema",
                )
            return StructuredOutputs(json=self.json_schema.schema_)
        return None


def number(low: int | None = None, high: int | None = None, default: Any = None, text: str | None = None) -> Any:
    """A number whose range is told in the API document. It is checked, with better words, by SamplingParams."""
    extra: dict[str, Any] = {}
    if low is not None:
        extra["minimum"] = low
    if high is not None:
        extra["maximum"] = high
    return Field(default=default, description=text, json_schema_extra=extra or None)


class SamplingFields(ApiRequest):
    """Fields of chat and completions that say how tokens are chosen and when a completion ends."""

    n: int | None = number(1, MAX_N, text="Completions per prompt.")
    temperature: float | None = number(0, text="0 takes the likeliest token each time.")
    top_p: float | None = number(0, 1)
    top_k: int | None = number(-1, text="0 and -1 keep all tokens.")
    min_p: float | None = number(0, 1)
    seed: int | None = None
    repetition_penalty: float | None = number(0)
    presence_penalty: float | None = number(-2, 2)
    frequency_penalty: float | None = number(-2, 2)
    logit_bias: dict[str, float] | None = Field(default=None, description="Token id to bias, -100 to 100.")
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    min_tokens: int | None = number(0)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = number(0, MAX_LOGPROBS)
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    structured_outputs: StructuredOutputsBody | None = None
    response_format: ResponseFormat | None = None

    priority: int | None = Field(default=None, description="Lower runs first.")
    request_id: str | None = None
    cache_salt: str | None = Field(default=None, description="Cached pages are shared only under the same salt.")
    truncate_prompt_tokens: int | None = Field(default=None, description="Keep the last so many prompt tokens.")
    timeout: float | None = Field(default=None, description="Seconds by which the reply must be complete.")
    ttft_timeout: float | None = Field(default=None, description="Seconds by which the first token must be out.")
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = Field(
        default=None, description="Write tokens in logprobs as token_id:N, which cannot be ambiguous."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, description="Accepted and ignored.")

    _PLAIN: ClassVar[tuple[str, ...]] = (
        "n", "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "logit_bias", "allowed_token_ids", "bad_words", "min_tokens", "stop", "stop_token_ids",
        "include_stop_str_in_output", "ignore_eos", "prompt_logprobs", "skip_special_tokens",
        "spaces_between_special_tokens",
    )  # fmt: skip

    def constraint(self) -> StructuredOutputs | None:
        """What `response_format` or `structured_outputs` asks for; both at once is an error."""
        by_format = self.response_format.to_service() if self.response_format else None
        by_extra = self.structured_outputs.to_service() if self.structured_outputs else None
        if by_format and by_extra:
            raise invalid("response_format and structured_outputs exclude each other: give one.", "structured_outputs")
        return by_format or by_extra

    def sampling(self, **more: Any) -> dict[str, Any]:
        """The sampling parameters that the client named, for `TextService.make_params`; null counts as left out.

        Raises:
            RequestError: INVALID_ARGUMENT about the structured output.
        """
        given = {name: value for name in self._PLAIN if (value := getattr(self, name)) is not None}
        constraint = self.constraint()
        if constraint is not None:
            given["structured_outputs"] = constraint
        return {**given, **more}

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Only together with include_usage, as vLLM has it."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def check_stream_options(self) -> None:
        """OpenAI refuses stream_options without stream."""
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is only for stream: true.", "stream_options")
