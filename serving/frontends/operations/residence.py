"""Routes that load models, have them sleep and forget them, where a server has several. They need an admin key, and are closed
without one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, Response

from serving.access import Access
from serving.engine.api.client import Residence
from serving.frontends.http.access import control_check
from serving.frontends.http.bodies import body_of, takes
from serving.frontends.http.models import ApiReply, ApiRequest
from serving.frontends.http.status import status_of
from serving.frontends.openai.errors import RESPONSES
from serving.service import Served
from serving.service.residence import residence_of


class ModelRequest(ApiRequest):
    """Which model. `pinned`: whether it may give way to others from now on; left out: as before."""

    model: str
    pinned: bool | None = None


class ModelStatusReply(ApiReply):
    """Where a model is after what was asked."""

    success: bool = True
    model: str
    status: dict[str, Any]


Body = Annotated[ModelRequest, Depends(body_of(ModelRequest))]


def residence_router(served: Served, access: Access) -> APIRouter:
    """POST /models/load, /models/sleep, /models/unload."""
    responses: dict[int | str, dict[str, Any]] = {
        status: RESPONSES[status] for status in (400, 401, 403, 404, 409, 429, 503)
    }
    router = APIRouter(tags=["models"], dependencies=[Depends(control_check(access))], responses=responses)
    how: dict[str, Any] = {"response_model": ModelStatusReply, "openapi_extra": takes(ModelRequest)}

    async def do(body: ModelRequest, work: Callable[[Residence], Awaitable[None]]) -> Response:
        service = served.of(body.model)
        residence = residence_of(service)
        if body.pinned is not None:
            residence.pin(body.pinned)
        await work(residence)
        return JSONResponse({"success": True, "model": service.model_id, "status": status_of(service)})

    @router.post("/models/load", **how)
    async def load(body: Body) -> Response:
        """Answers once the model takes requests."""
        return await do(body, lambda residence: residence.load())

    @router.post("/models/sleep", **how)
    async def sleep(body: Body) -> Response:
        """Gives the model's memory back. What runs waits, and goes on when it is asked for again."""
        return await do(body, lambda residence: residence.sleep())

    @router.post("/models/unload", **how)
    async def unload(body: Body) -> Response:
        """Forgets the model's engine. 409 while requests run with it."""
        return await do(body, lambda residence: residence.unload())

    return router
