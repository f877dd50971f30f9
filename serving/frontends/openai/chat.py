"""/v1/chat/completions."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from serving.frontends.http.bodies import body_of, takes
from serving.frontends.http.sse import dumps, open_stream, quote, unless_gone
from serving.frontends.openai import outcome as oc
from serving.frontends.openai.chat_requests import deltas, options_of, prepare_body
from serving.frontends.openai.errors import DONE, RESPONSES, error_event
from serving.frontends.openai.protocol.chat import ChatReply, ChatRequest
from serving.service import PreparedRequest, Served, TextOutput, TextService, Usage, gather


def chat_router(served: Served) -> APIRouter:
    """The chat endpoint over `served`."""
    router = APIRouter(tags=["chat"], responses=RESPONSES)

    @router.post(
        "/v1/chat/completions",
        response_model=ChatReply,
        responses={200: {"content": {"text/event-stream": {}}, "description": "A reply, or a stream of chunks."}},
        openapi_extra=takes(ChatRequest),
    )
    async def create(body: Annotated[ChatRequest, Depends(body_of(ChatRequest))], request: Request) -> Response:
        """Completes a chat. `stream: true` answers with server-sent events, ending with `[DONE]`."""
        body.check_stream_options()
        service = served.of(body.model)
        prepared = await prepare_body(service, body, request.state.request_id)
        if body.stream:
            return await open_stream(
                request, _stream(service, body, prepared), error_event, waits_for=service.waits_for
            )
        reply = await unless_gone(request, _whole(service, body, prepared))
        return JSONResponse(reply)

    return router


async def _whole(service: TextService, body: ChatRequest, prepared: PreparedRequest) -> dict[str, Any]:
    forced = options_of(body).forces_call
    outcome = await gather(prepared.params.n, service.generate(prepared))
    choices = []
    for i, choice in enumerate(outcome.choices):
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.message is not None:
            message |= choice.message.as_dict(forced)
        item = {
            "index": i,
            "message": message,
            "logprobs": None
            if choice.logprobs is None
            else oc.chat_logprobs(choice.logprobs, bool(body.return_tokens_as_token_ids)),
            "finish_reason": _finish(choice.finish_reason, choice.called),
            "stop_reason": choice.stop_reason,
        }
        if body.return_token_ids:
            item["token_ids"] = choice.token_ids
        choices.append(item)
    reply = {
        "id": reply_id(prepared),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": prepared.model,
        "choices": choices,
        "usage": oc.usage_dict([outcome.usage]),
        "system_fingerprint": None,
        **oc.transfer_of(outcome, service),
    }
    if body.return_token_ids:
        reply["prompt_token_ids"] = list(prepared.prompt_token_ids)
    if body.prompt_logprobs is not None:
        reply["prompt_logprobs"] = oc.prompt_logprobs(outcome.prompt_logprobs)
    return reply


def reply_id(prepared: PreparedRequest) -> str:
    """The reply's id names the request, so that logs and `abort` can be matched with it."""
    return f"chatcmpl-{prepared.request_id}"


def _finish(reason: Any, called: bool) -> str | None:
    if reason is None:
        return None
    return "tool_calls" if called and reason.value == "stop" else reason.value


class _Chunks:
    """Writes chunks as bytes. What is equal in all of them is written once."""

    def __init__(self, body: ChatRequest, prepared: PreparedRequest) -> None:
        self._head = (
            f'data: {{"id":{quote(reply_id(prepared))},"object":"chat.completion.chunk","created":{int(time.time())},'
            f'"model":{quote(prepared.model)},"system_fingerprint":null,"choices":['
        )
        self._text_heads = [
            f'{self._head}{{"index":{i},"delta":{{"content":' for i in range(prepared.params.n)
        ]  # fmt: skip
        self._usage = Usage()
        self._continuous = body.continuous_usage
        self._tail = ',"usage":null}\n\n' if body.include_usage else "}\n\n"
        self._text_tail = '},"logprobs":null,"finish_reason":null}]' + self._tail

    def begin(self, output: TextOutput) -> None:
        """Takes in the prompt's counts alone, for the chunks that come before any token."""
        self._usage.add(dataclasses.replace(output, token_ids=(), num_reasoning_tokens=0))

    def count(self, output: TextOutput) -> None:
        """Takes in an output's tokens, for usage."""
        self._usage.add(output)

    def text(self, index: int, text: str) -> bytes:
        """A chunk that has nothing but text: nearly all of them."""
        if self._continuous:
            return self.choice(index, {"content": text})
        return f"{self._text_heads[index]}{quote(text)}{self._text_tail}".encode()

    def choice(self, index: int, delta: dict[str, Any], top: dict[str, Any] | None = None, **more: Any) -> bytes:
        """Any other chunk. `more` goes into its choice, `top` beside the choices."""
        item = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        beside = "".join(f",{quote(k)}:{dumps(v)}" for k, v in (top or {}).items())
        return f"{self._head}{dumps(item)}]{beside}{self._end()}".encode()

    def last(self) -> bytes:
        """The chunk without choices that carries the usage."""
        usage = dumps(oc.usage_dict([self._usage]))
        return f'{self._head}],"usage":{usage}}}\n\n'.encode()

    def _end(self) -> str:
        if not self._continuous:
            return self._tail
        return f',"usage":{dumps(oc.usage_dict([self._usage]))}}}\n\n'


async def _stream(service: TextService, body: ChatRequest, prepared: PreparedRequest) -> AsyncGenerator[bytes, None]:
    chunks, n = _Chunks(body, prepared), prepared.params.n
    as_ids = bool(body.return_tokens_as_token_ids)
    stream = service.generate(prepared)
    opening: bytes = b""
    try:
        first = True
        async for output in stream:
            if first:
                # Held back until the engine has taken the request, so that a refusal is an HTTP status.
                chunks.begin(output)
                more: dict[str, Any] = {}
                if body.return_token_ids:
                    more["prompt_token_ids"] = list(prepared.prompt_token_ids)
                if output.prompt_logprobs is not None:
                    more["prompt_logprobs"] = oc.prompt_logprobs(output.prompt_logprobs)
                opening = b"".join(
                    chunks.choice(i, {"role": "assistant", "content": ""}, more if i == 0 else None) for i in range(n)
                )
                first = False
            chunks.count(output)
            events = _events(chunks, body, output, as_ids)
            if opening or events:
                yield opening + events
                opening = b""
        yield (chunks.last() if body.include_usage else b"") + DONE
    finally:
        await stream.aclose()


def _events(chunks: _Chunks, body: ChatRequest, output: TextOutput, as_ids: bool) -> bytes:
    """The chunks that one output makes: mostly one, none while text is held back."""
    i, finish = output.index, output.finish_reason
    more: dict[str, Any] = {}
    if output.logprobs is not None:
        more["logprobs"] = oc.chat_logprobs(output.logprobs, as_ids)
    if body.return_token_ids:
        more["token_ids"] = list(output.token_ids)
    if output.events is None:
        if finish is None and not more:
            return chunks.text(i, output.text) if output.text else b""
        new: list[dict[str, Any]] = [{"content": output.text}] if output.text or finish is None else []
    else:
        new = deltas(output.events)
    out = []
    for delta in new or ([{}] if more and finish is None else []):
        out.append(chunks.choice(i, delta, **more))
        more = {}
    if finish is not None:
        ending = {**more, "finish_reason": _finish(finish, output.called), "stop_reason": output.stop_reason}
        out.append(chunks.choice(i, {}, **ending))
    return b"".join(out)
