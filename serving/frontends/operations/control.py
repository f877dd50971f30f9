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
from serving.service import TextService
from serving.service.control import ServerControl, State


class StateReply(BaseModel):
    """Where the server is after what was asked."""

    paused: bool
    asleep: bool
    draining: bool
    num_live: int


class UpdateWeightsRequest(BaseModel):
    """Which checkpoint to serve from now on: what `--model` takes."""

    source: str


def control_router(service: TextService, access: Access) -> APIRouter:
    """POST /pause, /resume, /sleep, /wake_up, /drain, /reset_prefix_cache, /update_weights; GET /is_paused, /is_sleeping."""
    responses: dict[int | str, dict[str, Any]] = {status: RESPONSES[status] for status in (400, 401, 403, 409, 501)}
    router = APIRouter(tags=["control"], dependencies=[Depends(control_check(access))], responses=responses)
    control = ServerControl(service)

    async def reply(work: Awaitable[State]) -> Response:
        return JSONResponse(dataclasses.asdict(await work))

    @router.post("/pause", response_model=StateReply)
    async def pause() -> Response:
        return await reply(control.pause())

    @router.post("/resume", response_model=StateReply)
    async def resume() -> Response:
        return await reply(control.resume())

    @router.get("/is_paused")
    async def is_paused() -> Response:
        return JSONResponse({"is_paused": control.state().paused})

    @router.post("/sleep", response_model=StateReply)
    async def sleep(level: int = 1) -> Response:
        return await reply(control.sleep(level))

    @router.post("/wake_up", response_model=StateReply)
    async def wake_up() -> Response:
        return await reply(control.wake())

    @router.get("/is_sleeping")
    async def is_sleeping() -> Response:
        return JSONResponse({"is_sleeping": control.state().asleep})

    @router.post("/drain", response_model=StateReply)
    async def drain(timeout: float | None = None) -> Response:
        return await reply(control.drain(timeout))

    @router.post("/reset_prefix_cache", response_model=StateReply)
    async def reset_prefix_cache() -> Response:
        return await reply(control.reset_prefix_cache())

    @router.post("/update_weights", response_model=StateReply, openapi_extra=takes(UpdateWeightsRequest))
    async def update_weights(body: Annotated[UpdateWeightsRequest, Depends(body_of(UpdateWeightsRequest))]) -> Response:
        return await reply(control.update_weights(body.source))

    return router
