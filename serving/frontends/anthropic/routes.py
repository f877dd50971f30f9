"""POST /v1/messages and /v1/messages/count_tokens; GET /v1/models as Anthropic's clients know it."""

from __future__ import annotations

import datetime
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.routing import Match
from starlette.types import Scope

from serving.errors import RequestError
from serving.frontends.anthropic.errors import RESPONSES, error_event, speaks_anthropic
from serving.frontends.anthropic.events import PING, MessageWriter
from serving.frontends.anthropic.protocol import CountTokensReply, CountTokensRequest, MessageReply, MessagesRequest
from serving.frontends.http.bodies import body_of, takes
from serving.frontends.http.sse import open_stream, unless_gone
from serving.service import PreparedRequest, Served, TextService, prepare_chat

MAX_PAGE = 1000


def messages_router(served: Served) -> APIRouter:
    """The messages endpoints over `served`. `?beta=true` is taken and changes nothing."""
    router = APIRouter(tags=["messages"], responses=RESPONSES)

    @router.post(
        "/v1/messages",
        response_model=MessageReply,
        responses={200: {"content": {"text/event-stream": {}}, "description": "A message, or a stream of events."}},
        openapi_extra=takes(MessagesRequest),
    )
    async def create(body: Annotated[MessagesRequest, Depends(body_of(MessagesRequest))], request: Request) -> Response:
        """Goes on with a conversation. `stream: true` answers with typed server-sent events, ending with message_stop."""
        service = served.of(body.model)
        prepared = await _prepare(service, body, request)
        writer = MessageWriter(prepared, body.max_tokens, body.shows_thinking)
        events = _run(service, prepared, writer)
        if body.stream:
            return await open_stream(request, events, error_event, ping=PING, waits_for=service.waits_for)
        await unless_gone(request, _drain(events))
        return JSONResponse(writer.message)

    @router.post("/v1/messages/count_tokens", response_model=CountTokensReply, openapi_extra=takes(CountTokensRequest))
    async def count_tokens(
        body: Annotated[CountTokensRequest, Depends(body_of(CountTokensRequest))], request: Request
    ) -> Response:
        """How many tokens the model would read of the same message. Nothing is run."""
        try:
            _, ids = await served.of(body.model).tokenize(body.to_input(request.state.request_id))
        except RequestError as error:
            raise error.renamed(body.names()) from error
        return JSONResponse({"input_tokens": len(ids)})

    return router


async def _prepare(service: TextService, body: MessagesRequest, request: Request) -> PreparedRequest:
    try:
        return await prepare_chat(service, body.to_input(request.state.request_id), body.params(), body.options())
    except RequestError as error:
        raise error.renamed(body.names()) from error


async def _run(service: TextService, prepared: PreparedRequest, writer: MessageWriter) -> AsyncGenerator[bytes, None]:
    stream = service.generate(prepared)
    try:
        first = True
        async for output in stream:
            # Held back until the engine has taken the request, so that a refusal is an HTTP status.
            opening = writer.start(output) if first else b""
            first = False
            if events := opening + writer.push(output):
                yield events
        yield writer.finish()
    finally:
        await stream.aclose()


async def _drain(events: AsyncGenerator[bytes, None]) -> None:
    async for _ in events:
        pass


class _AnthropicRoute(APIRoute):
    """A route that other clients do not see: they know another one of the same path."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return super().matches(scope) if speaks_anthropic(scope) else (Match.NONE, {})


def models_router(served: Served) -> APIRouter:
    """GET /v1/models and /v1/models/{model}; comes before those of OpenAI's shape."""
    router = APIRouter(route_class=_AnthropicRoute, include_in_schema=False)

    def card(service: TextService, name: str) -> dict[str, Any]:
        created = datetime.datetime.fromtimestamp(service.created, datetime.UTC)
        context = service.info.max_model_len
        return {
            "type": "model", "id": name, "display_name": name, "created_at": created.isoformat().replace("+00:00", "Z"),
            "lifecycle": "active", "max_input_tokens": context, "max_tokens": context,
        }  # fmt: skip

    @router.get("/v1/models")
    async def models(limit: int = 20, after_id: str | None = None, before_id: str | None = None) -> Response:
        known = {name: service for service in served.visible() for name in service.listed()}
        page, more = _page(tuple(known), min(max(limit, 1), MAX_PAGE), after_id, before_id)
        ends = {"first_id": page[0] if page else None, "last_id": page[-1] if page else None}
        return JSONResponse({"data": [card(known[name], name) for name in page], "has_more": more, **ends})

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        service = served.of(model)
        return JSONResponse(card(service, service.resolve_model(model)))

    return router


def _page(names: Sequence[str], limit: int, after: str | None, before: str | None) -> tuple[Sequence[str], bool]:
    """A page of the names behind `after` or ahead of `before`, and whether there are more in that direction."""
    if after in names:
        names = names[names.index(after) + 1 :]
    elif before in names:
        names = names[: names.index(before)]
        return names[-limit:], len(names) > limit
    return names[:limit], len(names) > limit
