"""/v1/responses: created and streamed, never stored."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serving.frontends.openai.chat_requests import deltas, prepare_body
from serving.frontends.openai.errors import RESPONSES
from serving.frontends.openai.protocol.responses import ResponsesReply, ResponsesRequest
from serving.frontends.openai.response_events import ResponseWriter
from serving.frontends.openai.sse import open_stream, unless_gone
from serving.service import PreparedRequest, TextService
from serving.service.chat import ReplyParser


def responses_router(service: TextService) -> APIRouter:
    """The responses endpoint over `service`."""
    router = APIRouter(tags=["responses"], responses=RESPONSES)

    @router.post(
        "/v1/responses",
        response_model=ResponsesReply,
        responses={200: {"content": {"text/event-stream": {}}, "description": "A response, or a stream of events."}},
    )
    async def create(body: ResponsesRequest, request: Request) -> Response:
        """Runs a response. `stream: true` answers with typed server-sent events, ending with response.completed."""
        chat = await prepare_body(service, body.to_chat(), request.state.request_id)
        writer = ResponseWriter(body, chat.request)
        events = _run(service, chat.request, chat.parsers[0] if chat.parsers else None, writer)
        if body.stream:
            return await open_stream(request, events, writer.failed)
        await unless_gone(request, _drain(events))
        return JSONResponse(writer.response)

    return router


async def _run(
    service: TextService, prepared: PreparedRequest, parser: ReplyParser | None, writer: ResponseWriter
) -> AsyncGenerator[bytes, None]:
    stream = service.generate(prepared)
    opening = b""
    try:
        first = True
        async for output in stream:
            if first:
                # Held back until the engine has taken the request, so that a refusal is an HTTP status.
                opening, first = writer.start(), False
            last = output.finish_reason is not None
            new: list[dict[str, Any]] = (
                ([{"content": output.text}] if output.text or output.logprobs else [])
                if parser is None
                else deltas(parser.push(output.text, last))
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
