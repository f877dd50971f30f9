"""/health, /ready, /version, /metrics, /v1/models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse

from serving.errors import RequestError
from serving.frontends.openai.documentation import DOCS_POLICY, documentation
from serving.frontends.openai.errors import RESPONSES, error_response
from serving.frontends.openai.protocol.ops import ModelCard, ModelList, StatusReply, VersionReply
from serving.frontends.openai.protocol.others import LoadReply
from serving.metrics import Metrics
from serving.service import TextService


def ops_router(service: TextService, metrics: Metrics) -> APIRouter:
    """Routes that tell about the server itself."""
    router = APIRouter(tags=["server"])
    unavailable: dict[int | str, dict[str, Any]] = {503: RESPONSES[503]}

    @router.get("/health", response_model=StatusReply, responses=unavailable)
    async def health() -> Response:
        """Live: the engine can still serve what runs. 503 once it died, so that an orchestrator restarts us."""
        if service.client.healthy:
            return JSONResponse({"status": "ok"})
        try:
            service.check_ready()
        except RequestError as error:
            return error_response(error)
        return JSONResponse({"status": "ok"})

    @router.get("/ready", response_model=StatusReply, responses=unavailable)
    async def ready() -> Response:
        """Takes new requests: weights loaded, programs compiled, not draining."""
        service.check_ready()
        return JSONResponse({"status": "ready"})

    @router.post("/ping", include_in_schema=False)
    @router.get("/ping", include_in_schema=False)
    async def ping() -> Response:
        """/health under the name that SageMaker asks for."""
        return await health()

    @router.get("/load", response_model=LoadReply)
    async def load() -> Response:
        """How many requests are being served."""
        return JSONResponse({"server_load": service.num_live})

    @router.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        """The API document as a page."""
        return HTMLResponse(documentation(request.app.openapi()), headers={"Content-Security-Policy": DOCS_POLICY})

    @router.get("/version", response_model=VersionReply)
    async def version() -> Response:
        return JSONResponse({"version": service.info.version})

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus(request: Request) -> Response:
        """Prometheus text, or OpenMetrics where the scraper asks for it."""
        body, media_type = metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": media_type})

    def card(name: str) -> ModelCard:
        adapter = None if name in service.model_names or service.adapters is None else service.adapters.find(name)
        return ModelCard(
            id=name,
            created=service.created,
            root=service.model_id if adapter is None else adapter.path,
            parent=None if adapter is None else service.model_id,
            max_model_len=service.info.max_model_len,
            default_sampling_params=service.default_params,
        )

    @router.get("/v1/models", response_model=ModelList)
    async def models() -> Response:
        """The model under the name that answers carry. Aliases answer too, and are not listed: front ends would show doubles."""
        adapters = () if service.adapters is None else (info.name for info in service.adapters.infos())
        return JSONResponse(ModelList(data=[card(name) for name in (service.model_id, *adapters)]).model_dump())

    @router.get("/v1/models/{model:path}", response_model=ModelCard, responses={k: RESPONSES[k] for k in (400, 404)})
    async def model(model: str) -> Response:
        return JSONResponse(card(service.resolve_model(model)).model_dump())

    return router
