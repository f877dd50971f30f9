"""/v1/completions."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serving.frontends.openai import outcome as oc
from serving.frontends.openai.errors import RESPONSES, error_event
from serving.frontends.openai.protocol.completions import CompletionReply, CompletionRequest
from serving.frontends.openai.sse import DONE, merge, open_stream, quote, unless_gone
from serving.service import PreparedRequest, TextOutput, TextService, Usage


def completions_router(service: TextService) -> APIRouter:
    """The completions endpoint over `service`."""
    router = APIRouter(tags=["completions"], responses=RESPONSES)

    @router.post(
        "/v1/completions",
        response_model=CompletionReply,
        responses={200: {"content": {"text/event-stream": {}}, "description": "A reply, or a stream of chunks."}},
    )
    async def create(body: CompletionRequest, request: Request) -> Response:
        """Completes one or more prompts. Choices are ordered by prompt, then by completion."""
        body.check_stream_options()
        params = service.make_params(body.params())
        prompts = body.prompts()
        service.limits.check_count("prompts", len(prompts), service.limits.max_batch, "prompt")
        sequences = len(prompts) * params.n
        service.limits.check_count("completions (prompts times n)", sequences, service.limits.max_sequences, "n")
        rid = request.state.request_id
        prepared = [await service.prepare(body.to_input(prompt, rid), params) for prompt in prompts]
        echoes = [await _Echo.of(service, one, body) for one in prepared]
        if body.stream:
            return await open_stream(request, _stream(service, body, prepared, echoes), error_event)
        return JSONResponse(await unless_gone(request, _whole(service, body, prepared, echoes)))

    return router


class _Echo:
    """What of the prompt comes back in front of a completion: nothing, unless `echo`."""

    def __init__(self, text: str, first: str = "", shown: bool = False) -> None:
        self.text = text
        self.first = first  # the first token, as logprobs name it
        self.first_chars = len(first) if shown else 0

    @classmethod
    async def of(cls, service: TextService, prepared: PreparedRequest, body: CompletionRequest) -> _Echo:
        if not body.echo:
            return cls("")
        ids = prepared.prompt_token_ids
        text = prepared.prompt
        if text is None or body.truncate_prompt_tokens is not None:
            text = await service.detokenize(ids, skip_special_tokens=body.skip_special_tokens is not False)
        first = service.tokenizer.token_bytes(ids[0]).decode("utf-8", errors="replace")
        echo = cls(text, first, text.startswith(first))
        if body.return_tokens_as_token_ids:
            echo.first = f"token_id:{ids[0]}"
        return echo


def _reply_id(prepared: list[PreparedRequest]) -> str:
    return f"cmpl-{prepared[0].request_id}"


async def _whole(
    service: TextService, body: CompletionRequest, prepared: list[PreparedRequest], echoes: list[_Echo]
) -> dict[str, Any]:
    n = prepared[0].params.n
    outcomes = [oc.Outcome([oc.Choice() for _ in range(n)]) for _ in prepared]
    async for number, output in merge([service.generate(one) for one in prepared]):
        outcomes[number].add(output)
    choices = [
        _choice(body, prepared[p], echoes[p], outcome, p * n + i, choice)
        for p, outcome in enumerate(outcomes)
        for i, choice in enumerate(outcome.choices)
    ]
    if body.only_prompt:
        for outcome in outcomes:
            outcome.usage.completion_tokens = 0
    return {
        "id": _reply_id(prepared),
        "object": "text_completion",
        "created": int(time.time()),
        "model": prepared[0].model,
        "choices": choices,
        "usage": oc.usage_dict(outcome.usage for outcome in outcomes),
        "system_fingerprint": None,
    }


def _choice(
    body: CompletionRequest, prepared: PreparedRequest, echo: _Echo, outcome: oc.Outcome, index: int, choice: oc.Choice
) -> dict[str, Any]:
    made = oc.Choice(finish_reason=choice.finish_reason) if body.only_prompt else choice
    logprobs = None
    if body.logprobs is not None:
        before = outcome.prompt_logprobs or () if body.echo else ()
        offset = 0 if before else len(echo.text)
        logprobs = oc.completion_logprobs(
            [*before, *(made.logprobs or ())],
            echo.first,
            echo.first_chars,
            offset,
            bool(body.return_tokens_as_token_ids),
        )
    item: dict[str, Any] = {
        "index": index,
        "text": echo.text + made.text,
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason.value if choice.finish_reason else None,
        "stop_reason": made.stop_reason,
    }
    if body.prompt_logprobs is not None:
        item["prompt_logprobs"] = oc.prompt_logprobs(outcome.prompt_logprobs)
    if body.return_token_ids:
        item["token_ids"] = made.token_ids
        item["prompt_token_ids"] = list(prepared.prompt_token_ids)
    return item


async def _stream(
    service: TextService, body: CompletionRequest, prepared: list[PreparedRequest], echoes: list[_Echo]
) -> AsyncGenerator[bytes, None]:
    n = prepared[0].params.n
    head = (
        f'data: {{"id":{quote(_reply_id(prepared))},"object":"text_completion","created":{int(time.time())},'
        f'"model":{quote(prepared[0].model)},"system_fingerprint":null,"choices":['
    )
    usages = [Usage() for _ in prepared]
    offsets = [0] * (n * len(prepared))
    started: set[int] = set()
    merged = merge([service.generate(one) for one in prepared])
    try:
        async for number, output in merged:
            usages[number].add(output)
            if body.only_prompt:
                usages[number].completion_tokens = 0
            index = number * n + output.index
            is_first = index not in started
            started.add(index)
            item = _stream_choice(body, prepared[number], echoes[number], output, index, is_first, offsets)
            if item is None:
                continue
            tail = "}\n\n"
            if body.continuous_usage:
                tail = f',"usage":{json.dumps(oc.usage_dict(usages))}}}\n\n'
            elif body.include_usage:
                tail = ',"usage":null}\n\n'
            yield f"{head}{item}]{tail}".encode()
        last = f'{head}],"usage":{json.dumps(oc.usage_dict(usages))}}}\n\n'.encode() if body.include_usage else b""
        yield last + DONE
    finally:
        await merged.aclose()


def _stream_choice(
    body: CompletionRequest,
    prepared: PreparedRequest,
    echo: _Echo,
    output: TextOutput,
    index: int,
    is_first: bool,
    offsets: list[int],
) -> str | None:
    """One chunk's choice as JSON, or None when there is nothing to tell yet."""
    text = "" if body.only_prompt else output.text
    if is_first:
        text = echo.text + text
    finish = output.finish_reason.value if output.finish_reason else None
    if body.logprobs is None and not body.return_token_ids and output.prompt_logprobs is None:
        if finish is None:
            # Nearly all chunks: written by hand, json.dumps of the dictionary costs ten times as much.
            plain = f'{{"index":{index},"text":{quote(text)},"logprobs":null,"finish_reason":null}}'
            return plain if text else None
        reason = f'"finish_reason":"{finish}","stop_reason":{json.dumps(output.stop_reason)}'
        return f'{{"index":{index},"text":{quote(text)},"logprobs":null,{reason}}}'
    item: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
    if body.logprobs is not None:
        before = (output.prompt_logprobs or ()) if body.echo else ()
        made = () if body.only_prompt else output.logprobs or ()
        if is_first and not before:
            offsets[index] = len(echo.text)
        as_ids = bool(body.return_tokens_as_token_ids)
        item["logprobs"] = oc.completion_logprobs(
            [*before, *made], echo.first, echo.first_chars, offsets[index], as_ids
        )
        if before:
            offsets[index] = len(echo.text)
        offsets[index] += sum(len(entry.token) for entry in made)
    if body.return_token_ids:
        item["token_ids"] = [] if body.only_prompt else list(output.token_ids)
        if is_first:
            item["prompt_token_ids"] = list(prepared.prompt_token_ids)
    if body.prompt_logprobs is not None and output.prompt_logprobs is not None:
        item["prompt_logprobs"] = oc.prompt_logprobs(output.prompt_logprobs)
    if finish is not None:
        item["stop_reason"] = output.stop_reason
    return json.dumps(item, ensure_ascii=False)
