"""/v1/completions. https://platform.openai.com/docs/api-reference/completions"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from serving.engine.api.sampling_params import MAX_LOGPROBS
from serving.errors import ErrorKind, RequestError, invalid
from serving.frontends.http.models import ApiReply, Many, number
from serving.frontends.openai.protocol.common import SamplingFields, UsageReply
from serving.service.requests.inputs import GenerateInput


class CompletionRequest(SamplingFields):
    model: str | None = None
    prompt: str | Many[str] | Many[int] | Many[Many[int]] = Field(
        description="Text, several texts, token ids, or several lists of token ids."
    )
    max_tokens: int | None = number(0, text="16 when left out; 0 only together with echo.")
    logprobs: int | None = number(0, MAX_LOGPROBS)
    echo: bool | None = None
    suffix: str | None = Field(default=None, description="Not supported.")
    best_of: int | None = Field(default=None, description="Only equal to n.")
    add_special_tokens: bool | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list, texts or token ids.

        Raises:
            RequestError: INVALID_ARGUMENT when there is none.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise invalid("prompt is empty: give text or token ids.", "prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item, return-value]
        return self.prompt  # type: ignore[return-value]

    @property
    def only_prompt(self) -> bool:
        """Nothing is to be generated: evaluation harnesses score the prompt with echo, logprobs and max_tokens 0."""
        return self.max_tokens == 0

    def params(self) -> dict[str, Any]:
        """Sampling parameters that were named. Raises RequestError naming the field at fault."""
        if self.suffix:
            raise RequestError(
                ErrorKind.INVALID_ARGUMENT,
                "suffix (fill in the middle) is not supported by this server: leave it out.",
                param="suffix",
            )
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise invalid(f"best_of is only supported equal to n ({self.n or 1}), got {self.best_of}.", "best_of")
        if self.max_tokens is not None and self.max_tokens < 0:
            raise invalid(f"max_tokens must be at least 0, got {self.max_tokens}.", "max_tokens")
        if self.only_prompt and not self.echo:
            raise invalid("max_tokens 0 generates nothing: it is only for echo: true.", "max_tokens")
        # OpenAI's default; and for 0 one token is made and dropped.
        more: dict[str, Any] = {"max_tokens": 16 if self.max_tokens is None else max(self.max_tokens, 1)}
        if self.logprobs is not None:
            more["logprobs"] = self.logprobs
            if self.echo and self.prompt_logprobs is None:
                more["prompt_logprobs"] = self.logprobs
        return self.sampling(**more)

    def to_input(self, prompt: str | list[int], request_id: str) -> GenerateInput:
        """The service's request for one of the prompts."""
        return GenerateInput(
            text=prompt if isinstance(prompt, str) else None,
            token_ids=None if isinstance(prompt, str) else prompt,
            add_special_tokens=self.add_special_tokens,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            truncation_side=self.truncation_side,
            model=self.model,
            request_id=self.request_id or request_id,
            priority=self.priority or 0,
            timeout_s=self.timeout,
            ttft_timeout_s=self.ttft_timeout,
            cache_salt=self.cache_salt,
            transfer=self.kv_transfer_params and self.kv_transfer_params.to_service(),
            whole=not self.stream,
        )


class CompletionLogprobs(ApiReply):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None] | None


class CompletionChoice(ApiReply):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length", "abort"]
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[Any] | None = None


class CompletionReply(ApiReply):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageReply
    system_fingerprint: str | None = None
    kv_transfer_params: dict[str, Any] | None = None
