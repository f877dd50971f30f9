"""/pooling (vLLM's), /v2/embed (Cohere's). https://docs.cohere.com/reference/embed"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from serving.errors import invalid
from serving.frontends.http.models import LEAVE, ApiBody, ApiReply, Many, Refused
from serving.frontends.openai.protocol.common import UsageReply
from serving.frontends.openai.protocol.embeddings import EmbeddingRequest

COHERE_REFUSED: Refused = {"images": (([],), "this model reads text."), "max_tokens": ((), LEAVE)}
SIDES = {"START": "left", "END": "right"}


class CohereEmbedRequest(ApiBody):
    """Texts to embed. `input_type` is taken and changes nothing: the model has no prompts of its own for it."""

    REFUSED: ClassVar[Refused] = COHERE_REFUSED

    model: str | None = None
    texts: Many[str] | None = None
    inputs: Many[dict[str, Any]] | None = None
    input_type: str | None = None
    embedding_types: Many[Literal["float", "base64", "binary", "ubinary"]] | None = None
    output_dimension: int | None = None
    truncate: Literal["NONE", "START", "END"] | None = None
    priority: int | None = None

    def as_embeddings(self) -> EmbeddingRequest:
        """The same in OpenAI's shape.

        Raises:
            RequestError: INVALID_ARGUMENT about the texts.
        """
        if (self.texts is None) == (self.inputs is None):
            raise invalid("Missing required parameter: 'texts' (or 'inputs').", "texts")
        texts = self.texts if self.texts is not None else [_text(one, i) for i, one in enumerate(self.inputs or ())]
        side = SIDES.get(self.truncate or "END")
        return EmbeddingRequest(
            model=self.model,
            input=texts,
            dimensions=self.output_dimension,
            truncate_prompt_tokens=-1 if side else None,
            truncation_side=side,  # type: ignore[arg-type]
            priority=self.priority,
        )

    def names(self) -> dict[str, str]:
        place = "texts" if self.texts is not None else "inputs"
        return {"prompt": place, "input": place, "dimensions": "output_dimension", "truncate_prompt_tokens": "truncate"}


def _text(one: dict[str, Any], i: int) -> str:
    parts = one.get("content")
    if isinstance(parts, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
        return "\n".join(part["text"] for part in parts)
    raise invalid(f"inputs[{i}].content must be a list of text parts.", f"inputs[{i}].content")


class CohereEmbedReply(ApiReply):
    id: str
    embeddings: dict[str, list[Any]]
    texts: list[str]
    meta: dict[str, Any]


class PoolingData(ApiReply):
    object: Literal["pooling"] = "pooling"
    index: int
    data: list[float] | str


class PoolingReply(ApiReply):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[PoolingData]
    usage: UsageReply
