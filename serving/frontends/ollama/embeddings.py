"""POST /api/embed, and /api/embeddings, its older form of one text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from serving.errors import named
from serving.frontends.http.bodies import body_of, takes
from serving.frontends.http.sse import unless_gone
from serving.frontends.ollama.errors import RESPONSES
from serving.frontends.ollama.protocol import EmbedBody, EmbeddingsBody, EmbeddingsReply, EmbedReply, model_name
from serving.service import Embedding, GenerateInput, Served
from serving.service.vectors import shortened, together


def embeddings_router(served: Served) -> APIRouter:
    """Embeddings over `served`."""
    router = APIRouter(tags=["ollama"], responses=RESPONSES)

    async def run(texts: Sequence[str], model: str, cut: bool, request: Request) -> list[Embedding]:
        service = served.of(model_name(model))
        service.limits.check_count("inputs", len(texts), service.limits.max_batch, "input")
        given = [
            GenerateInput(
                text=text,
                truncate_prompt_tokens=-1 if cut else None,
                truncation_side="right" if cut else None,
                model=model_name(model),
                request_id=request.state.request_id,
            )
            for text in texts
        ]
        return await unless_gone(request, together([service.embed(one) for one in given]))

    @router.post("/api/embed", response_model=EmbedReply, openapi_extra=takes(EmbedBody))
    async def embed(
        body: Annotated[EmbedBody, Depends(body_of(EmbedBody, untyped=True))], request: Request
    ) -> Response:
        """Embeds one or more texts, in order."""
        begun = time.monotonic()
        texts = [body.input] if isinstance(body.input, str) else body.input
        with named(body.names()):
            found = await run(texts, body.model, body.truncate is not False, request)
            vectors = [shortened(one.vector, body.dimensions).tolist() for one in found]
        return JSONResponse({
            "model": body.model, "embeddings": vectors, "total_duration": round((time.monotonic() - begun) * 1e9),
            "load_duration": 0, "prompt_eval_count": sum(len(one.prompt_token_ids) for one in found),
        })  # fmt: skip

    @router.post("/api/embeddings", response_model=EmbeddingsReply, openapi_extra=takes(EmbeddingsBody))
    async def embeddings(
        body: Annotated[EmbeddingsBody, Depends(body_of(EmbeddingsBody, untyped=True))], request: Request
    ) -> Response:
        """Embeds one text."""
        (found,) = await run([body.prompt], body.model, True, request)
        return JSONResponse({"embedding": found.vector.tolist()})

    return router
