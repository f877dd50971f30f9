"""Routes that change the server, under vLLM's names where it has them. They need an admin key, and are closed without one."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from serving.access import Access
from serving.frontends.http.access import control_check
from serving.frontends.http.bodies import body_of, takes
from serving.frontends.openai.errors import RESPONSES
from serving.service import Served
from serving.service.control import ServerControl, State


class StateReply(BaseModel):
    """Where the server is after what was asked."""

    paused: bool
    asleep: bool
    draining: bool
    num_live: int


class UpdateWeightsRequest(BaseModel):
    """Which checkpoint to serve from now on: what `--model` takes; and in place of which model, where there are several."""

    source: str
    model: str | None = None


def control_router(served: Served, access: Access) -> APIRouter:
    """POST /pause, /resume, /sleep, /wake_up, /drain, /reset_prefix_cache, /update_weights; GET /is_paused, /is_sleeping. `?model=`
    says which, where there are several."""
    responses: dict[int | str, dict[str, Any]] = {status: RESPONSES[status] for status in (400, 401, 403, 409, 501)}
    router = APIRouter(tags=["control"], dependencies=[Depends(control_check(access))], responses=responses)

    def control(model: str | None) -> ServerControl:
        return ServerControl(served.of(model), served)

    async def reply(work: Awaitable[State]) -> Response:
        return JSONResponse(dataclasses.asdict(await work))

    @router.post("/pause", response_model=StateReply)
    async def pause(model: str | None = None) -> Response:
        return await reply(control(model).pause())

    @router.post("/resume", response_model=StateReply)
    async def resume(model: str | None = None) -> Response:
        return await reply(control(model).resume())

    @router.get("/is_paused")
    async def is_paused(model: str | None = None) -> Response:
        return JSONResponse({"is_paused": control(model).state().paused})

    @router.post("/sleep", response_model=StateReply)
    async def sleep(level: int = 1, model: str | None = None) -> Response:
        return await reply(control(model).sleep(level))

    @router.post("/wake_up", response_model=StateReply)
    async def wake_up(model: str | None = None) -> Response:
        return await reply(control(model).wake())

    @router.get("/is_sleeping")
    async def is_sleeping(model: str | None = None) -> Response:
        return JSONResponse({"is_sleeping": control(model).state().asleep})

    @router.post("/drain", response_model=StateReply)
    async def drain(timeout: float | None = None) -> Response:
        return await reply(control(None).drain(timeout))

    @router.post("/reset_prefix_cache", response_model=StateReply)
    async def reset_prefix_cache(model: str | None = None) -> Response:
        return await reply(control(model).reset_prefix_cache())

    @router.post("/update_weights", response_model=StateReply, openapi_extra=takes(UpdateWeightsRequest))
    async def update_weights(body: Annotated[UpdateWeightsRequest, Depends(body_of(UpdateWeightsRequest))]) -> Response:
        return await reply(control(body.model).update_weights(body.source))

    return router
