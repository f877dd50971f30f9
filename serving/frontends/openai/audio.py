"""/v1/audio/transcriptions and /v1/audio/translations. https://platform.openai.com/docs/api-reference/audio"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.datastructures import FormData, UploadFile

from serving.errors import ErrorKind, RequestError, invalid
from serving.frontends.http.sse import open_stream, unless_gone
from serving.frontends.openai.errors import RESPONSES, error_event
from serving.service import Served, TextService
from serving.service.speech.doubts import Doubts
from serving.service.speech.segments import FORMS, Segment
from serving.service.speech.transcribe import TranscribeInput, Transcript, transcribe
from serving.service.speech.words import Word

FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
THRESHOLDS = {
    "compression_ratio_threshold": "compression", "logprob_threshold": "logprob", "no_speech_threshold": "no_speech",
}  # fmt: skip
"""Fields with which a client moves the bounds of what is doubtful, as transformers calls them."""
FIELDS = ("model", "language", "prompt", "response_format", "temperature", "stream", "timeout", *THRESHOLDS)
MAX_FIELDS = 32
FORM = {"multipart/form-data": {"schema": {
    "type": "object", "required": ["file", "model"],
    "properties": {
        "file": {"type": "string", "format": "binary"}, "model": {"type": "string"}, "language": {"type": "string"},
        "prompt": {"type": "string"}, "response_format": {"type": "string", "enum": list(FORMATS)},
        "temperature": {"type": "number", "minimum": 0, "maximum": 1},
        "timestamp_granularities[]": {"type": "array", "items": {"type": "string", "enum": ["word", "segment"]}},
        "stream": {"type": "boolean"}, "compression_ratio_threshold": {"type": "number"}, "logprob_threshold": {"type": "number"},
        "no_speech_threshold": {"type": "number"},
        "timeout": {"type": "number", "description": "Seconds by which the reply must be complete."},
    },
}}}  # fmt: skip


def audio_router(served: Served) -> APIRouter:
    """Speech to text."""
    router = APIRouter(tags=["audio"], responses=RESPONSES)
    form: dict[str, Any] = {"requestBody": {"required": True, "content": FORM}}

    async def answer(request: Request, task: str) -> Response:
        if request.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            raise RequestError(ErrorKind.PERMISSION_DENIED, "Web pages of other origins may send no files here.")
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise invalid("Sound comes as multipart/form-data, with the fields file and model.", "file")
        async with request.form(max_files=1, max_fields=MAX_FIELDS) as sent:
            form, given = await _read(sent, task, served.limits.max_sound_bytes)
        service = served.of(form.get("model"))
        model = form.get("model")
        if form.get("stream", "false").lower() in ("true", "1"):
            if form.get("response_format", "json") not in ("json", "text"):
                raise invalid("stream goes with response_format json or text.", "stream")
            return await open_stream(request, _events(service, given, model), error_event, waits_for=service.waits_for)
        transcript = await unless_gone(request, transcribe(service, given, model))
        return _reply(transcript, form.get("response_format", "json"), given.words)

    @router.post("/v1/audio/transcriptions", openapi_extra=form)
    async def transcriptions(request: Request) -> Response:
        """What is said in a sound file, in its language."""
        return await answer(request, "transcribe")

    @router.post("/v1/audio/translations", openapi_extra=form)
    async def translations(request: Request) -> Response:
        """What is said in a sound file, in English."""
        return await answer(request, "translate")

    return router


async def _read(sent: FormData, task: str, most: int) -> tuple[dict[str, str], TranscribeInput]:
    """(the fields that are texts, what is asked for)."""
    content = sent.get("file")
    if not isinstance(content, UploadFile):
        raise invalid("Missing required parameter: 'file'.", "file")
    if (content.size or 0) > most:
        raise invalid(
            f"file has {content.size} bytes; at most {most} are taken. Send it compressed, or in parts.", "file"
        )
    form = {name: value for name in FIELDS if isinstance(value := sent.get(name), str) and value}
    shape = form.get("response_format", "json")
    if shape not in FORMATS:
        raise invalid(f"Invalid value for 'response_format': it takes {', '.join(FORMATS)}.", "response_format")
    kinds = {*sent.getlist("timestamp_granularities[]"), *sent.getlist("timestamp_granularities")}
    if kinds - {"segment", "word"}:
        raise invalid("timestamp_granularities takes word and segment.", "timestamp_granularities")
    words = "word" in kinds
    if words and shape != "verbose_json":
        raise invalid("timestamp_granularities go with response_format verbose_json.", "timestamp_granularities")
    temperature = _number(form, "temperature") or 0.0
    timeout = _number(form, "timeout") if "timeout" in form else None
    bounds: dict[str, Any] = {field: _number(form, name) for name, field in THRESHOLDS.items() if name in form}
    segments = shape in ("srt", "vtt", "verbose_json")
    data = await content.read()
    return form, TranscribeInput(
        data, task, form.get("language"), form.get("prompt"), temperature, segments, words, Doubts(**bounds), timeout
    )


def _number(form: Mapping[str, str], name: str) -> float | None:
    try:
        found = float(form.get(name, "0"))
    except ValueError:
        found = math.nan
    if math.isnan(found):
        raise invalid(f"{name} must be a number.", name)
    return found


async def _events(service: TextService, given: TranscribeInput, model: str | None) -> AsyncGenerator[bytes, None]:
    """The text as server-sent events: `transcript.text.delta` as it becomes certain, then `transcript.text.done` with the whole."""
    told: asyncio.Queue[str | Transcript | BaseException] = asyncio.Queue()

    async def run() -> None:
        try:
            told.put_nowait(await transcribe(service, given, model, told.put_nowait))
        except BaseException as error:  # whoever reads the stream is told
            told.put_nowait(error)

    task = asyncio.create_task(run())
    try:
        while isinstance(item := await told.get(), str):
            yield _event({"type": "transcript.text.delta", "delta": item})
        if isinstance(item, BaseException):
            raise item
        usage = {"type": "duration", "seconds": math.ceil(item.duration)}
        yield _event({"type": "transcript.text.done", "text": item.text, "usage": usage})
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _event(content: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


def _reply(transcript: Transcript, shape: str, words: bool) -> Response:
    if shape == "text":
        return PlainTextResponse(transcript.text + "\n")
    if shape in FORMS:
        return PlainTextResponse(FORMS[shape](transcript.segments))
    usage = {"type": "duration", "seconds": math.ceil(transcript.duration)}
    if shape == "json":
        return JSONResponse({"text": transcript.text, "usage": usage})
    return JSONResponse(
        {
            "task": transcript.task,
            "language": transcript.language,
            "duration": round(transcript.duration, 3),
            "text": transcript.text,
            "segments": [_segment(index, segment) for index, segment in enumerate(transcript.segments)],
            **({"words": [_word(word) for word in transcript.words]} if words else {}),
            "usage": usage,
        }
    )


def _word(word: Word) -> dict[str, Any]:
    return {"word": word.text, "start": round(word.start, 2), "end": round(word.end, 2)}


def _segment(index: int, segment: Segment) -> dict[str, Any]:
    return {
        "id": index,
        "seek": segment.seek,
        "start": round(segment.start, 2),
        "end": round(segment.end, 2),
        "text": segment.text,
        "tokens": list(segment.tokens),
        "temperature": segment.temperature,
        "avg_logprob": segment.avg_logprob,
        "compression_ratio": segment.compression_ratio,
        "no_speech_prob": segment.no_speech,
    }
