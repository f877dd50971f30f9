"""What several endpoints share: errors, usage, sampling fields, structured output."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from serving.engine.api.sampling_params import MAX_LOGPROBS, MAX_N, StructuredOutputs
from serving.errors import invalid
from serving.frontends.http.models import LEAVE, ApiBody, ApiReply, ApiRequest, Many, Refused, number
from serving.frontends.openai.protocol.kv_transfer import KVTransferParams
from serving.text.constraints.schema import prepare


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


class CompletionTokensDetails(ApiReply):
    """The last two where drafts were verified, speculative decoding's: OpenAI's names for tokens that were predicted."""

    reasoning_tokens: int = 0
    accepted_prediction_tokens: int | None = None
    rejected_prediction_tokens: int | None = None


class UsageReply(ApiReply):
    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None


class StreamOptions(ApiRequest):
    """`include_usage` adds a last chunk with token counts; `continuous_usage_stats` puts them into every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class StructuredOutputsBody(ApiBody):
    """vLLM's `structured_outputs`: exactly one field is set."""

    REFUSED: ClassVar[Refused] = dict.fromkeys(
        ("structural_tag", "whitespace_pattern", "disable_any_whitespace", "disable_additional_properties"),
        ((False,), "leave it out."),
    )
    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Many[str] | None = None
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
    schema_: dict[str, Any] | None = Field(
        default=None, alias="schema", description="With json_object: what the object must be, as other servers take it."
    )

    def to_service(self) -> StructuredOutputs | None:
        """The constraint it asks for, or None for plain text."""
        if self.type == "json_object":
            return StructuredOutputs(json_object=True) if self.schema_ is None else StructuredOutputs(json=self.schema_)
        if self.type == "json_schema":
            if self.json_schema is None or self.json_schema.schema_ is None:
                raise invalid(
                    "response_format of type json_schema needs json_schema.schema, a JSON schema.",
                    "response_format.json_schema",
                )
            schema = self.json_schema.schema_
            if self.json_schema.strict:  # OpenAI's strict schemas have no properties but those that they list
                schema = prepare(schema, "response_format.json_schema", closed=True)
            return StructuredOutputs(json=schema)
        return None


STRUCTURED = "use structured_outputs."
SAMPLING_REFUSED: Refused = {
    "use_beam_search": ((False,), "sample several completions with n instead."),
    "length_penalty": ((1, 1.0), LEAVE),
    "early_stopping": ((False,), LEAVE),
    "logits_processors": (([],), "use logit_bias, allowed_token_ids or bad_words."),
    "logprob_token_ids": (([],), "use logprobs."),
    "prompt_embeds": ((), "send text or token ids."),
    "repetition_detection": ((), LEAVE),
    "thinking_token_budget": ((), "limit the whole completion."),
    "return_prompt_text": ((False,), "use return_token_ids and /detokenize."),
    "vllm_xargs": (({},), LEAVE),
    "guided_whitespace_pattern": ((), LEAVE),
    "structural_tag": ((), STRUCTURED),
    "json_schema": ((), "use response_format or structured_outputs.json."),
    "regex": ((), "use structured_outputs.regex."),
    "ebnf": ((), "use structured_outputs.grammar."),
    "grammar": (("",), "use structured_outputs.grammar."),
    "typical_p": ((1, 1.0), LEAVE),
    "mirostat": ((0, False), LEAVE),
    "dry_multiplier": ((0, 0.0), LEAVE),
    "xtc_probability": ((0, 0.0), LEAVE),
    "top_n_sigma": ((0, 0.0, -1, -1.0), LEAVE),
    "dynatemp_range": ((0, 0.0), LEAVE),
}
"""Fields of OpenAI's, vLLM's, SGLang's and llama.cpp's servers that change which tokens come, and are not done here."""
GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
"""What older vLLM called `structured_outputs`."""


class SamplingFields(ApiBody):
    """Fields of chat and completions that say how tokens are chosen and when a completion ends."""

    REFUSED: ClassVar[Refused] = SAMPLING_REFUSED

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
    allowed_token_ids: Many[int] | None = None
    bad_words: Many[str] | None = None
    min_tokens: int | None = number(0)
    stop: str | Many[str] | None = None
    stop_token_ids: Many[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = number(0, MAX_LOGPROBS)
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    structured_outputs: StructuredOutputsBody | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = Field(default=None, description="Old name of structured_outputs.json.")
    guided_regex: str | None = Field(default=None, description="Old name of structured_outputs.regex.")
    guided_choice: Many[str] | None = Field(default=None, description="Old name of structured_outputs.choice.")
    guided_grammar: str | None = Field(default=None, description="Old name of structured_outputs.grammar.")

    priority: int | None = Field(default=None, description="Lower runs first.")
    request_id: str | None = None
    cache_salt: str | None = Field(default=None, description="Cached pages are shared only under the same salt.")
    kv_transfer_params: KVTransferParams | None = Field(
        default=None, description="Which part of it another server does; for servers with --role."
    )
    truncate_prompt_tokens: int | None = Field(
        default=None, description="Keep so many prompt tokens at most; -1: as many as fit beside the completion."
    )
    truncation_side: Literal["left", "right"] | None = Field(
        default=None, description="Which end is cut off then; left out: the left one."
    )
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
        given = self.structured_outputs
        guided = {new: value for old, new in GUIDED.items() if (value := getattr(self, old)) is not None}
        if guided and given is not None:
            raise invalid("guided_* and structured_outputs exclude each other: give one.", "structured_outputs")
        by_extra = (
            given.to_service()
            if given
            else StructuredOutputsBody.model_validate(guided).to_service()
            if guided
            else None
        )
        if by_format and by_extra:
            raise invalid("response_format and structured_outputs exclude each other: give one.", "structured_outputs")
        return by_format or by_extra

    def names(self) -> dict[str, str]:
        used = next((name for name in GUIDED if getattr(self, name) is not None), None)
        if used is None and self.structured_outputs is None and self.response_format is not None:
            used = "response_format"
        return {"structured_outputs": used} if used else {}

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

    def force_usage(self) -> None:
        """Asks for token counts at a stream's end, on the operator's behalf."""
        if self.stream:
            asked = self.stream_options or StreamOptions()
            self.stream_options = asked.model_copy(update={"include_usage": True})

    def check_stream_options(self) -> None:
        """OpenAI refuses stream_options without stream."""
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is only for stream: true.", "stream_options")
