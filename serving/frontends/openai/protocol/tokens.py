"""/tokenize, /detokenize, /tokenizer_info: vLLM's extras."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from serving.frontends.http.models import ApiBody, ApiReply, Many, Refused
from serving.frontends.openai.protocol.chat import MESSAGE_SCHEMA, Tool

TOKENIZE_REFUSED: Refused = {"chat_template": ((), "the server's own is used; --chat-template sets it.")}


class TokenizeRequest(ApiBody):
    """A text in `prompt`, or a chat in `messages`."""

    REFUSED: ClassVar[Refused] = TOKENIZE_REFUSED

    model: str | None = None
    prompt: str | None = None
    messages: Many[dict[str, Any]] | None = Field(default=None, json_schema_extra={"items": MESSAGE_SCHEMA})
    tools: Many[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = Field(
        default=None, description="Left out: yes, but for continue_final_message."
    )
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeReply(ApiReply):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(ApiBody):
    model: str | None = None
    tokens: Many[int]

    def names(self) -> dict[str, str]:
        return {"token_ids": "tokens"}


class DetokenizeReply(ApiReply):
    prompt: str


class TokenizerInfo(ApiReply):
    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    chat_template: str | None = None
