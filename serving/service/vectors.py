"""Texts to vectors and scores: what an embedding or a score reads, and scores of models that only embed."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from serving.engine.api.types import EngineInfo, TokenPair
from serving.errors import beyond_context, invalid
from serving.service.replies.outputs import Embedding, Scores
from serving.service.requests.inputs import GenerateInput, check_prompt_text
from serving.service.requests.limits import Limits
from serving.service.requests.prepare import check_token_ids, cut, render_and_encode

if TYPE_CHECKING:
    from serving.engine.api.client import EmbeddingClient
    from serving.service.voice import Voice
    from serving.text.tokenizer import Tokenizer

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ScoreInput:
    """Pairs of texts to score.

    Attributes:
        pairs: (first, second) each; or, from another of our servers, token pairs as they are.
        truncate_prompt_tokens: keep only so many tokens of what is read at once: a pair for models that read pairs, a text
            for others; -1 keeps what fits the context; None refuses what is longer.
        model, request_id, priority: as in `GenerateInput`.
    """

    pairs: Sequence[tuple[str, str] | TokenPair]
    truncate_prompt_tokens: int | None = None
    model: str | None = None
    request_id: str | None = None
    priority: int = 0

    def check(self, limits: Limits) -> None:
        """Checks everything that needs no model.

        Raises:
            RequestError: INVALID_ARGUMENT naming the field.
        """
        if not self.pairs:
            raise invalid("There is nothing to score: give at least one pair of texts.", "pairs")
        limits.check_count("pairs", len(self.pairs), limits.max_batch, "pairs")
        for i, pair in enumerate(self.pairs):
            if not isinstance(pair, TokenPair):
                for side, text in zip(("first", "second"), pair, strict=True):
                    check_prompt_text(text, limits, f"pairs[{i}].{side}")
        # The rest is what any prompt has, the text aside.
        GenerateInput(
            text="-",
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            model=self.model,
            request_id=self.request_id,
            priority=self.priority,
        ).check(limits)


def prompted(given: GenerateInput, info: EngineInfo, name: str | None) -> GenerateInput:
    """What is to be embedded with a prompt of the model's authors in front; token ids and chats stay as they are.

    Raises:
        RequestError: INVALID_ARGUMENT: the model has no prompt of that name.
    """
    prompts = dict(info.prompts)
    if name is not None and name not in prompts:
        known = f"it has {', '.join(map(repr, prompts))}" if prompts else "it has none"
        raise invalid(f"The model has no prompt named {name!r}: {known}.", "prompt_name")
    text = info.default_prompt if name is None else prompts[name]
    return dataclasses.replace(given, text=text + given.text) if text and given.text is not None else given


def encode(given: GenerateInput, voice: Voice, limits: Limits, info: EngineInfo) -> tuple[str | None, tuple[int, ...]]:
    """What an embedding reads: the prompt as text (None for token ids) and as ids, cut where asked for.

    Control tokens written in a text are text: what is embedded is data. A decoder keeps the end of what is cut, whose
    last token sums it up; an encoder the beginning, with its special tokens.

    Raises:
        RequestError: INVALID_ARGUMENT: no tokens, an id outside the vocabulary, or more tokens than the context has.
    """
    keep = given.truncate_prompt_tokens
    most = info.max_model_len if keep == -1 else keep
    encoder = "generate" not in info.tasks
    side = given.truncation_side or ("right" if encoder else "left")
    if given.text is not None and given.add_special_tokens is not False:
        prompt: str | None = given.text
        ids: Sequence[int] = voice.tokenizer.encode_pair(
            given.text, None, most if encoder and side == "right" else None
        )[0]
    else:
        prompt, ids = render_and_encode(given, voice.tokenizer, voice.chat_template, limits)
    check_token_ids(ids, info.vocab_size)
    if most is not None:
        ids = cut(ids, most, side)
    if len(ids) > (limits.max_embed_len or 0):
        check_fits(len(ids), info, given.place)
    return prompt, tuple(ids)


def pieces(ids: Sequence[int], tokenizer: Tokenizer, context: int) -> list[tuple[int, ...]]:
    """A text's token ids, cut into pieces that fit the context, each with the special tokens that stand around the whole."""
    if len(ids) <= context:
        return [tuple(ids)]
    before = tuple(ids[:1]) if tokenizer.is_special(ids[0]) else ()
    after = tuple(ids[-1:]) if tokenizer.is_special(ids[-1]) else ()
    inside = ids[len(before) : len(ids) - len(after)]
    size = context - len(before) - len(after)
    return [(*before, *inside[at : at + size], *after) for at in range(0, len(inside), size)]


async def embed_pieces(
    embedder: EmbeddingClient, request_id: str, parts: Sequence[Sequence[int]], **options: Any
) -> np.ndarray:
    """The vector of a text that is embedded in pieces, as `joined` puts them together."""
    work = [embedder.embed(f"{request_id}.{i}" if i else request_id, part, **options) for i, part in enumerate(parts)]
    return joined(await together(work), parts)


def joined(vectors: Sequence[np.ndarray], parts: Sequence[Sequence[int]]) -> np.ndarray:
    """The pieces' vectors as one: their mean, weighted by their tokens, at length 1."""
    if len(vectors) == 1:
        return vectors[0]
    mean = np.average(np.stack(vectors), axis=0, weights=[len(part) for part in parts])
    return (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32)


def encode_pairs(given: ScoreInput, tokenizer: Tokenizer, info: EngineInfo) -> list[TokenPair]:
    """What a cross-encoder reads.

    Raises:
        RequestError: INVALID_ARGUMENT, as `encode`.
    """
    keep = given.truncate_prompt_tokens
    most = info.max_model_len if keep == -1 else keep
    made = []
    for pair in given.pairs:
        if not isinstance(pair, TokenPair):
            ids, segments = tokenizer.encode_pair(*pair, max_tokens=most)
            pair = TokenPair(tuple(ids), tuple(segments))
        check_token_ids(pair.token_ids, info.vocab_size)
        if len(pair.segment_ids) != len(pair.token_ids):
            raise invalid(
                f"A pair has {len(pair.token_ids)} token ids and {len(pair.segment_ids)} segment ids; give one each.",
                "pairs",
            )
        if not {0, 1}.issuperset(pair.segment_ids):
            wrong = next(one for one in pair.segment_ids if one not in (0, 1))
            raise invalid(f"A pair has the segment id {wrong}; 0 is its first text, 1 its second.", "pairs")
        check_fits(len(pair.token_ids), info, "pairs")
        made.append(pair)
    return made


async def score_by_cosine(
    embed: Callable[[GenerateInput], Coroutine[Any, Any, Embedding]], given: ScoreInput
) -> Scores:
    """Scores by the cosine of two texts' embeddings, -1 to 1; each text is embedded once.

    Raises:
        RequestError: as `embed`; INVALID_ARGUMENT for token pairs, which only a model that reads pairs takes.
    """
    pairs: list[tuple[str, str]] = []
    for pair in given.pairs:
        if isinstance(pair, TokenPair):
            raise invalid("This model embeds single texts: give pairs of texts, not of tokens.", "pairs")
        pairs.append(pair)
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    found = await together(
        [
            embed(
                GenerateInput(
                    text=text,
                    truncate_prompt_tokens=given.truncate_prompt_tokens,
                    model=given.model,
                    request_id=given.request_id,
                    priority=given.priority,
                )
            )
            for text in texts
        ]
    )
    vectors = {text: one.vector for text, one in zip(texts, found, strict=True)}
    scores = tuple(float(np.dot(vectors[first], vectors[second])) for first, second in pairs)
    return Scores(scores, sum(len(one.prompt_token_ids) for one in found))


def shortened(vector: np.ndarray, dimensions: int | None) -> np.ndarray:
    """The first `dimensions` numbers, scaled back to length 1 (Matryoshka embeddings, Kusupati et al. 2022); None for all.

    Returns:
        float32.
    Raises:
        RequestError: INVALID_ARGUMENT: more numbers than the vector has, or none.
    """
    vector = np.asarray(vector, np.float32)
    if dimensions is None:
        return vector
    if not 1 <= dimensions <= len(vector):
        raise invalid(f"dimensions must be between 1 and {len(vector)} for this model, got {dimensions}.", "dimensions")
    vector = vector[:dimensions]
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


async def together(work: Sequence[Awaitable[T]]) -> list[T]:
    """The results of all, in their order. The first failure, or a cancellation, ends the others."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))  # not a TaskGroup: the first failure is to come out as itself
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def check_fits(length: int, info: EngineInfo, place: str) -> None:
    if length > info.max_model_len:
        raise beyond_context(
            info.max_model_len,
            f"your {place} resulted in {length} tokens",
            place,
            f"{place} or set truncate_prompt_tokens",
        )
