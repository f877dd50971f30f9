"""/api/chat, /api/generate, /api/embed, /api/embeddings, /api/show. https://docs.ollama.com/api

What loads and places a model (`num_ctx`, `num_gpu`, ...) is the server's affair here: it is taken and changes nothing.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from serving.engine.api.sampling_params import MAX_LOGPROBS, StructuredOutputs
from serving.errors import invalid
from serving.frontends.http.models import LEAVE, ApiBody, ApiReply, ApiRequest, Many, Refused, number
from serving.frontends.ollama.messages import as_messages
from serving.service import ChatOptions
from serving.service.requests.inputs import GenerateInput, effort_variables

LATEST = ":latest"
OPTIONS_REFUSED: Refused = {
    "mirostat": ((0,), LEAVE),
    "typical_p": ((1, 1.0), LEAVE),
    "tfs_z": ((1, 1.0), LEAVE),
}
NO_TEMPLATE = "the server's own is used; --chat-template sets it."
GENERATE_REFUSED: Refused = {
    "template": (("",), NO_TEMPLATE),
    "suffix": (("",), "this server completes text at its end only."),
    "context": (([],), "send the conversation to /api/chat."),
}
KeepAlive = str | float | int


class Options(ApiBody):
    """How tokens are chosen. Left out: the model's own defaults. `num_ctx` is the server's, `repeat_last_n` is the whole text."""

    REFUSED: ClassVar[Refused] = OPTIONS_REFUSED

    num_predict: int | None = Field(
        default=None, description="Tokens at most; below 1: as many as the context has room for."
    )
    temperature: float | None = number(0)
    top_k: int | None = number(-1)
    top_p: float | None = number(0, 1)
    min_p: float | None = number(0, 1)
    seed: int | None = None
    stop: str | Many[str] | None = None
    repeat_penalty: float | None = number(0)
    presence_penalty: float | None = number(-2, 2)
    frequency_penalty: float | None = number(-2, 2)

    def sampling(self) -> dict[str, Any]:
        """As `TextService.make_params` takes them."""
        names = ("temperature", "top_k", "top_p", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty")
        given: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.repeat_penalty is not None:
            given["repetition_penalty"] = self.repeat_penalty
        if self.num_predict is not None and self.num_predict > 0:
            given["max_tokens"] = self.num_predict
        return given


class GenerationFields(ApiBody):
    """What chats and completions share."""

    model: str
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: Options | None = None
    stream: bool | None = Field(default=None, description="Left out: true.")
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    keep_alive: KeepAlive | None = Field(
        default=None,
        description="How long the model stays behind its last request, where several share the server; the only one stays.",
    )
    truncate: bool | None = Field(default=None, description="Cut a conversation that is too long at its beginning.")
    shift: bool | None = Field(default=None, description="Accepted and ignored: a completion ends with the context.")
    logprobs: bool | None = None
    top_logprobs: int | None = number(0, MAX_LOGPROBS)
    priority: int | None = Field(default=None, description="Lower runs first.")
    timeout: float | None = Field(default=None, description="Seconds by which the reply must be complete.")

    @property
    def streams(self) -> bool:
        return self.stream is not False

    def names(self) -> dict[str, str]:
        own = {
            "max_tokens": "num_predict", "repetition_penalty": "repeat_penalty",
            **{name: name for name in ("temperature", "top_k", "top_p", "min_p", "seed", "stop", "presence_penalty",
                                       "frequency_penalty")},
        }  # fmt: skip
        logprobs = "top_logprobs" if self.top_logprobs is not None else "logprobs"
        return {
            **{ours: f"options.{theirs}" for ours, theirs in own.items()},
            "structured_outputs": "format", "logprobs": logprobs, "truncate_prompt_tokens": "truncate",
        }  # fmt: skip

    def params(self) -> dict[str, Any]:
        """Sampling parameters that were named. Raises RequestError naming the field at fault."""
        given = self.options.sampling() if self.options is not None else {}
        if self.format == "json":
            given["structured_outputs"] = StructuredOutputs(json_object=True)
        elif self.format:
            given["structured_outputs"] = StructuredOutputs(json=self.format)
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs needs logprobs: true.", "top_logprobs")
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        return given

    def chat_options(self) -> ChatOptions:
        return ChatOptions(include_reasoning=self.think is not False)

    def input_fields(self, request_id: str) -> dict[str, Any]:
        """What any of the service's requests gets of it."""
        return {
            "model": model_name(self.model),
            "request_id": request_id,
            "clip_max_tokens": True,
            "truncate_prompt_tokens": -1 if self.truncate else None,
            "priority": self.priority or 0,
            "timeout_s": self.timeout,
            "whole": not self.streams,
        }

    def thinking_variables(self) -> dict[str, Any]:
        if self.think is None:
            return {}
        if isinstance(self.think, bool):
            return {"enable_thinking": True, "thinking": True} if self.think else effort_variables("none")
        return {"enable_thinking": True, "thinking": True, **effort_variables(self.think)}


class ChatBody(GenerationFields):
    messages: Many[dict[str, Any]] | None = Field(
        default=None, description="Left out or empty: the model is loaded, which it is here."
    )
    tools: Many[dict[str, Any]] | None = None

    def to_input(self, request_id: str) -> GenerateInput:
        """The service's request. Raises RequestError naming the message."""
        return GenerateInput(
            messages=as_messages(self.messages or ()),
            tools=self.tools or None,
            chat_template_kwargs=self.thinking_variables(),
            **self.input_fields(request_id),
        )


class GenerateBody(GenerationFields):
    REFUSED: ClassVar[Refused] = GENERATE_REFUSED

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = Field(default=None, description="The prompt as it is, without the model's chat template.")
    images: Many[str] | None = None

    def to_input(self, request_id: str, has_template: bool) -> GenerateInput:
        """The service's request: a chat of one turn, or the text alone."""
        fields = self.input_fields(request_id)
        if self.raw or not has_template:
            if self.images:
                raise invalid("images need the model's chat template: leave raw out.", "images")
            return GenerateInput(text="\n".join(filter(None, (self.system, self.prompt))), **fields)
        system = [{"role": "system", "content": self.system}] if self.system else []
        said = {"role": "user", "content": self.prompt or "", "images": self.images}
        variables = self.thinking_variables()
        return GenerateInput(messages=as_messages([*system, said]), chat_template_kwargs=variables, **fields)

    def names(self) -> dict[str, str]:
        return {**super().names(), "messages": "prompt"}


class EmbedBody(ApiBody):
    model: str
    input: str | Many[str]
    truncate: bool | None = Field(default=None, description="Left out: true.")
    dimensions: int | None = number(1)
    options: dict[str, Any] | None = Field(default=None, description="Accepted and ignored.")
    keep_alive: KeepAlive | None = Field(default=None, description="Accepted and ignored.")

    def names(self) -> dict[str, str]:
        return {"prompt": "input", "truncate_prompt_tokens": "truncate"}


class EmbeddingsBody(ApiBody):
    """The older form, of one text."""

    model: str
    prompt: str
    options: dict[str, Any] | None = Field(default=None, description="Accepted and ignored.")
    keep_alive: KeepAlive | None = Field(default=None, description="Accepted and ignored.")


class NamedModel(ApiRequest):
    """A model, by the newer or the older name of the field."""

    model: str | None = None
    name: str | None = None


def model_name(asked: str | None) -> str | None:
    """The served model's name for one of Ollama's: without the tag that stands for none."""
    return asked.removesuffix(LATEST) if asked else asked


class GenerationReply(ApiReply):
    """One object, or the last of a stream; the others have their text alone. Durations are in nanoseconds."""

    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load", "unload"] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None


class OllamaChatReply(GenerationReply):
    message: dict[str, Any]


class GenerateReply(GenerationReply):
    response: str
    thinking: str | None = None


class EmbedReply(ApiReply):
    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class EmbeddingsReply(ApiReply):
    embedding: list[float]


class OllamaModels(ApiReply):
    models: list[dict[str, Any]]


class ModelReply(ApiReply):
    details: dict[str, Any]
    model_info: dict[str, Any]
    capabilities: list[str]
    template: str
    modified_at: str


class OllamaErrorReply(ApiReply):
    error: str
