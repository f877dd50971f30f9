"""Sounds through every entry that takes them, down to what the engine is asked; those that are refused, and those that are sent to
do harm. Over the mock engine, with Qwen2-Audio's and Ultravox's ways of hearing."""

import base64
import struct
import tracemalloc

import numpy as np
import pytest

from proto.jaxserve.v1 import inference_pb2 as pb
from serving.errors import ErrorKind, RequestError
from serving.frontends.app import create_app
from serving.frontends.grpc.convert import input_from
from serving.frontends.openai.batches.runner import call_app
from serving.media import MediaPolicy, MediaReader
from serving.media.processors.audio import PLACE as NOWHERE
from serving.media.processors.audio import AudioProcessor
from serving.media.sound import files
from serving.service import GenerateInput
from serving.text import chat_template
from tests.mock_engine import SPECIAL, MockEngine, MockTemplate, mock_service
from tests.models.tiny_whisper import sound, wav
from tests.serving.media.images import asked, encoded, part, uri

PLACE = 256 + SPECIAL.index("<|tool|>")
CONFIG = {
    "audio_config": {"max_source_positions": 100, "num_mel_bins": 16},
    "audio_token_index": PLACE,
    "eos_token_id": 7,
}
HEARS = AudioProcessor.qwen2(CONFIG)
SHORT = sound(0.7, 1)
FILE = wav(SHORT)
BASE64 = base64.b64encode(FILE).decode()
PLACES = 17


class SoundTemplate(MockTemplate):
    """The mock template, with `<|tool|>` where a sound is."""

    def render(self, messages, *args, **kwargs):
        shown = [{**m, "content": [_shown(p) for p in _parts(m["content"])]} for m in messages]
        return super().render(shown, *args, **kwargs)

    def encode(self, tokenizer, messages, rewrite=None, **kwargs):
        if rewrite is None:
            return super().encode(tokenizer, messages, **kwargs)
        texts = rewrite(self.render(messages, **kwargs))
        first, *others = (tokenizer.encode(text, add_special_tokens=False, parse_special=True) for text in texts)
        return "".join(texts), [*first, *(token for ids in others for token in (NOWHERE, *ids))]


def _parts(content):
    return content if isinstance(content, list) else [content]


def _shown(one):
    return {"text": "<|tool|>"} if isinstance(one, dict) and one.get("type") == "audio" else one


def sound_service(engine=None, policy=None, processor=HEARS, **more):
    reader = MediaReader(processor, policy or MediaPolicy(), 200)
    return mock_service(engine or MockEngine(max_model_len=512), template=SoundTemplate(), media=reader, **more)


async def prepared(service, *parts, **more):
    given = GenerateInput(messages=asked(*parts), **more)
    return await service.prepare(given, service.make_params({"max_tokens": 2}))


def openai(data: str, kind: str = "wav") -> dict:
    return {"type": "input_audio", "input_audio": {"data": data, "format": kind}}


WAYS = {
    "openai": openai(BASE64),
    "openai with a uri": openai(uri(FILE, "audio/wav")),
    "vllm": {"type": "audio_url", "audio_url": {"url": uri(FILE, "audio/wav")}},
    "hugging face": {"type": "audio", "url": uri(FILE, "audio/wav")},
    "bytes": {"type": "audio", "audio": FILE},
    "samples": {"type": "audio", "audio": SHORT},
    "samples and their rate": {"type": "audio", "audio": (SHORT, 16_000)},
    "two channels": {"type": "audio", "audio": (np.stack([SHORT, SHORT]), 16_000)},
    "int16": {"type": "audio", "audio": ((SHORT * 32767).astype(np.int16), 16_000)},
    "flac": {"type": "audio", "audio": wav(SHORT, kind="FLAC", subtype="PCM_16")},
}


@pytest.mark.parametrize("way", WAYS)
async def test_a_sound_becomes_its_places(way):
    made = await prepared(sound_service(), "a", WAYS[way], "b")
    (item,) = made.children[0].media.items
    at = made.prompt_token_ids.index(PLACE)
    assert made.prompt_token_ids.count(PLACE) == item.size == PLACES
    assert item.places_N.tolist() == list(range(at, at + PLACES))
    exact = (await prepared(sound_service(), WAYS["samples"])).children[0].media.items[0]
    np.testing.assert_allclose(
        item.patches_PX, exact.patches_PX, atol=1e-5 if "int16" not in way and way != "flac" else 0.05
    )


async def test_paths_come_from_python_alone(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(FILE)
    made = await prepared(sound_service(), {"type": "audio", "audio": path})
    assert made.children[0].media.items[0].size == PLACES
    for content in (str(path), f"file://{path}"):
        with pytest.raises(RequestError, match=r"data: URI|reads no files"):
            await prepared(sound_service(), {"type": "audio", "audio": content})
    with pytest.raises(RequestError, match="cannot be read"):
        await prepared(sound_service(), {"type": "audio", "audio": tmp_path / "none.wav"})


async def test_mp3_at_another_rate_and_several_sounds_in_any_order():
    mp3 = wav(sound(1.0, 2), rate=22_050, kind="MP3", subtype=None)  # 0.73 s
    made = await prepared(
        sound_service(), openai(base64.b64encode(mp3).decode(), "mp3"), "then", WAYS["openai"], WAYS["vllm"]
    )
    first, second, third = made.children[0].media.items
    assert 17 <= first.size <= 21 and second.size == PLACES
    assert second.digest == third.digest, "one file, whichever way it came"
    assert first.digest != second.digest


async def test_over_grpc():
    message = pb.ChatMessage(role="user", parts=[pb.ContentPart(text="a"), pb.ContentPart(audio=FILE)])
    other = pb.ChatMessage(role="user", parts=[pb.ContentPart(audio_url=uri(FILE, "audio/wav"))])
    service = sound_service()
    given = input_from(pb.GenerateRequest(chat=pb.Chat(messages=[message, other])), service.limits)
    made = await service.prepare(given, service.make_params({"max_tokens": 2}))
    assert [item.size for item in made.children[0].media.items] == [PLACES, PLACES]


async def test_over_http_and_beside_models_that_do_not_hear():
    engine = MockEngine(reply="ok", max_model_len=512)
    body = {"messages": asked("a", WAYS["openai"]), "max_tokens": 2}
    path = "/v1/chat/completions"
    status, reply = await call_app(create_app(sound_service(engine), page=False), path, body, "a")
    assert status == 200, reply
    assert engine.requests[0].media.items[0].size == PLACES
    status, reply = await call_app(create_app(mock_service(MockEngine()), page=False), path, body, "a")
    assert status == 400 and "text only" in str(reply)
    body = {"messages": asked("a", part(uri(encoded()))), "max_tokens": 2}
    status, reply = await call_app(create_app(sound_service(engine), page=False), path, body, "a")
    assert status == 400 and "is an image; this model takes text and sounds" in str(reply)


async def test_templates_that_know_nothing_of_sounds():
    """Ultravox: the texts around a sound are made ids on their own, and the end's token stands in its places."""
    service = sound_service(processor=AudioProcessor.ultravox(CONFIG | {"stack_factor": 8, "audio_token_index": None}))
    made = await prepared(service, "ab", WAYS["openai"], "cd")
    (item,) = made.children[0].media.items
    assert item.size == 5 and [made.prompt_token_ids[at] for at in item.places_N] == [7] * 5
    ids = list(made.prompt_token_ids)
    assert (
        bytes(ids[item.first - 2 : item.first]) == b"ab"
        and "cd" in bytes(i for i in ids[item.end :] if i < 256).decode()
    )
    assert "\ufdd3" not in (made.prompt or "") and chat_template.PLACE == NOWHERE
    with pytest.raises(RequestError, match="1 sounds, and the model's chat template has made 2 places"):
        await prepared(service, "a\ufdd3b", WAYS["openai"], "c")
    plain = await prepared(service, "a\ufdd3b")
    assert plain.children[0].media is None


async def test_too_many_too_long_and_too_large():
    with pytest.raises(RequestError, match="1000 sounds; at most 64"):
        await prepared(sound_service(), *[WAYS["openai"]] * 1000)
    with pytest.raises(RequestError, match="3 sounds; at most 2"):
        await prepared(sound_service(policy=MediaPolicy(max_sounds=2)), *[WAYS["openai"]] * 3)
    with pytest.raises(RequestError, match=r"longer than 0\.5 seconds"):
        await prepared(sound_service(policy=MediaPolicy(max_sound_s=0.5)), WAYS["openai"])
    with pytest.raises(RequestError, match=r"longer than 0\.5 seconds"):
        await prepared(sound_service(policy=MediaPolicy(max_sound_s=0.5)), WAYS["samples"])
    with pytest.raises(RequestError, match="too large"):
        await prepared(sound_service(policy=MediaPolicy(max_bytes=1000)), WAYS["openai"])
    with pytest.raises(RequestError, match="more embeddings"):
        await prepared(sound_service(MockEngine(max_model_len=24)), WAYS["openai"], "a", WAYS["flac"])


async def test_a_long_sound_is_refused_before_all_of_it_is_read():
    """Ultravox hears all of a sound: what the context has no room for is not decoded."""
    processor = AudioProcessor.ultravox(CONFIG | {"stack_factor": 8})
    minutes = wav(np.zeros(16_000 * 300, np.int16), kind="FLAC", subtype="PCM_16")
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match=r"longer than \d+\.?\d* seconds"):
            await prepared(sound_service(processor=processor), {"type": "audio", "audio": minutes})
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()


async def test_what_a_model_does_not_hear_is_not_read(monkeypatch):
    """Of a window of two seconds, and a file of nine in pieces of one, two pieces."""
    pieces, push, long = [], files.Resampler.push, sound(9.0, 4)

    def counted(self, piece):
        pieces.append(len(piece))
        return push(self, piece)

    async def heard(samples):
        return (await prepared(sound_service(), {"type": "audio", "audio": wav(samples)})).children[0].media.items

    monkeypatch.setattr(files, "PIECE", 16_000)
    monkeypatch.setattr(files.Resampler, "push", counted)
    (whole,), (cut,) = await heard(long), await heard(long[:32_000])
    assert pieces == [16_000] * 4
    np.testing.assert_array_equal(whole.patches_PX, cut.patches_PX)


async def test_uuids():
    service = sound_service()
    named = WAYS["openai"] | {"uuid": "mine"}
    first = (await prepared(service, named)).children[0].media.items[0]
    again = (await prepared(service, {"type": "input_audio", "uuid": "mine"})).children[0].media.items[0]
    assert again.digest == first.digest
    for other in (
        {"type": "audio_url", "uuid": "yours"},
        {"type": "audio", "uuid": ""},
        {"type": "audio", "uuid": "x" * 200},
    ):
        with pytest.raises(RequestError, match=r"no sound of this uuid|uuid must be"):
            await prepared(service, other)
    with pytest.raises(RequestError, match="no sound of this uuid"):
        await prepared(service, {"type": "audio", "uuid": "mine"}, cache_salt="another")
    fake = WAYS["samples"] | {"uuid": "mine"}  # the name decides nothing: content does
    assert (await prepared(service, fake)).children[0].media.items[0].digest != first.digest


def lying(**fields: int) -> bytes:
    """A WAV file whose header says what is not so."""
    said = {"size": len(FILE) - 8, "channels": 1, "rate": 16_000, "bits": 16, "data": 100} | fields
    head = struct.pack("<4sI4s4sI", b"RIFF", said["size"] & 0xFFFFFFFF, b"WAVE", b"fmt ", 16)
    block = said["channels"] * said["bits"] // 8 & 0xFFFF
    shape = struct.pack(
        "<HHIIHH", 1, said["channels"], said["rate"], said["rate"] * 2 & 0xFFFFFFFF, block, said["bits"]
    )
    return head + shape + struct.pack("<4sI", b"data", said["data"] & 0xFFFFFFFF) + bytes(100)


def flac_of_hours() -> bytes:
    """A FLAC whose header claims 2^36 - 1 samples, and that holds a second."""
    data = bytearray(wav(np.zeros(16_000, np.int16), kind="FLAC", subtype="PCM_16"))
    data[21] |= 0x0F
    data[22:26] = b"\xff" * 4
    return bytes(data)


NO_SOUNDS = {
    "nothing": b"",
    "text": b"hello",
    "an image": encoded(),
    "html": b"<html><script>alert(1)</script>",
    "zip": b"PK\x03\x04" + bytes(64),
    "raw": bytes(10_000),
    "a head alone": FILE[:44],
    "half a head": FILE[:20],
    "no channels": lying(channels=0),
    "many channels": lying(channels=65_535),
    "no rate": lying(rate=0),
    "a huge rate": lying(rate=2**32 - 1),
    "no bits": lying(bits=0),
    "empty": wav(np.zeros(0, np.float32)),
    "not numbers": wav(np.full(4000, np.nan, np.float32)),
    "endless": wav(np.full(4000, np.inf, np.float32)),
    "a playlist": b"#EXTM3U\nfile:///etc/passwd\n",
    "au": wav(SHORT, kind="AU", subtype="PCM_16"),
    "caf": wav(SHORT, kind="CAF", subtype="PCM_16"),
}


@pytest.mark.parametrize("what", NO_SOUNDS)
async def test_what_is_no_sound_is_that_requests_400(what):
    service = sound_service()
    with pytest.raises(RequestError) as refused:
        await prepared(service, "a", openai(base64.b64encode(NO_SOUNDS[what]).decode()))
    assert refused.value.kind is ErrorKind.INVALID_ARGUMENT
    assert "messages[0].content[1]" in refused.value.message
    for told in ("0x", "/tmp", "site-packages", "soundfile", "object at", "Traceback", "libsndfile"):
        assert told not in refused.value.message
    assert (await prepared(service, "a", WAYS["openai"])).children[0].media, "others go on"


@pytest.mark.parametrize(
    "data", [lying(data=2**32 - 1), lying(size=2**32 - 1), lying(data=90), flac_of_hours()],
    ids=["more than there is", "a size that lies", "less than there is", "hours of flac"],
)  # fmt: skip
async def test_headers_that_lie_cost_nothing(data):
    tracemalloc.start()
    try:
        try:
            made = await prepared(sound_service(), "a", {"type": "audio", "audio": data})
            assert sum(item.size for item in made.children[0].media.items) <= 25
        except RequestError as refused:
            assert refused.kind is ErrorKind.INVALID_ARGUMENT
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("tail", [b"PK\x03\x04 an archive", b"<script>alert(1)</script>", bytes(10_000)])
async def test_what_is_a_sound_and_something_else_is_that_sound(tail):
    service = sound_service()
    plain = (await prepared(service, {"type": "audio", "audio": FILE})).children[0].media.items[0]
    both = (await prepared(service, {"type": "audio", "audio": FILE + tail})).children[0].media.items[0]
    np.testing.assert_array_equal(plain.patches_PX, both.patches_PX)


async def test_truncated_files_are_heard_as_far_as_they_go_or_refused():
    for kind, subtype in (("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", None)):
        whole = wav(sound(1.5, 3), kind=kind, subtype=subtype)
        for part_of in (0.1, 0.5, 0.9):
            data = whole[: int(len(whole) * part_of)]
            try:
                made = await prepared(sound_service(), "a", {"type": "audio", "audio": data})
                assert made.prompt_token_ids.count(PLACE) <= 38
            except RequestError as refused:
                assert refused.kind is ErrorKind.INVALID_ARGUMENT


WRONG = {
    "a list": {"type": "audio", "audio": [0.0, 1.0]},
    "a number": {"type": "audio", "audio": 3},
    "nothing": {"type": "audio"},
    "no data": {"type": "input_audio", "input_audio": {"format": "wav"}},
    "empty data": {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
    "no base64": openai("%%%"),
    "an odd format": openai(BASE64, "../../etc"),
    "a huge format": openai(BASE64, "w" * 1000),
    "the web": {"type": "audio_url", "audio_url": {"url": "https://example.com/a.wav"}},
    "a whole number's array": {"type": "audio", "audio": np.zeros(100, np.int64)},
    "three dimensions": {"type": "audio", "audio": np.zeros((2, 2, 100), np.float32)},
    "many channels": {"type": "audio", "audio": np.zeros((100, 99), np.float32)},
    "no samples": {"type": "audio", "audio": np.zeros(0, np.float32)},
    "samples that are none": {"type": "audio", "audio": np.full(100, np.nan, np.float32)},
    "samples without an end": {"type": "audio", "audio": np.full(100, -np.inf, np.float32)},
    "a rate of 0": {"type": "audio", "audio": (SHORT, 0)},
    "a rate that is none": {"type": "audio", "audio": (SHORT, float("nan"))},
    "a huge rate": {"type": "audio", "audio": (SHORT, 10**9)},
    "half a sample": {"type": "audio", "audio": (SHORT, 16_000.5)},
    "a rate in words": {"type": "audio", "audio": (SHORT, "16k")},
}


@pytest.mark.parametrize("what", WRONG)
async def test_what_is_sent_wrongly_is_refused_by_its_place(what):
    with pytest.raises(RequestError) as refused:
        await prepared(sound_service(), "a", WRONG[what])
    assert refused.value.kind is ErrorKind.INVALID_ARGUMENT and "messages[0].content[1]" in refused.value.message
