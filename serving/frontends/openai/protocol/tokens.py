"""/tokenize, /detokenize, /tokenizer_info: vLLM's extras."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from serving.frontends.openai.protocol.chat import MESSAGE_SCHEMA, Tool
from serving.frontends.openai.protocol.common import ApiReply, ApiRequest


class TokenizeRequest(ApiRequest):
    """A text in `prompt`, or a chat in `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(default=None, json_schema_extra={"items": MESSAGE_SCHEMA})
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeReply(ApiReply):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(ApiRequest):
    model: str | None = None
    tokens: list[int]


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
