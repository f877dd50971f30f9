"""POST /api/chat and /api/generate: streams of JSON lines unless `stream` is false."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from serving.errors import named
from serving.frontends.http.bodies import body_of, takes
from serving.frontends.http.sse import open_stream, unless_gone
from serving.frontends.ollama.errors import RESPONSES, error_line
from serving.frontends.ollama.keeping import keep, movable, seconds_of
from serving.frontends.ollama.lines import ReplyWriter, now
from serving.frontends.ollama.protocol import (
    ChatBody,
    GenerateBody,
    GenerateReply,
    GenerationFields,
    OllamaChatReply,
    model_name,
)
from serving.service import PreparedRequest, Served, TextService, prepare_chat

LINES = "application/x-ndjson"
STREAM = {200: {"content": {LINES: {}}, "description": "Lines of JSON, or one object."}}


def generation_router(served: Served) -> APIRouter:
    """Chats and completions over `served`."""
    router = APIRouter(tags=["ollama"], responses=RESPONSES)

    @router.post("/api/chat", response_model=OllamaChatReply, responses={**STREAM}, openapi_extra=takes(ChatBody))
    async def chat(body: Annotated[ChatBody, Depends(body_of(ChatBody, untyped=True))], request: Request) -> Response:
        """Goes on with a conversation. Without messages it answers at once: the model is there."""
        service = served.of(model_name(body.model))
        keep(service, body.keep_alive)
        if not body.messages:
            return await _loaded(service, body, {"message": {"role": "assistant", "content": ""}})
        with named(body.names()):
            given = body.to_input(request.state.request_id)
            prepared = await prepare_chat(service, given, body.params(), body.chat_options())
        return await _reply(service, body, prepared, request, chat=True)

    @router.post("/api/generate", response_model=GenerateReply, responses={**STREAM}, openapi_extra=takes(GenerateBody))
    async def generate(
        body: Annotated[GenerateBody, Depends(body_of(GenerateBody, untyped=True))], request: Request
    ) -> Response:
        """Answers one prompt, or goes on with it where `raw` is true. Without a prompt it answers at once."""
        service = served.of(model_name(body.model))
        keep(service, body.keep_alive)
        if not body.prompt and not body.images:
            return await _loaded(service, body, {"response": ""})
        with named(body.names()):
            given = body.to_input(request.state.request_id, service.chat_template is not None)
            if given.messages is not None:
                prepared = await prepare_chat(service, given, body.params(), body.chat_options())
            else:
                prepared = await service.prepare(given, service.make_params(body.params()))
        return await _reply(service, body, prepared, request, chat=False)

    return router


async def _reply(
    service: TextService, body: GenerationFields, prepared: PreparedRequest, request: Request, chat: bool
) -> Response:
    writer = ReplyWriter(body.model, prepared, chat)
    lines = _run(service, prepared, writer)
    if body.streams:
        return await open_stream(request, lines, error_line, LINES, ping=b"")
    await unless_gone(request, _drain(lines))
    return JSONResponse(writer.whole())


async def _run(service: TextService, prepared: PreparedRequest, writer: ReplyWriter) -> AsyncGenerator[bytes, None]:
    stream = service.generate(prepared)
    try:
        async for output in stream:
            if lines := writer.push(output):
                yield lines
        yield writer.finish()
    finally:
        await stream.aclose()


async def _drain(lines: AsyncGenerator[bytes, None]) -> None:
    async for _ in lines:
        pass


async def _loaded(service: TextService, body: GenerationFields, part: dict[str, Any]) -> Response:
    """The answer to a request that only wants the model to be loaded, or to go. The only one of a server stays."""
    service.check_ready()
    service.resolve_model(model_name(body.model))
    with named(body.names()):
        service.make_params(body.params())
    reason = "unload" if seconds_of(body.keep_alive) == 0 else "load"
    if reason == "load" and (residence := service.client.residence) is not None:
        await residence.load()
    elif reason == "unload" and (residence := movable(service)) is not None:
        await residence.sleep()
    return JSONResponse({"model": body.model, "created_at": now(), **part, "done": True, "done_reason": reason})
