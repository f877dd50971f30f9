"""/score, /v1/score, /rerank, /v1/rerank, /v2/rerank: how relevant texts are to a query.

A cross-encoder reads each pair itself; of a model that only embeds, scores are cosines of embeddings.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from serving.errors import RequestError
from serving.frontends.http.bodies import body_of, takes
from serving.frontends.http.sse import unless_gone
from serving.frontends.openai.errors import RESPONSES
from serving.frontends.openai.protocol.scores import PairFields, RerankReply, RerankRequest, ScoreReply, ScoreRequest
from serving.service import ScoreInput, Scores, Served


def scores_router(served: Served) -> APIRouter:
    """The scoring endpoints over `served`."""
    router = APIRouter(tags=["scores"], responses=RESPONSES)

    async def run(body: PairFields, pairs: list[tuple[str, str]], request: Request) -> tuple[Scores, dict[str, Any]]:
        """The scores, and what both replies begin with."""
        service = served.of(body.model)
        request_id = body.request_id or request.state.request_id
        given = ScoreInput(pairs, body.keep, body.model, request_id, body.priority or 0)
        try:
            found = await unless_gone(request, service.score(given))
        except RequestError as error:
            raise error.renamed(body.pair_names(len(pairs))) from error
        usage = {"prompt_tokens": found.prompt_tokens, "total_tokens": found.prompt_tokens}
        return found, {"model": service.resolve_model(body.model), "usage": usage}

    @router.post("/score", response_model=ScoreReply, operation_id="score", openapi_extra=takes(ScoreRequest))
    @router.post("/v1/score", response_model=ScoreReply, operation_id="score_v1", openapi_extra=takes(ScoreRequest))
    async def score(body: Annotated[ScoreRequest, Depends(body_of(ScoreRequest))], request: Request) -> Response:
        """Scores one text against one or several, or as many against as many."""
        found, head = await run(body, body.pairs(), request)
        data = [{"index": i, "object": "score", "score": value} for i, value in enumerate(found.values)]
        reply_id = f"score-{request.state.request_id}"
        return JSONResponse({"id": reply_id, "object": "list", "created": int(time.time()), **head, "data": data})

    @router.post("/rerank", response_model=RerankReply, operation_id="rerank", openapi_extra=takes(RerankRequest))
    @router.post("/v1/rerank", response_model=RerankReply, operation_id="rerank_v1", openapi_extra=takes(RerankRequest))
    @router.post("/v2/rerank", response_model=RerankReply, operation_id="rerank_v2", openapi_extra=takes(RerankRequest))
    async def rerank(body: Annotated[RerankRequest, Depends(body_of(RerankRequest))], request: Request) -> Response:
        """Orders documents by their relevance to a query, the most relevant first."""
        texts = body.candidates()
        found, head = await run(body, [(body.query, text) for text in texts], request)
        best = sorted(range(len(texts)), key=lambda i: -found.values[i])[: body.top_n or None]
        results = [
            {"index": i}
            | ({} if body.return_documents is False else {"document": {"text": texts[i]}})
            | {"relevance_score": found.values[i]}
            for i in best
        ]
        if body.texts is not None:
            return JSONResponse(
                [
                    {"index": i, "score": found.values[i]} | ({"text": texts[i]} if body.return_text else {})
                    for i in best
                ]
            )
        return JSONResponse({"id": f"rerank-{request.state.request_id}", **head, "results": results})

    return router
