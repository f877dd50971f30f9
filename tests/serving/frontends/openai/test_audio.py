"""The routes for speech over the mock engine: what is asked of it, and every form of the reply."""

import asyncio
import json
import threading

import numpy as np
import pytest

from serving.media.sound import files as media_sound
from serving.service import Limits
from serving.service.speech import listening
from serving.service.speech.rules import SpeechTokens
from serving.service.speech.transcribe import FRAMES, Speech
from tests.mock_engine import BOS, EOS, MockEngine, mock_service, until
from tests.models.tiny_whisper import sound, wav

TOKENS = SpeechTokens(
    end=EOS, start=BOS, previous=258, transcribe=259, translate=260, no_timestamps=261, languages={"en": 263},
    suppressed=(), suppressed_first=(), latest_first=None,
)  # fmt: skip
SOUND = wav(sound(1.0))


class Speaking(MockEngine):
    """Says its reply whatever the rules allow."""

    def _next(self, request, reply, position):
        return reply[position]


@pytest.fixture
async def running(start):
    engine = Speaking(reply=lambda request: [*b"hi there"])
    return await start(engine, service=mock_service(engine, speech=Speech(TOKENS, 80)))


async def sent(running, path="transcriptions", data=SOUND, **fields):
    return await running.http.post(
        f"/v1/audio/{path}", data={"model": "default", **fields}, files={"file": ("a.wav", data)}
    )


async def test_json_and_what_the_engine_is_asked(running):
    reply = await sent(running, language="en")
    assert reply.status_code == 200 and reply.json() == {
        "text": "hi there",
        "usage": {"type": "duration", "seconds": 1},
    }
    (request,) = running.engine.requests
    assert request.prompt_token_ids == (BOS, 263, 259, 261) and request.eos_token_ids == (EOS,)
    assert request.media.lasting and request.media.items[0].patches_PX.shape == (FRAMES, 80)


async def test_translations_name_their_task(running):
    assert (await sent(running, "translations", language="en")).status_code == 200
    assert running.engine.requests[0].prompt_token_ids == (BOS, 263, 260, 261)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("text", "hi there\n"),
        ("srt", "1\n00:00:00,000 --> 00:00:01,000\nhi there\n\n"),
        ("vtt", "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\nhi there\n\n"),
    ],
)
async def test_texts(running, form, text):
    reply = await sent(running, language="en", response_format=form)
    assert reply.text == text and reply.headers["content-type"].startswith("text/plain")


async def test_verbose_json(running):
    reply = (await sent(running, language="en", response_format="verbose_json")).json()
    assert (reply["task"], reply["language"], reply["duration"], reply["text"]) == ("transcribe", "en", 1.0, "hi there")
    assert reply["segments"][0]["tokens"] == [*b"hi there"] and reply["segments"][0]["end"] == 1.0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"response_format": "xml"}, "response_format"),
        ({"temperature": "hot"}, "temperature"),
        ({"language": "tlh"}, "language"),
        ({"timestamp_granularities[]": "word"}, "verbose_json"),
        ({"timestamp_granularities[]": "line"}, "word and segment"),
        ({"stream": "true", "response_format": "srt"}, "stream"),
        ({"no_speech_threshold": "nan"}, "no_speech_threshold"),
        ({"timeout": "soon"}, "timeout must be a number"),
        ({"timeout": "0"}, "timeout must be more than 0"),
        ({"model": "other"}, "does not exist"),
        ({"data": b"no sound"}, "cannot be read as sound"),
    ],
)
async def test_what_is_wrong_is_said(running, fields, words):
    reply = await sent(running, **fields)
    assert reply.status_code in (400, 404) and words in reply.json()["error"]["message"]


async def test_bodies_that_are_no_forms(running):
    reply = await running.http.post("/v1/audio/transcriptions", json={"file": "a"})
    assert reply.status_code == 400 and "multipart/form-data" in reply.json()["error"]["message"]
    reply = await running.http.post("/v1/audio/transcriptions", data={"model": "default"}, files={"other": b"x"})
    assert reply.status_code == 400


def align(frames, prompt, tokens, sound):
    """Each token takes a tenth of a second."""
    return [0.1 * (i + 1) for i in range(len(tokens))]


async def test_words_have_times(start):
    engine = Speaking(reply=lambda request: [*b"hi there, you"])
    running = await start(engine, service=mock_service(engine, speech=Speech(TOKENS, 80, align)))
    asked = {"response_format": "verbose_json", "timestamp_granularities[]": "word"}
    reply = (await sent(running, language="en", **asked)).json()
    assert reply["words"] == [
        {"word": "hi", "start": 0.0, "end": 0.2},
        {"word": "there,", "start": 0.2, "end": 0.9},
        {"word": "you", "start": 0.9, "end": 1.3},
    ]


async def test_without_heads_that_follow_the_sound_words_have_none(running):
    asked = {"response_format": "verbose_json", "timestamp_granularities[]": "word"}
    assert (await sent(running, language="en", **asked)).status_code == 501


async def test_a_stream(running):
    reply = await sent(running, language="en", stream="true")
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line]
    assert "".join(event["delta"] for event in events[:-1]) == "hi there" and len(events) > 1
    assert {event["type"] for event in events[:-1]} == {"transcript.text.delta"}
    assert events[-1] == {
        "type": "transcript.text.done", "text": "hi there", "usage": {"type": "duration", "seconds": 1},
    }  # fmt: skip


async def test_what_is_wrong_with_a_stream_has_a_status(running):
    assert (await sent(running, data=b"no sound", stream="true")).status_code == 400


async def test_text_that_repeats_itself_is_drawn_again(start):
    def reply(request):
        return [*(b"again " * 30 if request.params.temperature < 0.3 else b"something else")]

    engine = Speaking(reply=reply)
    running = await start(engine, service=mock_service(engine, speech=Speech(TOKENS, 80)))
    assert (await sent(running, language="en")).json()["text"] == "something else"
    assert [request.params.temperature for request in engine.requests] == [0.0, 0.2, 0.4]
    kept = await sent(running, language="en", compression_ratio_threshold="100")
    assert kept.json()["text"].startswith("again again")


async def test_the_official_client(running):
    found = await running.client.audio.transcriptions.create(model="default", file=("a.wav", SOUND), language="en")
    assert found.text == "hi there"


async def test_other_models_transcribe_nothing(start):
    running = await start(MockEngine())
    reply = await sent(running)
    assert reply.status_code == 501 and "transcribes no speech" in reply.json()["error"]["message"]


async def test_who_goes_away_is_worked_for_no_longer(start):
    engine = Speaking(reply=lambda request: [*b"a" * 400], step_s=0.01, max_model_len=1024)
    running = await start(engine, service=mock_service(engine, speech=Speech(TOKENS, 80)))
    for stream in ("false", "true"):
        asked = asyncio.create_task(sent(running, language="en", stream=stream))
        await until(lambda: engine.live, "it runs")
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        await until(lambda: not engine.live, "it was aborted")
    assert len(engine.aborted) == 2


async def test_files_of_all_requests_are_counted_together(start):
    """For as long as they are listened to; they are counted no more when that has ended, however it did."""
    engine = Speaking(reply=lambda request: [*b"a" * 4000], step_s=0.01, max_model_len=8192)
    speech = Speech(TOKENS, 80)
    limits = Limits(max_sounds_bytes=2 * len(SOUND) + 5000)
    running = await start(engine, service=mock_service(engine, speech=speech, limits=limits))
    asked = [asyncio.create_task(sent(running, language="en")) for _ in range(2)]
    await until(lambda: len(engine.live) == 2, "both run")
    reply = await sent(running, language="en")
    assert reply.status_code == 429 and "sound files that requests have sent" in reply.json()["error"]["message"]
    for one in asked:
        one.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    await until(lambda: not speech.files.held, "both are gone")
    assert (await sent(running, language="en", data=b"no sound")).status_code == 400 and not speech.files.held


async def test_a_deadline_in_the_middle_frees_everything(start, monkeypatch):
    """Of a long file: while it is read, and while a later window's text is written."""
    monkeypatch.setattr(listening, "KEPT_BYTES", 100_000)
    hangs, read = threading.Event(), listening.sound_pieces

    def pieces(data, *args):
        for i, piece in enumerate(read(data, *args)):
            if i == 4 and len(args) == 2 and not hangs.is_set():  # the first time that it is read
                hangs.wait(30)
            yield piece

    monkeypatch.setattr(media_sound, "PIECE", 1 << 18)
    reply = lambda request: [*b"a" * (4000 if hangs.is_set() and len(engine.requests) % 2 == 0 else 4)]  # noqa: E731
    engine = Speaking(reply=reply, step_s=0.01, max_model_len=8192)
    speech = Speech(TOKENS, 80)
    running = await start(engine, service=mock_service(engine, speech=speech))
    data = wav(np.zeros(65 * 16_000, np.int16), kind="FLAC", subtype="PCM_16")
    monkeypatch.setattr(listening, "sound_pieces", pieces)
    reply = await sent(running, data=data, language="en", timeout="0.3")
    assert reply.status_code == 504 and reply.json()["error"]["code"] == "deadline_exceeded" and not engine.requests
    hangs.set()
    for stream in ("false", "true"):
        for seconds in (
            "0.5",
            "4",
            "30",
        ):  # on a slow machine it takes longer until the second window's text is written
            engine.requests.clear()
            reply = await sent(running, data=data, language="en", timeout=seconds, stream=stream)
            assert "deadline_exceeded" in reply.text and reply.status_code in (504, 200 if stream == "true" else 504)
            if len(engine.requests) == 2:
                break
        assert len(engine.requests) == 2 and ("aaaa" in reply.text) == (stream == "true")
    await until(lambda: not engine.live, "all have ended")
    await speech.listener.run(int)
    assert speech.listener._held == speech.files.held == 0


FILES = {
    "stereo": (wav(np.stack([sound(1.0)] * 2, 1)), 1),
    "48 kHz": (wav(sound(1.0), 48_000), 1),
    "8 bits": (wav(sound(1.0), subtype="PCM_U8"), 1),
    "24 bits": (wav(sound(1.0), subtype="PCM_24"), 1),
    "flac": (wav(sound(1.0), kind="FLAC", subtype="PCM_16"), 1),
    "ogg": (wav(sound(1.0), kind="OGG", subtype="VORBIS"), 1),
    "opus": (wav(sound(1.0), kind="OGG", subtype="OPUS"), 1),
    "mp3": (wav(sound(1.0), kind="MP3", subtype=None), 2),
    "empty": (b"", None),
    "a header alone": (wav(np.zeros(0, np.float32)), None),
    "one sample": (wav(sound(1.0)[:1]), None),
    "nan": (wav(np.full(16_000, np.nan, np.float32)), None),
    "infinite": (wav(np.full(16_000, np.inf, np.float32)), None),
    "webm": (b"\x1aE\xdf\xa3" + bytes(400), None),
    "m4a": (b"\x00\x00\x00\x20ftypM4A " + bytes(400), None),
    "too many bytes": (bytes(30_001), None),
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
async def test_files_of_every_kind(start, what):
    engine = Speaking(reply=lambda request: [*b"hi there"])
    limits = Limits(max_sound_bytes=200_000 if what != "too many bytes" else 30_000)
    running = await start(engine, service=mock_service(engine, speech=Speech(TOKENS, 80), limits=limits))
    data, seconds = FILES[what]
    reply = await sent(running, data=data, language="en")
    if seconds is None:
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "file" and not engine.requests
    else:
        assert reply.json()["usage"]["seconds"] in (1, seconds), "coders pad"


async def test_large_files_that_come_at_once_are_not_refused_for_one_another(start):
    """They lie on disk as they come: other bodies' bound is not theirs, and who is refused for that is told so."""
    engine = Speaking(reply=lambda request: [*b"hi there"])
    large = wav(np.zeros(16_000 * 60, np.float32))
    limits = Limits(max_bodies_bytes=len(large), max_sounds_bytes=10 * len(large), max_sound_bytes=2 * len(large))
    running = await start(engine, service=mock_service(engine, speech=Speech(TOKENS, 80), limits=limits))
    replies = await asyncio.gather(*(sent(running, data=large, language="en") for _ in range(8)))
    assert {reply.status_code for reply in replies} == {200}
    limits = Limits(max_sounds_bytes=len(large) // 2, max_sound_bytes=2 * len(large))
    running = await start(engine, service=mock_service(engine, speech=Speech(TOKENS, 80), limits=limits))
    reply = await sent(running, data=large, language="en")
    assert reply.status_code == 503 and reply.headers["retry-after"] == "1"


async def test_sound_may_be_larger_than_other_bodies(start):
    engine = Speaking(reply=lambda request: [*b"hi there"])
    limits = Limits(max_body_bytes=1000, max_sound_bytes=100_000)
    running = await start(engine, service=mock_service(engine, speech=Speech(TOKENS, 80), limits=limits))
    assert len(SOUND) > 10_000 and (await sent(running, language="en")).status_code == 200
    reply = await sent(running, data=bytes(2**21))
    assert reply.status_code == 413


async def test_long_sounds_streamed_at_once_of_which_half_are_left(start, monkeypatch):
    """16 of them: what stays is worked for to its end, and of neither kind anything is held behind it."""
    monkeypatch.setattr(listening, "KEPT_BYTES", 100_000)
    engine = Speaking(reply=lambda request: [*b"hi"], step_s=0.002)
    speech = Speech(TOKENS, 80)
    running = await start(engine, service=mock_service(engine, speech=speech))
    data = wav((sound(65.0) * 32767).astype(np.int16), kind="FLAC", subtype="PCM_16")

    async def listened(leaves: bool) -> str:
        form = {"data": {"model": "default", "language": "en", "stream": "true"}, "files": {"file": ("a.flac", data)}}
        text = ""
        async with running.http.stream("POST", "/v1/audio/transcriptions", timeout=60, **form) as reply:
            async for line in reply.aiter_lines():
                text += line
                if leaves and "delta" in line:
                    return text
        return text

    found = await asyncio.gather(*(listened(i % 2 == 0) for i in range(16)))
    assert all("transcript.text.done" in text for text in found[1::2])
    assert not any("transcript.text.done" in text for text in found[::2])
    await until(lambda: not engine.live, "all have ended")
    assert speech.listener._held == 0
