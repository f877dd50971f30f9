"""/v1/embeddings. https://platform.openai.com/docs/api-reference/embeddings"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from serving.frontends.openai.protocol.common import ApiReply, ApiRequest, UsageReply, number


class EmbeddingRequest(ApiRequest):
    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]] = Field(
        description="Text, several texts, token ids, or several lists of token ids."
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = number(1, text="Keep only the first so many numbers, then scale to length 1.")
    pooling: Literal["last", "mean", "cls"] | None = Field(default=None, description="Left out: the model's own.")
    truncate_prompt_tokens: int | None = None
    priority: int | None = None
    user: str | None = Field(default=None, description="Accepted and ignored.")


class EmbeddingData(ApiReply):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingReply(ApiReply):
    object: Literal["list"] = "list"
    data: list[EmbeddingData]
    model: str
    usage: UsageReply
