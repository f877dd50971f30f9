"""/score and /rerank: vLLM's shapes, which are Jina's and Cohere's too.

https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html#score-api , https://jina.ai/reranker ,
https://docs.cohere.com/reference/rerank
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from serving.errors import invalid
from serving.frontends.http.models import LEAVE, ApiBody, ApiReply, ApiRequest, Many, Refused, number
from serving.frontends.openai.protocol.common import UsageReply

Texts = str | Many[str]
SCORES_REFUSED: Refused = {
    "use_activation": ((True,), LEAVE),
    "activation": ((True,), LEAVE),
    "raw_scores": ((False,), LEAVE),
    "return_raw_scores": ((False,), LEAVE),
    "rank_fields": (([],), "join the fields of a document yourself."),
    "max_tokens_per_doc": ((), "use truncate_prompt_tokens."),
    "max_chunks_per_doc": ((), "use truncate_prompt_tokens."),
    "instruction": (("",), "put it in front of the query yourself."),
}
_FIRST = ("text_1", "queries", "data_1")
_SECOND = ("text_2", "documents", "items", "data_2")
_EITHER = "One text, or several."


class PairFields(ApiBody):
    """What both requests may say beside their texts."""

    REFUSED: ClassVar[Refused] = SCORES_REFUSED

    model: str | None = None
    truncate_prompt_tokens: int | None = Field(
        default=None, description="Keep so many tokens of a pair (of a text, where the model reads texts one by one)."
    )
    priority: int | None = None
    request_id: str | None = None
    user: str | None = Field(default=None, description="Accepted and ignored.")

    @property
    def keep(self) -> int | None:
        """Tokens of a pair to keep."""
        return self.truncate_prompt_tokens

    def pair_names(self, count: int) -> dict[str, str]:
        """The service's names of `count` pairs' texts -> those that this client used."""
        raise NotImplementedError


class ScoreRequest(PairFields):
    """One text against one or several, or as many against as many, in the names of any of vLLM's forms."""

    text_1: Texts | None = Field(default=None, description=_EITHER)
    text_2: Texts | None = Field(default=None, description=_EITHER)
    queries: Texts | None = Field(default=None, description="Another name of text_1.")
    documents: Texts | None = Field(default=None, description="Another name of text_2.")
    items: Texts | None = Field(default=None, description="Another name of text_2.")
    data_1: Texts | None = Field(default=None, description="Another name of text_1.")
    data_2: Texts | None = Field(default=None, description="Another name of text_2.")

    def pairs(self) -> list[tuple[str, str]]:
        """The pairs to score. Raises RequestError naming the field at fault."""
        first, second = self._texts(_FIRST), self._texts(_SECOND)
        if len(first) == 1:
            first = first * len(second)
        if len(first) != len(second):
            raise invalid(
                f"text_1 has {len(first)} texts and text_2 {len(second)}: give one text in text_1, or as many as in text_2.",
                "text_1",
            )
        return list(zip(first, second, strict=True))

    def pair_names(self, count: int) -> dict[str, str]:
        first, second = (
            next((n for n in names if getattr(self, n) is not None), names[0]) for names in (_FIRST, _SECOND)
        )
        return {
            "pairs": second,
            **{f"pairs[{i}].first": self._place(first, i) for i in range(count)},
            **{f"pairs[{i}].second": self._place(second, i) for i in range(count)},
        }

    def _place(self, name: str, i: int) -> str:
        texts = getattr(self, name)
        return f"{name}[{i if len(texts) > 1 else 0}]" if isinstance(texts, list) else name

    def _texts(self, names: tuple[str, ...]) -> list[str]:
        given: list[Any] = [value for name in names if (value := getattr(self, name)) is not None]
        if len(given) != 1:
            raise invalid(f"Give the texts once, as {names[0]} ({' or '.join(names[1:])} are other names).", names[0])
        texts = [given[0]] if isinstance(given[0], str) else given[0]
        if not texts:
            raise invalid(f"{names[0]} is empty: give at least one text.", names[0])
        return texts


class RerankDocument(ApiRequest):
    text: str


class RerankRequest(PairFields):
    """Documents to order by how relevant they are to a query."""

    query: str
    documents: Many[str | RerankDocument] | None = Field(default=None, json_schema_extra={"minItems": 1})
    texts: Many[str] | None = Field(
        default=None, description="Text Embeddings Inference's name; its reply is a list then."
    )
    return_text: bool | None = Field(default=None, description="With texts: tell them too.")
    truncate: bool | None = Field(default=None, description="With texts: cut what is too long.")
    top_n: int | None = number(0, text="Tell only the best so many; left out or 0: all.")
    return_documents: bool | None = Field(default=None, description="false leaves the texts out of the reply.")

    def pair_names(self, count: int) -> dict[str, str]:
        return {
            "pairs": self._place,
            **{f"pairs[{i}].first": "query" for i in range(count)},
            **{f"pairs[{i}].second": f"{self._place}[{i}]" for i in range(count)},
        }

    @property
    def _place(self) -> str:
        return "documents" if self.texts is None else "texts"

    @property
    def keep(self) -> int | None:
        """Tokens of a pair to keep."""
        return -1 if self.truncate and self.truncate_prompt_tokens is None else self.truncate_prompt_tokens

    def candidates(self) -> list[str]:
        """The documents' texts. Raises RequestError when there are none, or `top_n` makes no sense."""
        if self.documents is None and self.texts is None:
            raise invalid("Missing required parameter: 'documents'.", "documents", "missing_required_parameter")
        if self.documents is not None and self.texts is not None:
            raise invalid("texts is another name of documents: give one of them.", "texts")
        given: list[Any] = list(self.documents if self.texts is None else self.texts)  # type: ignore[arg-type]
        if not given:
            raise invalid(f"{self._place} is empty: give at least one.", self._place)
        if self.top_n is not None and self.top_n < 0:
            raise invalid(f"top_n must be at least 0, got {self.top_n}.", "top_n")
        return [one if isinstance(one, str) else one.text for one in given]


class Score(ApiReply):
    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreReply(ApiReply):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: UsageReply


class RankedText(ApiReply):
    text: str


class Ranked(ApiReply):
    index: int
    document: RankedText | None = None
    relevance_score: float


class RerankReply(ApiReply):
    id: str
    model: str
    results: list[Ranked]
    usage: UsageReply
