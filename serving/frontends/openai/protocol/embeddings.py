"""/v1/embeddings. https://platform.openai.com/docs/api-reference/embeddings"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from serving.frontends.http.models import LEAVE, ApiReply, Refused, number
from serving.frontends.openai.protocol.common import UsageReply
from serving.frontends.openai.protocol.reading import ReadingRequest

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


class EmbeddingRequest(ReadingRequest):
    REFUSED: ClassVar[Refused] = EMBEDDINGS_REFUSED

    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = number(1, text="Keep only the first so many numbers, then scale to length 1.")
    pooling: Literal["last", "mean", "cls"] | None = Field(default=None, description="Left out: the model's own.")
    prompt_name: str | None = Field(
        default=None,
        description="Which prompt of the model's authors goes in front of texts; left out: their default one.",
    )


class EmbeddingData(ApiReply):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingReply(ApiReply):
    object: Literal["list"] = "list"
    data: list[EmbeddingData]
    model: str
    usage: UsageReply
