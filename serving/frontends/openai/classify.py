"""/classify: what texts are, by the labels of a sequence classifier. vLLM's shape.

https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html#classification-api
"""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from serving.errors import named
from serving.frontends.http.bodies import body_of, takes
from serving.frontends.http.sse import unless_gone
from serving.frontends.openai.errors import RESPONSES
from serving.frontends.openai.protocol.classify import ClassifyReply, ClassifyRequest
from serving.service import Served, TextService
from serving.service.vectors import together


def classify_router(served: Served) -> APIRouter:
    """The classification endpoint over `served`."""
    router = APIRouter(tags=["classification"], responses=RESPONSES)

    @router.post("/classify", response_model=ClassifyReply, openapi_extra=takes(ClassifyRequest))
    async def classify(
        body: Annotated[ClassifyRequest, Depends(body_of(ClassifyRequest))], request: Request
    ) -> Response:
        """Classifies one or more inputs, in order."""
        with named(body.names()):
            inputs = body.inputs()
            service = served.of(body.model)
            service.limits.check_count("inputs", len(inputs), service.limits.max_batch, "input")
            given = [body.given(one, request.state.request_id) for one in inputs]
            work = together([service.classify(one, raw=body.raw) for one in given])
            found = await unless_gone(request, work)
        data = [
            {
                "index": i,
                "label": _label(service, one.values),
                "probs": list(one.values),
                "num_classes": len(one.values),
            }
            for i, one in enumerate(found)
        ]
        used = sum(len(one.prompt_token_ids) for one in found)
        return JSONResponse(
            {
                "id": f"classify-{request.state.request_id}",
                "object": "list",
                "created": int(time.time()),
                "model": service.resolve_model(body.model),
                "data": data,
                "usage": {"prompt_tokens": used, "total_tokens": used},
            }
        )

    return router


def _label(service: TextService, values: tuple[float, ...]) -> str | None:
    """The name of the likeliest label, where the engine tells its names."""
    best = max(range(len(values)), key=values.__getitem__)
    return service.info.labels[best] if best < len(service.info.labels) else None
