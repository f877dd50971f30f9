"""/v1/embeddings, /pooling and /v2/embed, over an engine that can pool."""

from __future__ import annotations

import base64
import time
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from serving.errors import named
from serving.frontends.http.bodies import body_of, takes
from serving.frontends.http.models import ApiBody
from serving.frontends.http.sse import unless_gone
from serving.frontends.openai.errors import RESPONSES
from serving.frontends.openai.protocol.embeddings import EmbeddingReply, EmbeddingRequest
from serving.frontends.openai.protocol.others import CohereEmbedReply, CohereEmbedRequest, PoolingReply
from serving.service import Embedding, Served, TextService
from serving.service.vectors import shortened, together


def embeddings_router(served: Served) -> APIRouter:
    """The embeddings endpoint over `served`."""
    router = APIRouter(tags=["embeddings"], responses=RESPONSES)

    @router.post("/v1/embeddings", response_model=EmbeddingReply, openapi_extra=takes(EmbeddingRequest))
    async def create(
        body: Annotated[EmbeddingRequest, Depends(body_of(EmbeddingRequest))], request: Request
    ) -> Response:
        """Embeds one or more inputs, in order."""
        found, head = await run(body, body, request)
        data = [
            {"object": "embedding", "index": i, "embedding": _encoded(vector, body.encoding_format)}
            for i, vector in enumerate(found)
        ]
        return JSONResponse({"object": "list", "data": data, **head})

    @router.post("/pooling", response_model=PoolingReply, openapi_extra=takes(EmbeddingRequest))
    async def pooling(
        body: Annotated[EmbeddingRequest, Depends(body_of(EmbeddingRequest))], request: Request
    ) -> Response:
        """The same vectors in the shape of vLLM's /pooling."""
        found, head = await run(body, body, request)
        data = [
            {"object": "pooling", "index": i, "data": _encoded(vector, body.encoding_format)}
            for i, vector in enumerate(found)
        ]
        reply = {"id": f"pool-{request.state.request_id}", "object": "list", "created": int(time.time())}
        return JSONResponse({**reply, "data": data, **head})

    @router.post("/v2/embed", response_model=CohereEmbedReply, openapi_extra=takes(CohereEmbedRequest))
    async def cohere(
        body: Annotated[CohereEmbedRequest, Depends(body_of(CohereEmbedRequest))], request: Request
    ) -> Response:
        """The same vectors in Cohere's shape."""
        with named(body.names()):
            same = body.as_embeddings()
        found, head = await run(same, body, request)
        kinds = dict.fromkeys(body.embedding_types or ["float"])
        return JSONResponse(
            {
                "id": f"embd-{request.state.request_id}",
                "embeddings": {kind: [_encoded(vector, kind) for vector in found] for kind in kinds},
                "texts": same.inputs(),
                "meta": {
                    "api_version": {"version": "2"},
                    "billed_units": {"input_tokens": head["usage"]["prompt_tokens"]},
                },
            }
        )

    async def run(body: EmbeddingRequest, said: ApiBody, request: Request) -> tuple[list[np.ndarray], dict[str, Any]]:
        """The vectors, and what replies end with; errors name the fields of `said`."""
        with named(said.names()):
            inputs = body.inputs()
            service = served.of(body.model)
            service.limits.check_count("inputs", len(inputs), service.limits.max_batch, "input")
            found = await unless_gone(request, _embed(service, body, inputs, request.state.request_id))
            vectors = [shortened(one.vector, body.dimensions) for one in found]
        used = sum(len(one.prompt_token_ids) for one in found)
        usage = {"prompt_tokens": used, "total_tokens": used}
        return vectors, {"model": service.resolve_model(body.model), "usage": usage}

    return router


async def _embed(service: TextService, body: EmbeddingRequest, inputs: list[Any], request_id: str) -> list[Embedding]:
    given = [body.given(one, request_id) for one in inputs]
    return await together([service.embed(one, pooling=body.pooling, prompt_name=body.prompt_name) for one in given])


def _encoded(vector: np.ndarray, kind: str | None) -> list[float] | list[int] | str:
    """As numbers, little-endian base64, or the signs alone as bits (in bytes of -128 to 127, or 0 to 255)."""
    if kind == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    if kind in ("binary", "ubinary"):
        packed = np.packbits(vector > 0)
        return (packed if kind == "ubinary" else (packed.astype(np.int16) - 128)).tolist()
    return vector.tolist()
