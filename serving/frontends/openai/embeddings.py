"""/v1/embeddings, over an engine that can pool."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serving.errors import invalid
from serving.frontends.openai.errors import RESPONSES
from serving.frontends.openai.protocol.embeddings import EmbeddingReply, EmbeddingRequest
from serving.frontends.openai.sse import unless_gone
from serving.service import Embedding, GenerateInput, TextService
from serving.service.vectors import shortened, together


def embeddings_router(service: TextService) -> APIRouter:
    """The embeddings endpoint over `service`."""
    router = APIRouter(tags=["embeddings"], responses=RESPONSES)

    @router.post("/v1/embeddings", response_model=EmbeddingReply)
    async def create(body: EmbeddingRequest, request: Request) -> Response:
        """Embeds one or more inputs, in order."""
        inputs = _inputs(body)
        service.limits.check_count("inputs", len(inputs), service.limits.max_batch, "input")
        found = await unless_gone(request, _embed(service, body, inputs, request.state.request_id))
        used = sum(len(one.prompt_token_ids) for one in found)
        return JSONResponse(
            {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": i, "embedding": _encoded(one.vector, body)}
                    for i, one in enumerate(found)
                ],
                "model": service.resolve_model(body.model),
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


async def _embed(service: TextService, body: EmbeddingRequest, inputs: list[Any], request_id: str) -> list[Embedding]:
    given = [
        GenerateInput(
            text=one if isinstance(one, str) else None,
            token_ids=None if isinstance(one, str) else one,
            truncate_prompt_tokens=body.truncate_prompt_tokens,
            model=body.model,
            request_id=request_id,
            priority=body.priority or 0,
        )
        for one in inputs
    ]
    return await together([service.embed(one, pooling=body.pooling) for one in given])


def _encoded(vector: np.ndarray, body: EmbeddingRequest) -> list[float] | str:
    """As numbers or little-endian base64."""
    vector = shortened(vector, body.dimensions)
    if body.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
