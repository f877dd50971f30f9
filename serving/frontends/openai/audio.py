"""/v1/audio/transcriptions and /v1/audio/translations. https://platform.openai.com/docs/api-reference/audio"""

from __future__ import annotations

import math
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.datastructures import FormData, UploadFile

from serving.errors import ErrorKind, RequestError, invalid
from serving.frontends.openai.errors import RESPONSES
from serving.service import Served
from serving.service.speech.segments import FORMS, Segment
from serving.service.speech.transcribe import TranscribeInput, Transcript, transcribe

FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
FIELDS = ("model", "language", "prompt", "response_format", "temperature")
MAX_FIELDS = 32
FORM = {"multipart/form-data": {"schema": {
    "type": "object", "required": ["file", "model"],
    "properties": {
        "file": {"type": "string", "format": "binary"}, "model": {"type": "string"}, "language": {"type": "string"},
        "prompt": {"type": "string"}, "response_format": {"type": "string", "enum": list(FORMATS)},
        "temperature": {"type": "number", "minimum": 0, "maximum": 1},
        "timestamp_granularities[]": {"type": "array", "items": {"type": "string", "enum": ["segment"]}},
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
            form, given = await _read(sent, task)
        transcript = await transcribe(served.of(form.get("model")), given, form.get("model"))
        return _reply(transcript, form.get("response_format", "json"))

    @router.post("/v1/audio/transcriptions", openapi_extra=form)
    async def transcriptions(request: Request) -> Response:
        """What is said in a sound file, in its language."""
        return await answer(request, "transcribe")

    @router.post("/v1/audio/translations", openapi_extra=form)
    async def translations(request: Request) -> Response:
        """What is said in a sound file, in English."""
        return await answer(request, "translate")

    return router


async def _read(sent: FormData, task: str) -> tuple[dict[str, str], TranscribeInput]:
    """(the fields that are texts, what is asked for)."""
    content = sent.get("file")
    if not isinstance(content, UploadFile):
        raise invalid("Missing required parameter: 'file'.", "file")
    form = {name: value for name in FIELDS if isinstance(value := sent.get(name), str) and value}
    shape = form.get("response_format", "json")
    if shape not in FORMATS:
        raise invalid(f"Invalid value for 'response_format': it takes {', '.join(FORMATS)}.", "response_format")
    kinds = [*sent.getlist("timestamp_granularities[]"), *sent.getlist("timestamp_granularities")]
    if any(kind != "segment" for kind in kinds):
        raise invalid(
            "timestamp_granularities takes segment; times of words are not told here.", "timestamp_granularities"
        )
    try:
        temperature = float(form.get("temperature", "0"))
    except ValueError:
        raise invalid("temperature must be a number between 0 and 1.", "temperature") from None
    segments = shape in ("srt", "vtt", "verbose_json")
    data = await content.read()
    return form, TranscribeInput(data, task, form.get("language"), form.get("prompt"), temperature, segments)


def _reply(transcript: Transcript, shape: str) -> Response:
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
            "usage": usage,
        }
    )


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
        "no_speech_prob": None,
    }
