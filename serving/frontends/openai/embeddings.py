"""/v1/embeddings, over an engine that can pool."""

from __future__ import annotations

import asyncio
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
    tasks = [
        asyncio.create_task(
            service.embed(
                GenerateInput(
                    text=one if isinstance(one, str) else None,
                    token_ids=None if isinstance(one, str) else one,
                    truncate_prompt_tokens=body.truncate_prompt_tokens,
                    model=body.model,
                    request_id=request_id,
                    priority=body.priority or 0,
                ),
                pooling=body.pooling,
            )
        )
        for one in inputs
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
