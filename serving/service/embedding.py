"""One prompt's vector, with images in it where the model reads some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from serving.access.keys import caller_of_task
from serving.service import vectors
from serving.service.images import read_prompt
from serving.service.replies.outputs import Embedding
from serving.service.requests.prepare import check_token_ids

if TYPE_CHECKING:
    from serving.media.parts import Source
    from serving.service.requests.inputs import GenerateInput
    from serving.service.service import TextService


async def embed_one(
    service: TextService,
    given: GenerateInput,
    request_id: str,
    pooling: str | None = None,
    sources: Sequence[Source] = (),
) -> Embedding:
    """See `TextService.embed`, behind its checks.

    Args:
        given, sources: from `serving.service.images.take_images`.
        request_id: unique among live requests.
    Raises:
        RequestError: INVALID_ARGUMENT, or what the engine raises.
    """
    info, limits, embedder = service.info, service.limits, service.client.embedder
    assert embedder is not None  # whoever calls has looked
    adapter = service.adapters.find(given.model or "")
    voice = service.adapters.voice(adapter)
    own: dict[str, Any] = {} if adapter is None else {"adapter": adapter.digest}
    if sources:
        caller = caller_of_task.get()
        salt = caller.cache_salt(given.cache_salt) if caller else given.cache_salt
        prompt, found, media = await read_prompt(given, sources, voice, limits, service.threads, service.media, salt)
        check_token_ids(found, info.vocab_size)
        vectors.check_fits(len(found), info, given.place)
        ids, parts = tuple(found), [tuple(found)]
        own |= {} if media is None else {"media": media, "cache_salt": salt}
    else:
        prompt, ids = await service.threads.run(vectors.encode, given, voice, limits, info)
        parts = vectors.pieces(ids, voice.tokenizer, info.max_model_len)
    vector = await vectors.embed_pieces(embedder, request_id, parts, pooling=pooling, priority=given.priority, **own)
    return Embedding(request_id, prompt, ids, vector)
