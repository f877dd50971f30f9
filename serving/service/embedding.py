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
    from serving.engine.api.client import EngineClient
    from serving.media import MediaReader
    from serving.media.parts import Source
    from serving.service.requests.inputs import GenerateInput
    from serving.service.requests.limits import Limits
    from serving.service.threads import TextThreads
    from serving.service.voice import Voice


async def embed_one(
    client: EngineClient,
    given: GenerateInput,
    sources: Sequence[Source],
    request_id: str,
    voice: Voice,
    limits: Limits,
    threads: TextThreads,
    reader: MediaReader | None,
    **options: Any,
) -> Embedding:
    """See `TextService.embed`, behind its checks.

    Args:
        client: of an engine that embeds.
        given, sources: from `serving.service.images.take_images`.
        request_id: unique among live requests.
        options: as `EmbeddingClient.embed`.
    Raises:
        RequestError: INVALID_ARGUMENT, or what the engine raises.
    """
    info = client.info()
    assert client.embedder is not None  # whoever calls has looked
    if sources:
        caller = caller_of_task.get()
        salt = caller.cache_salt(given.cache_salt) if caller else given.cache_salt
        prompt, found, media = await read_prompt(given, sources, voice, limits, threads, reader, salt)
        check_token_ids(found, info.vocab_size)
        vectors.check_fits(len(found), info, given.place)
        ids, parts = tuple(found), [tuple(found)]
        options |= {} if media is None else {"media": media, "cache_salt": salt}
    else:
        prompt, ids = await threads.run(vectors.encode, given, voice, limits, info)
        parts = vectors.pieces(ids, voice.tokenizer, info.max_model_len)
    vector = await vectors.embed_pieces(client.embedder, request_id, parts, priority=given.priority, **options)
    return Embedding(request_id, prompt, ids, vector)
