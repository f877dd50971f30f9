"""/v1/embeddings. https://platform.openai.com/docs/api-reference/embeddings"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from serving.errors import invalid
from serving.frontends.http.models import LEAVE, ApiBody, ApiReply, Many, Refused, number
from serving.frontends.openai.protocol.chat import MESSAGE_SCHEMA
from serving.frontends.openai.protocol.common import UsageReply

EMBEDDINGS_REFUSED: Refused = {
    "normalize": ((True,), "embeddings have length 1 here."),
    "use_activation": ((True,), "embeddings have length 1 here."),
    "embed_dtype": (("float32", "float"), "base64 holds float32 here."),
    "output_dtype": (("float32", "float"), "base64 holds float32 here."),
    "endianness": (("native", "little"), "base64 holds little-endian numbers here."),
    "padding": ((False,), "no text is padded here."),
    "late_chunking": ((False,), LEAVE),
    "prompt_embeds": ((), "send text or token ids."),
    "chat_template": ((), "the server's own is used; --chat-template sets it."),
}


class EmbeddingRequest(ApiBody):
    REFUSED: ClassVar[Refused] = EMBEDDINGS_REFUSED

    model: str | None = None
    input: str | Many[str] | Many[int] | Many[Many[int]] | None = Field(
        default=None, description="Text, several texts, token ids, or several lists of token ids."
    )
    messages: Many[dict[str, Any]] | None = Field(
        default=None, description="A chat instead of input.", json_schema_extra={"items": MESSAGE_SCHEMA}
    )
    add_generation_prompt: bool | None = Field(default=None, description="For messages; left out: no.")
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = number(1, text="Keep only the first so many numbers, then scale to length 1.")
    pooling: Literal["last", "mean", "cls"] | None = Field(default=None, description="Left out: the model's own.")
    prompt_name: str | None = Field(
        default=None,
        description="Which prompt of the model's authors goes in front of texts; left out: their default one.",
    )
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = Field(
        default=None,
        description="Which end is cut off then; left out: the left one for decoders, the right for encoders.",
    )
    priority: int | None = None
    request_id: str | None = None
    user: str | None = Field(default=None, description="Accepted and ignored.")

    def inputs(self) -> list[Any]:
        """Texts, lists of token ids, or the chat alone.

        Raises:
            RequestError: INVALID_ARGUMENT when there is none.
        """
        if (self.input is None) == (self.messages is None):
            raise invalid("Missing required parameter: 'input' (or 'messages', a chat instead).", "input")
        if self.messages is not None:
            return [self.messages]
        if isinstance(self.input, str):
            return [self.input]
        if not self.input:
            raise invalid("input is empty: give text or token ids.", "input")
        return [self.input] if isinstance(self.input[0], int) else list(self.input)

    def names(self) -> dict[str, str]:
        return {"prompt": "input"} if self.messages is None else {}


class EmbeddingData(ApiReply):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingReply(ApiReply):
    object: Literal["list"] = "list"
    data: list[EmbeddingData]
    model: str
    usage: UsageReply
