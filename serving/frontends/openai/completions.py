"""/v1/completions."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from serving.errors import named
from serving.frontends.http.bodies import body_of, takes
from serving.frontends.http.sse import dumps, open_stream, quote, unless_gone
from serving.frontends.openai import outcome as oc
from serving.frontends.openai.errors import DONE, RESPONSES, error_event
from serving.frontends.openai.protocol.completions import CompletionReply, CompletionRequest
from serving.service import Choice, Outcome, PreparedRequest, Served, TextOutput, TextService, TokenLogprob, Usage
from serving.service.replies.merging import merge


def completions_router(served: Served) -> APIRouter:
    """The completions endpoint over `served`."""
    router = APIRouter(tags=["completions"], responses=RESPONSES)

    @router.post(
        "/v1/completions",
        response_model=CompletionReply,
        responses={200: {"content": {"text/event-stream": {}}, "description": "A reply, or a stream of chunks."}},
        openapi_extra=takes(CompletionRequest),
    )
    async def create(
        body: Annotated[CompletionRequest, Depends(body_of(CompletionRequest))], request: Request
    ) -> Response:
        """Completes one or more prompts. Choices are ordered by prompt, then by completion."""
        body.check_stream_options()
        service = served.of(body.model)
        with named(body.names()):
            params = service.make_params(body.params())
            prompts = body.prompts()
            service.limits.check_count("prompts", len(prompts), service.limits.max_batch, "prompt")
            sequences = len(prompts) * params.n
            service.limits.check_count("completions (prompts times n)", sequences, service.limits.max_sequences, "n")
            rid = request.state.request_id
            prepared = [await service.prepare(body.to_input(prompt, rid), params) for prompt in prompts]
        echoes = [await _Echo.of(service, one, body) for one in prepared]
        if body.stream:
            events = _stream(service, body, prepared, echoes)
            return await open_stream(request, events, error_event, waits_for=service.waits_for)
        return JSONResponse(await unless_gone(request, _whole(service, body, prepared, echoes)))

    return router


class _Echo:
    """What of the prompt comes back in front of a completion: nothing, unless `echo`.

    Attributes:
        text: its text.
        first: the first token, as logprobs name it.
        offsets: where each of its tokens begins in `text`.
    """

    def __init__(self, text: str, first: str = "", offsets: Sequence[int] = ()) -> None:
        self.text = text
        self.first = first
        self.offsets = offsets

    @classmethod
    async def of(cls, service: TextService, prepared: PreparedRequest, body: CompletionRequest) -> _Echo:
        if not body.echo:
            return cls("")
        ids = prepared.prompt_token_ids
        text = prepared.prompt
        if text is None or body.truncate_prompt_tokens is not None:
            text = await service.detokenize(
                ids, skip_special_tokens=body.skip_special_tokens is not False, model=body.model
            )
        if body.logprobs is None:
            return cls(text)
        first = prepared.tokenizer.token_bytes(ids[0]).decode("utf-8", errors="replace")
        if body.return_tokens_as_token_ids:
            first = f"token_id:{ids[0]}"
        return cls(text, first, await service.offsets(ids, text, body.model))


def _reply_id(prepared: list[PreparedRequest]) -> str:
    return f"cmpl-{prepared[0].request_id}"


async def _whole(
    service: TextService, body: CompletionRequest, prepared: list[PreparedRequest], echoes: list[_Echo]
) -> dict[str, Any]:
    n = prepared[0].params.n
    outcomes = [Outcome([Choice() for _ in range(n)]) for _ in prepared]
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
        **oc.transfer_of(outcomes[0], service),
    }


def _choice(
    body: CompletionRequest, prepared: PreparedRequest, echo: _Echo, outcome: Outcome, index: int, choice: Choice
) -> dict[str, Any]:
    made = Choice(finish_reason=choice.finish_reason) if body.only_prompt else choice
    logprobs = None
    if body.logprobs is not None:
        before = outcome.prompt_logprobs or () if body.echo else ()
        entries, start = made.logprobs or (), len(echo.text)
        offsets = [*echo.offsets[: len(before)], *(start + min(e.start, len(made.text)) for e in entries)]
        as_ids = bool(body.return_tokens_as_token_ids)
        logprobs = oc.completion_logprobs([*before, *entries], offsets, echo.first, as_ids)
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
    choices = [_StreamedChoice(body, prepared[i // n], echoes[i // n], i) for i in range(n * len(prepared))]
    merged = _with_prompt_logprobs(body, merge([service.generate(one) for one in prepared]))
    try:
        async for number, output in merged:
            usages[number].add(output)
            if body.only_prompt:
                usages[number].completion_tokens = 0
            item = choices[number * n + output.index].json(output)
            if item is None:
                continue
            tail = "}\n\n"
            if body.continuous_usage:
                tail = f',"usage":{dumps(oc.usage_dict(usages))}}}\n\n'
            elif body.include_usage:
                tail = ',"usage":null}\n\n'
            yield f"{head}{item}]{tail}".encode()
        last = f'{head}],"usage":{dumps(oc.usage_dict(usages))}}}\n\n'.encode() if body.include_usage else b""
        yield last + DONE
    finally:
        await merged.aclose()


async def _with_prompt_logprobs(
    body: CompletionRequest, outputs: AsyncGenerator[tuple[int, TextOutput], None]
) -> AsyncGenerator[tuple[int, TextOutput], None]:
    """Gives each completion its prompt's logprobs, which the service tells once: outputs of the others wait for it."""
    known: dict[int, tuple[TokenLogprob | None, ...]] = {}
    waiting: dict[int, list[TextOutput]] = {}
    started: set[tuple[int, int]] = set()
    async with contextlib.aclosing(outputs):
        async for number, output in outputs:
            if not body.echo or body.logprobs is None:
                yield number, output
                continue
            if output.prompt_logprobs is not None:
                known[number] = output.prompt_logprobs
            waiting.setdefault(number, []).append(output)
            if number not in known:
                continue
            for held in waiting.pop(number):
                if (number, held.index) not in started:
                    started.add((number, held.index))
                    held = dataclasses.replace(held, prompt_logprobs=known[number])
                yield number, held


class _StreamedChoice:
    """Writes the chunks of one choice."""

    def __init__(self, body: CompletionRequest, prepared: PreparedRequest, echo: _Echo, index: int) -> None:
        self._body = body
        self._prepared = prepared
        self._echo = echo
        self._index = index
        self._started = False
        self._num_chars = 0  # of the completion, told so far
        self._plain = body.logprobs is None and not body.return_token_ids and body.prompt_logprobs is None
        self._head = f'{{"index":{index},"text":'

    def json(self, output: TextOutput) -> str | None:
        """The choice as JSON, or None when there is nothing to tell yet."""
        text = "" if self._body.only_prompt else output.text
        self._num_chars += len(text)
        is_first, self._started = not self._started, True
        if is_first:
            text = self._echo.text + text
        if not self._plain:
            return dumps(self._full(output, text, is_first))
        if output.finish_reason is None:
            # Nearly all chunks: written by hand, json.dumps of the dictionary costs ten times as much.
            return f'{self._head}{quote(text)},"logprobs":null,"finish_reason":null}}' if text else None
        ending = f'"finish_reason":"{output.finish_reason.value}","stop_reason":{dumps(output.stop_reason)}'
        return f'{self._head}{quote(text)},"logprobs":null,{ending}}}'

    def _full(self, output: TextOutput, text: str, is_first: bool) -> dict[str, Any]:
        body, finish = self._body, output.finish_reason
        item: dict[str, Any] = {
            "index": self._index,
            "text": text,
            "logprobs": self._logprobs(output) if body.logprobs is not None else None,
            "finish_reason": finish.value if finish else None,
        }
        if body.return_token_ids:
            item["token_ids"] = [] if body.only_prompt else list(output.token_ids)
            if is_first:
                item["prompt_token_ids"] = list(self._prepared.prompt_token_ids)
        if body.prompt_logprobs is not None and output.prompt_logprobs is not None:
            item["prompt_logprobs"] = oc.prompt_logprobs(output.prompt_logprobs)
        if finish is not None:
            item["stop_reason"] = output.stop_reason
        return item

    def _logprobs(self, output: TextOutput) -> dict[str, Any]:
        echo, start = self._echo, len(self._echo.text)
        before = (output.prompt_logprobs or ()) if self._body.echo else ()
        made = () if self._body.only_prompt else output.logprobs or ()
        offsets = [*echo.offsets[: len(before)], *(start + min(e.start, self._num_chars) for e in made)]
        as_ids = bool(self._body.return_tokens_as_token_ids)
        return oc.completion_logprobs([*before, *made], offsets, echo.first, as_ids)
