"""/v1/responses: created and streamed, never stored."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from serving.errors import RequestError, named
from serving.frontends.http.bodies import body_of, takes
from serving.frontends.http.sse import open_stream, unless_gone
from serving.frontends.openai.chat_requests import deltas, prepare_body
from serving.frontends.openai.errors import RESPONSES
from serving.frontends.openai.protocol.responses import InputTokensReply, ResponsesReply, ResponsesRequest
from serving.frontends.openai.response_events import ResponseWriter
from serving.service import PreparedRequest, TextService

Body = Annotated[ResponsesRequest, Depends(body_of(ResponsesRequest))]


def responses_router(service: TextService) -> APIRouter:
    """The responses endpoint over `service`."""
    router = APIRouter(tags=["responses"], responses=RESPONSES)

    @router.post(
        "/v1/responses",
        response_model=ResponsesReply,
        responses={200: {"content": {"text/event-stream": {}}, "description": "A response, or a stream of events."}},
        openapi_extra=takes(ResponsesRequest),
    )
    async def create(body: Body, request: Request) -> Response:
        """Runs a response. `stream: true` answers with typed server-sent events, ending with response.completed."""
        prepared = await _prepare(service, body, request)
        writer = ResponseWriter(body, prepared)
        events = _run(service, prepared, writer)
        if body.stream:
            return await open_stream(request, events, writer.failed)
        await unless_gone(request, _drain(events))
        return JSONResponse(writer.response)

    @router.post("/v1/responses/input_tokens", response_model=InputTokensReply, openapi_extra=takes(ResponsesRequest))
    async def input_tokens(body: Body, request: Request) -> Response:
        """How many tokens the model would read of the same response. Nothing is run."""
        with named(body.names()):
            chat = body.to_chat()
            service.make_params(chat.params())  # what would be refused there is refused here
            _, ids = await service.tokenize(chat.to_input(request.state.request_id))
        return JSONResponse({"object": "response.input_tokens", "input_tokens": len(ids)})

    return router


async def _prepare(service: TextService, body: ResponsesRequest, request: Request) -> PreparedRequest:
    try:
        return await prepare_body(service, body.to_chat(), request.state.request_id)
    except RequestError as error:
        raise error.renamed(body.names()) from error


async def _run(service: TextService, prepared: PreparedRequest, writer: ResponseWriter) -> AsyncGenerator[bytes, None]:
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
        yield writer.finish()
    finally:
        await stream.aclose()


async def _drain(events: AsyncGenerator[bytes, None]) -> None:
    async for _ in events:
        pass
