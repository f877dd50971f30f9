"""/v1/embeddings, over an engine that can pool."""

from __future__ import annotations

import base64
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from serving.errors import named
from serving.frontends.openai.bodies import body_of, takes
from serving.frontends.openai.errors import RESPONSES
from serving.frontends.openai.protocol.embeddings import EmbeddingReply, EmbeddingRequest
from serving.frontends.openai.sse import unless_gone
from serving.service import Embedding, GenerateInput, TextService
from serving.service.vectors import shortened, together


def embeddings_router(service: TextService) -> APIRouter:
    """The embeddings endpoint over `service`."""
    router = APIRouter(tags=["embeddings"], responses=RESPONSES)

    @router.post("/v1/embeddings", response_model=EmbeddingReply, openapi_extra=takes(EmbeddingRequest))
    async def create(
        body: Annotated[EmbeddingRequest, Depends(body_of(EmbeddingRequest))], request: Request
    ) -> Response:
        """Embeds one or more inputs, in order."""
        with named(body.names()):
            inputs = body.inputs()
            service.limits.check_count("inputs", len(inputs), service.limits.max_batch, "input")
            found = await unless_gone(request, _embed(service, body, inputs, request.state.request_id))
            data = [
                {"object": "embedding", "index": i, "embedding": _encoded(one.vector, body)}
                for i, one in enumerate(found)
            ]
        used = sum(len(one.prompt_token_ids) for one in found)
        usage = {"prompt_tokens": used, "total_tokens": used}
        model = service.resolve_model(body.model)
        return JSONResponse({"object": "list", "data": data, "model": model, "usage": usage})

    return router


async def _embed(service: TextService, body: EmbeddingRequest, inputs: list[Any], request_id: str) -> list[Embedding]:
    chat = body.messages is not None
    given = [
        GenerateInput(
            text=one if isinstance(one, str) else None,
            token_ids=None if chat or isinstance(one, str) else one,
            messages=body.messages,
            add_generation_prompt=bool(body.add_generation_prompt),
            continue_final_message=bool(body.continue_final_message),
            add_special_tokens=body.add_special_tokens,
            chat_template_kwargs=body.chat_template_kwargs or {},
            truncate_prompt_tokens=body.truncate_prompt_tokens,
            truncation_side=body.truncation_side,
            model=body.model,
            request_id=body.request_id or request_id,
            priority=body.priority or 0,
        )
        for one in inputs
    ]
    return await together([service.embed(one, pooling=body.pooling, prompt_name=body.prompt_name) for one in given])


def _encoded(vector: np.ndarray, body: EmbeddingRequest) -> list[float] | str:
    """As numbers or little-endian base64."""
    vector = shortened(vector, body.dimensions)
    if body.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
