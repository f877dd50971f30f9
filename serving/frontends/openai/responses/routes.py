"""/v1/responses: created, streamed, and where the server has a store kept, followed on, asked for, cancelled and deleted."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from serving.errors import RequestError, invalid, named
from serving.frontends.http.bodies import body_of, takes
from serving.frontends.http.sse import open_stream, unless_gone
from serving.frontends.openai.chat_requests import deltas, prepare_body
from serving.frontends.openai.errors import RESPONSES, error_event
from serving.frontends.openai.responses.background import Background
from serving.frontends.openai.responses.events import ResponseWriter
from serving.frontends.openai.responses.items import listed
from serving.frontends.openai.responses.protocol import InputTokensReply, ResponsesReply, ResponsesRequest
from serving.frontends.openai.responses.state import (
    RESPONSE,
    RUNNING,
    ResponseState,
    need_store,
    not_found,
    tenant_of_task,
)
from serving.service import PreparedRequest, Served, TextService
from serving.storage import Entry, Store

Body = Annotated[ResponsesRequest, Depends(body_of(ResponsesRequest))]
STREAM = {200: {"content": {"text/event-stream": {}}, "description": "A response, or a stream of events."}}


def responses_router(served: Served, store: Store | None, background: Background) -> APIRouter:
    """The responses endpoints over `served`."""
    router = APIRouter(tags=["responses"], responses=RESPONSES)
    state = ResponseState(store)

    @router.post(
        "/v1/responses", response_model=ResponsesReply, responses={**STREAM}, openapi_extra=takes(ResponsesRequest)
    )
    async def create(body: Body, request: Request) -> Response:
        """Runs a response. `stream: true` answers with typed server-sent events, ending with response.completed."""
        stored = state.keeps(body)
        service = served.of(body.model)
        prepared = await _prepare(service, state, body, request)
        writer = ResponseWriter(body, prepared, stored)
        save = functools.partial(state.save, body) if stored else None
        if body.background:
            assert save is not None
            await background.start(writer, _run(service, prepared, writer), save)
            if body.stream:
                return await open_stream(request, background.follow(writer.response["id"], -1), error_event)
            return JSONResponse(writer.response)
        events = _run(service, prepared, writer, save)
        if body.stream:
            return await open_stream(request, events, writer.failed, waits_for=service.waits_for)
        await unless_gone(request, _drain(events))
        return JSONResponse(writer.response)

    @router.post("/v1/responses/input_tokens", response_model=InputTokensReply, openapi_extra=takes(ResponsesRequest))
    async def input_tokens(body: Body, request: Request) -> Response:
        """How many tokens the model would read of the same response. Nothing is run."""
        state.keeps(body)
        await state.follow(body)
        with named(body.names()):
            chat = body.to_chat()
            service = served.of(body.model)
            service.make_params(chat.params())  # what would be refused there is refused here
            _, ids = await service.tokenize(chat.to_input(request.state.request_id))
        return JSONResponse({"object": "response.input_tokens", "input_tokens": len(ids)})

    _kept_routes(router, store, state, background)
    return router


def _kept_routes(router: APIRouter, store: Store | None, state: ResponseState, background: Background) -> None:
    """What needs a store."""

    async def find(response_id: str) -> Entry:
        entry = await need_store(store).get(tenant_of_task(), RESPONSE, response_id)
        if entry is None:
            raise not_found(RESPONSE, response_id)
        return entry

    @router.get("/v1/responses/{response_id}", response_model=ResponsesReply, responses={**STREAM})
    async def retrieve(
        response_id: str, request: Request, stream: bool = False, starting_after: int | None = None
    ) -> Response:
        """A response that was kept; of one that runs in the background what there is of it, or its events as they come."""
        one = background.find(response_id)
        after = -1 if starting_after is None else starting_after
        if one is not None:
            if stream:
                return await open_stream(request, background.follow(response_id, after), error_event)
            return JSONResponse(one.writer.response)
        entry = await find(response_id)
        if not stream:
            return JSONResponse(_settled(entry.body))
        events = entry.data.get("events")
        if events is None:
            raise invalid("Only responses that were created with background: true can be streamed again.", "stream")
        return await open_stream(request, _again(events[after + 1 :]), error_event)

    @router.delete("/v1/responses/{response_id}")
    async def delete(response_id: str) -> Response:
        """Forgets a response; one that runs is ended first."""
        await background.cancel(response_id)
        if not await need_store(store).delete(tenant_of_task(), RESPONSE, response_id):
            raise not_found(RESPONSE, response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    @router.post("/v1/responses/{response_id}/cancel", response_model=ResponsesReply)
    async def cancel(response_id: str) -> Response:
        """Ends a response that runs in the background."""
        ended = await background.cancel(response_id)
        if ended is None:
            ended = _settled((await find(response_id)).body)
            if not ended["background"]:
                raise invalid("Only responses that were created with background: true can be cancelled.", "response_id")
        return JSONResponse(ended)

    @router.get("/v1/responses/{response_id}/input_items")
    async def input_items(
        response_id: str, limit: int = 20, after: str | None = None, order: Literal["asc", "desc"] = "desc"
    ) -> Response:
        """What a response read: its own input, and what it followed on."""
        await find(response_id)
        items = await state.context(response_id, with_output=False)
        return JSONResponse(listed(items, limit, after, order == "desc"))


def _settled(response: dict[str, Any]) -> dict[str, Any]:
    """A kept response that does not run: one that says otherwise was running when the server ended."""
    if response["status"] not in RUNNING:
        return response
    error = {"code": "server_error", "message": "The server ended while this response ran. Send it again."}
    return {**response, "status": "failed", "error": error}


async def _prepare(
    service: TextService, state: ResponseState, body: ResponsesRequest, request: Request
) -> PreparedRequest:
    await state.follow(body)
    try:
        return await prepare_body(service, body.to_chat(), request.state.request_id)
    except RequestError as error:
        raise error.renamed(body.names()) from error


async def _run(
    service: TextService, prepared: PreparedRequest, writer: ResponseWriter, save: Any = None
) -> AsyncGenerator[bytes, None]:
    """The events of a response, which is kept before the last of them tells that it is complete."""
    stream = service.generate(prepared)
    opening = b""
    try:
        first = True
        async for output in stream:
            if first:
                # Held back until the engine has taken the request, so that a refusal is an HTTP status.
                opening, first = writer.start(), False
            new: list[dict[str, Any]] = (
                ([{"content": output.text}] if output.text or output.logprobs else [])
                if output.events is None
                else deltas(output.events)
            )
            events = opening + writer.push(output, new)
            opening = b""
            if events:
                yield events
        last = opening + writer.finish()
        if save is not None:
            await save(writer.response)
        yield last
    finally:
        await stream.aclose()


async def _drain(events: AsyncGenerator[bytes, None]) -> None:
    async for _ in events:
        pass


async def _again(events: list[str]) -> AsyncGenerator[bytes, None]:
    yield "".join(events).encode()
