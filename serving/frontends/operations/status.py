"""/health, /ready, /load, /version, /metrics, and the API document as a page."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse

from serving.access import Access
from serving.frontends.http.access import figures_check
from serving.frontends.http.models import ApiReply
from serving.frontends.openai.errors import RESPONSES
from serving.frontends.operations.documentation import DOCS_POLICY, documentation
from serving.metrics import Metrics
from serving.service import Served


class StatusReply(ApiReply):
    status: str


class VersionReply(ApiReply):
    version: str


class LoadReply(ApiReply):
    server_load: int


def status_router(served: Served, metrics: Metrics, access: Access) -> APIRouter:
    """Routes that tell about the server itself. Where there are keys, `/metrics` and `/load` need one that may see figures."""
    figures: dict[str, Any] = {"dependencies": [Depends(figures_check(access))]}
    router = APIRouter(tags=["server"])
    unavailable: dict[int | str, dict[str, Any]] = {503: RESPONSES[503]}

    @router.get("/health", response_model=StatusReply, responses=unavailable)
    async def health() -> Response:
        """Live: the engine can still serve what runs. 503 once it died, so that an orchestrator restarts us."""
        if served.first.client.healthy:
            return JSONResponse({"status": "ok"})
        served.check_ready()
        return JSONResponse({"status": "ok"})

    @router.get("/ready", response_model=StatusReply, responses=unavailable)
    async def ready() -> Response:
        """Takes new requests: weights loaded, programs compiled, not draining."""
        served.check_ready()
        return JSONResponse({"status": "ready"})

    @router.post("/ping", include_in_schema=False)
    @router.get("/ping", include_in_schema=False)
    async def ping() -> Response:
        """/health under the name that SageMaker asks for."""
        return await health()

    @router.get("/load", response_model=LoadReply, responses={403: RESPONSES[403]}, **figures)
    async def load() -> Response:
        """How many requests are being served."""
        return JSONResponse({"server_load": served.num_live})

    @router.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        """The API document as a page."""
        return HTMLResponse(documentation(request.app.openapi()), headers={"Content-Security-Policy": DOCS_POLICY})

    @router.get("/version", response_model=VersionReply)
    async def version() -> Response:
        return JSONResponse({"version": served.first.info.version})

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, 403: RESPONSES[403]},
        **figures,
    )
    async def prometheus(request: Request) -> Response:
        """Prometheus text, or OpenMetrics where the scraper asks for it."""
        body, media_type = metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": media_type})

    return router
