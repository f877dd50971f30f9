"""/v1/embeddings, over an engine that can pool."""

from __future__ import annotations

import asyncio
import base64
from typing import Any, Protocol, cast

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serving.errors import ErrorKind, RequestError, invalid
from serving.frontends.openai.errors import RESPONSES
from serving.frontends.openai.protocol.embeddings import EmbeddingReply, EmbeddingRequest
from serving.frontends.openai.sse import unless_gone
from serving.service import GenerateInput, TextService


class Embedder(Protocol):
    """What an `EngineClient` has when its engine can pool hidden states. Optional: absent means 501."""

    async def embed(
        self, request_id: str, token_ids: tuple[int, ...], *, pooling: str | None = None, priority: int = 0
    ) -> np.ndarray:
        """One sequence's embedding.

        Args:
            token_ids: at least one id, each in [0, vocab).
            pooling: "last" or "mean" over the final hidden states after the last norm; None is the model's own.
        Returns:
            float32 [embed], of length 1.
        Raises:
            RequestError: RESOURCE_EXHAUSTED, UNAVAILABLE, UNIMPLEMENTED, INTERNAL.
        """
        ...


def embeddings_router(service: TextService) -> APIRouter:
    """The embeddings endpoint over `service`."""
    router = APIRouter(tags=["embeddings"], responses=RESPONSES)

    @router.post("/v1/embeddings", response_model=EmbeddingReply)
    async def create(body: EmbeddingRequest, request: Request) -> Response:
        """Embeds one or more inputs, in order."""
        service.check_ready()
        model = service.resolve_model(body.model)
        if not hasattr(service.client, "embed"):
            raise RequestError(ErrorKind.UNIMPLEMENTED, f"The served model {model!r} does not give embeddings.")
        inputs = _inputs(body)
        service.limits.check_count("inputs", len(inputs), service.limits.max_batch, "input")
        ids = [await _tokens(service, body, one) for one in inputs]
        vectors = await unless_gone(request, _embed(cast(Embedder, service.client), body, request, ids))
        used = sum(len(one) for one in ids)
        return JSONResponse(
            {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": i, "embedding": _encoded(vector, body)}
                    for i, vector in enumerate(vectors)
                ],
                "model": model,
                "usage": {"prompt_tokens": used, "total_tokens": used},
            }
        )

    return router


def _inputs(body: EmbeddingRequest) -> list[Any]:
    if isinstance(body.input, str):
        return [body.input]
    if not body.input:
        raise invalid("input is empty: give text or token ids.", "input")
    return [body.input] if isinstance(body.input[0], int) else list(body.input)


async def _tokens(service: TextService, body: EmbeddingRequest, one: str | list[int]) -> tuple[int, ...]:
    given = GenerateInput(text=one) if isinstance(one, str) else GenerateInput(token_ids=one)
    _, ids = await service.tokenize(given)
    limit, keep = service.info.max_model_len, body.truncate_prompt_tokens
    if keep is not None:
        if keep == 0 or keep < -1:
            raise invalid(f"truncate_prompt_tokens must be at least 1, or -1, got {keep}.", "truncate_prompt_tokens")
        ids = ids[-(limit if keep == -1 else keep) :]
    if not ids:
        raise invalid("input is empty: it has no tokens.", "input")
    if len(ids) > limit:
        raise invalid(f"An input has {len(ids)} tokens; this model takes {limit}. Shorten it.", "input")
    bad = next((i for i in ids if not 0 <= i < service.info.vocab_size), None)
    if bad is not None:
        raise invalid(f"Token id {bad} is not in the vocabulary of {service.info.vocab_size}.", "input")
    return tuple(ids)


async def _embed(
    client: Embedder, body: EmbeddingRequest, request: Request, ids: list[tuple[int, ...]]
) -> list[np.ndarray]:
    rid, priority = request.state.request_id, body.priority or 0
    tasks = [
        asyncio.create_task(client.embed(f"{rid}#e{i}", one, pooling=body.pooling, priority=priority))
        for i, one in enumerate(ids)
    ]
    try:
        return await asyncio.gather(*tasks)  # not a TaskGroup: the first failure is to come out as itself
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _encoded(vector: np.ndarray, body: EmbeddingRequest) -> list[float] | str:
    """Shortened to `dimensions` and scaled back to length 1 (Matryoshka), as numbers or little-endian base64."""
    vector = np.asarray(vector, np.float32)
    if body.dimensions is not None:
        if not 1 <= body.dimensions <= len(vector):
            raise invalid(
                f"dimensions must be between 1 and {len(vector)} for this model, got {body.dimensions}.", "dimensions"
            )
        vector = vector[: body.dimensions]
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
    if body.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
