"""Sound files, and sounds in chats, through a gateway: HTTP -> gateway -> gRPC -> an engine."""

from __future__ import annotations

import dataclasses
import json

import httpx
import pytest

from serving.errors import ErrorKind, RequestError
from serving.frontends.app import create_app, serve_http
from serving.frontends.grpc import speech as wire
from serving.frontends.grpc.client import RemoteEngineClient
from serving.frontends.grpc.server import GrpcServer
from serving.frontends.openai.batches.runner import call_app
from serving.gateway import Pool, speech
from serving.gateway.speech import RemoteSpeech
from serving.media import MediaPolicy, MediaReader
from serving.media.processors.audio import AudioProcessor
from serving.service.speech.doubts import Doubts
from serving.service.speech.segments import Segment
from serving.service.speech.transcribe import Speech
from serving.service.speech.transcripts import TranscribeInput, Transcript
from serving.service.speech.words import Word
from tests.mock_engine import MockEngine, mock_service
from tests.serving.frontends.openai.test_audio import SOUND, TOKENS, Speaking
from tests.serving.media.images import asked
from tests.serving.media.test_clips import CONFIG, HEARS, WAYS, SoundTemplate, sound_service


@pytest.fixture
async def gateway():
    """(HTTP client of a gateway, the engine behind it)."""
    engine, server = Speaking(reply=lambda request: [*b"hi there"]), GrpcServer("127.0.0.1", 0)
    await server.start()
    await server.serve(mock_service(engine, speech=Speech(TOKENS, 80)))
    client = await RemoteEngineClient.connect(f"127.0.0.1:{server.port}")
    pool = Pool([client])  # type: ignore[list-item]
    http = await serve_http(mock_service(pool, speech=RemoteSpeech(pool)), port=0)  # type: ignore[arg-type]
    async with httpx.AsyncClient(base_url=http.url, timeout=60) as web:
        yield web, engine
    await http.stop()
    await client.close()
    await server.stop(0.0)


async def sent(web, path="transcriptions", data=SOUND, **fields):
    return await web.post(f"/v1/audio/{path}", data={"model": "default", **fields}, files={"file": ("a.wav", data)})


async def test_every_form_of_the_reply(gateway):
    web, engine = gateway
    reply = await sent(web, language="en")
    assert reply.status_code == 200 and reply.json()["text"] == "hi there"
    assert (await sent(web, "translations", language="en", response_format="text")).text == "hi there\n"
    verbose = (await sent(web, language="en", response_format="verbose_json", logprob_threshold="-2")).json()
    assert (
        verbose["duration"] == 1.0
        and verbose["segments"][0]["text"] == "hi there"
        and verbose["segments"][0]["seek"] == 0
    )
    assert "hi there" in (await sent(web, language="en", response_format="srt")).text
    streamed = (await sent(web, language="en", stream="true")).text
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert events[-1]["type"] == "transcript.text.done" and events[-1]["text"] == "hi there"
    assert "".join(one["delta"] for one in events[:-1]) == "hi there"
    assert len(engine.requests) == 5


async def test_what_an_engine_refuses_is_told_in_its_words(gateway, monkeypatch):
    web, engine = gateway
    for data, fields, match in (
        (b"nonsense", {"language": "en"}, "cannot be read as sound"),
        (SOUND, {"language": "xx"}, "language must be one of"),
    ):
        reply = await sent(web, data=data, **fields)
        assert reply.status_code == 400 and match in reply.json()["error"]["message"]
    monkeypatch.setattr(speech, "MAX_BYTES", 100)
    reply = await sent(web, language="en")
    assert reply.status_code == 400 and "through a gateway at most 100" in reply.json()["error"]["message"]
    assert not engine.requests


class Failing:
    """Engines of which the first ends in the middle."""

    def __init__(self, begins: bool) -> None:
        self.begins, self.asked = begins, 0

    async def once(self, call):
        try:
            return await call(self)
        except RequestError as error:
            if error.kind is not ErrorKind.UNAVAILABLE:
                raise
            return await call(self)

    async def transcribe(self, given, tell):
        self.asked += 1
        if self.asked == 1:
            if self.begins:
                tell("hi")
            raise RequestError(ErrorKind.UNAVAILABLE, "Gone.")
        return Transcript("transcribe", "en", 1.0, ())


async def test_another_engine_is_tried_before_anything_was_told_and_never_behind():
    told: list[str] = []
    pool = Failing(False)
    assert (await RemoteSpeech(pool).transcribe(None, TranscribeInput(b""), told.append)).duration == 1.0  # type: ignore[arg-type]
    assert pool.asked == 2 and told == []
    pool = Failing(True)
    with pytest.raises(RequestError, match="Gone") as lost:
        await RemoteSpeech(pool).transcribe(None, TranscribeInput(b""), told.append)  # type: ignore[arg-type]
    assert lost.value.kind is ErrorKind.INTERNAL and pool.asked == 1 and told == ["hi"]


def test_what_goes_over_the_wire_comes_back():
    given = TranscribeInput(
        SOUND, "translate", "de", "names", 0.5, True, True,
        Doubts(2.0, -2.0, 0.5), request_id="a",
    )  # fmt: skip
    assert wire.input_from(wire.request_of(given, True)) == given
    plain = TranscribeInput(b"x", request_id="b")
    assert wire.input_from(wire.request_of(plain, False)) == plain
    words = (Word("hi", 0.5, 0.75, 0),)
    segments = (
        Segment(7, 0.0, 1.0, (1, 2), " hi", 0.25, -0.5, 0.125, words),
        Segment(9, 1.0, 2.0, (3,), " you", 0.0, None),
    )
    said = Transcript("transcribe", "en", 2.0, segments)
    assert wire.transcript_from(wire.transcript_to(said), "transcribe") == said


@pytest.mark.parametrize("family", ["Qwen2-Audio", "Ultravox"])
async def test_sounds_in_chats(family):
    """The engine hears what the gateway has read, also where no token stands for it."""
    hears = HEARS if family == "Qwen2-Audio" else AudioProcessor.ultravox(CONFIG | {"stack_factor": 8})
    engine, server, own = (
        MockEngine(reply="heard", max_model_len=512),
        GrpcServer("127.0.0.1", 0),
        MockEngine(reply="heard", max_model_len=512),
    )
    engine._info = dataclasses.replace(engine.info(), modalities=("audio",))
    await server.start()
    await server.serve(sound_service(engine, processor=hears))
    client = await RemoteEngineClient.connect(f"127.0.0.1:{server.port}")
    reader = MediaReader(hears, MediaPolicy(), 200, sends_on=True)
    service = mock_service(Pool([client]), template=SoundTemplate(), media=reader)  # type: ignore[arg-type,list-item]
    http = await serve_http(service, port=0)
    body = {"messages": asked("a", WAYS["openai"], "then", WAYS["vllm"], "b"), "max_tokens": 5}
    async with httpx.AsyncClient(base_url=http.url, timeout=60) as web:
        reply = await web.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200 and reply.json()["choices"][0]["message"]["content"] == "heard"
    status, _ = await call_app(
        create_app(sound_service(own, processor=hears), page=False), "/v1/chat/completions", body, "a"
    )
    assert status == 200
    (seen,), (wanted,) = engine.requests, own.requests
    assert seen.prompt_token_ids == wanted.prompt_token_ids
    assert [item.digest for item in seen.media.items] == [item.digest for item in wanted.media.items]
    assert [item.places_N.tolist() for item in seen.media.items] == [
        item.places_N.tolist() for item in wanted.media.items
    ]
    await http.stop()
    await client.close()
    await server.stop(0.0)
