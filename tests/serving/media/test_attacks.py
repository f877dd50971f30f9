"""Media that are sent to do harm: addresses in disguise, files that are two things, or lie, or grow, and too many of them."""

import base64
import dataclasses
import io
import json
import os
import pickle
import socket
import struct
import tracemalloc
import zlib

import numpy as np
import pytest

from serving.errors import ErrorKind, RequestError
from serving.frontends.app import create_app
from serving.frontends.openai.batches.runner import call_app
from serving.media import MediaReader
from serving.media import reader as reading
from serving.media.decoding import decode
from serving.media.fetching import MediaPolicy, fetch
from serving.media.processors.audio import AudioProcessor
from serving.media.sound import read_sound
from tests.mock_engine import MockEngine, mock_service
from tests.models.tiny_whisper import wav
from tests.serving.media.images import PROCESSOR, ImageTemplate, asked, encoded, image_service, part, uri
from tests.serving.media.test_requests import prepared

NUMBER = socket.AI_NUMERICHOST
ANY = MediaPolicy(domains=("*",))
REFUSED = "here: the image cannot be read. PNG, JPEG, WebP and GIF are."


@pytest.mark.parametrize(
    "host",
    [
        "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1", "127.1", "127.0.1", "127.0.0.1.", "localhost", "LOCALHOST.",
        "[::1]", "[::]", "[::ffff:7f00:1]", "[::ffff:127.0.0.1]", "[0:0:0:0:0:ffff:a9fe:a9fe]", "[fd00:ec2::254]", "2852039166",
        "[64:ff9b::a9fe:a9fe]", "[2002:a9fe:a9fe::1]", "0", "\u2460\u2461\u2466.0.0.1", "127。0。0。1",
    ],
)  # fmt: skip
def test_hosts_in_disguise_are_not_connected_to(host, monkeypatch):
    look = socket.getaddrinfo

    def numbers(name, *args, **more):
        """What the C library makes of them, and no name server, some of which know an address for whatever they are asked."""
        return look("127.0.0.1" if name.lower().rstrip(".") == "localhost" else name, *args, flags=NUMBER, **more)

    monkeypatch.setattr(socket, "getaddrinfo", numbers)
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("a connection was made"))
    with pytest.raises(RequestError, match="cannot be fetched"):
        fetch(f"http://{host}/latest/meta-data/", ANY, "here")


NO_IMAGES = {
    "svg": b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "svg behind a png's head": encoded()[:8] + b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "truetype": b"\x00\x01\x00\x00\x00\x0c\x00\x80" + bytes(64),
    "opentype": b"OTTO" + bytes(64),
    "woff2": b"wOF2" + bytes(64),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
    "pdf": b"%PDF-1.7\n" + bytes(64),
    "tiff": encoded(kind="TIFF"),
    "bmp": encoded(kind="BMP"),
    "icon": encoded(kind="ICO"),
    "ppm": encoded(kind="PPM"),
    "jpeg 2000": b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(64),
    "photoshop": b"8BPS\x00\x01" + bytes(64),
    "html": b"<html><script>alert(1)</script>",
    "zip": b"PK\x03\x04" + bytes(64),
    "nothing": b"",
}


@pytest.mark.parametrize("what", NO_IMAGES)
def test_what_is_no_image_is_opened_by_nobody(what):
    with pytest.raises(RequestError) as refused:
        decode(NO_IMAGES[what], MediaPolicy(), "here")
    assert refused.value.message == REFUSED


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("tail", [b"PK\x03\x04 an archive", b"<script>alert(1)</script>", b"%PDF-1.7", bytes(10_000)])
def test_what_is_an_image_and_something_else_is_that_image(kind, tail):
    whole = encoded(kind=kind)
    assert decode(whole + tail, MediaPolicy(), "here").tobytes() == decode(whole, MediaPolicy(), "here").tobytes()


def jpeg(width: int, height: int) -> bytes:
    """A JPEG of which only the sizes are true to form."""
    data = encoded(kind="JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def gif(width: int, height: int) -> bytes:
    """A GIF of one pixel, with a frame that is larger."""
    frame = struct.pack("<BHHHHB", 0x2C, 0, 0, width, height, 0) + b"\x02\x02\x44\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6) + frame + b";"


def webp(width: int, height: int) -> bytes:
    """A WebP with a canvas and nothing on it."""
    canvas = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas + encoded(kind="WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    "made", [jpeg(65_500, 65_500), gif(65_535, 65_535), webp(2**14, 2**14)], ids=["jpeg", "gif", "webp"]
)
def test_sizes_that_lie_cost_nothing(made):
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match="here: the image"):
            decode(made, MediaPolicy(), "here")
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_texts_that_grow_inside_an_image(kind):
    """64 MiB of zeros in a chunk that is unpacked beside the pixels."""
    packed = b"x\0\0" + zlib.compress(bytes(64 * 2**20), 9)
    whole, head = encoded(), 33  # signature and IHDR
    chunk = struct.pack(">I", len(packed)) + kind + packed + struct.pack(">I", zlib.crc32(kind + packed))
    tracemalloc.start()
    try:
        try:
            assert decode(whole[:head] + chunk + whole[head:], MediaPolicy(), "here").size == (40, 30)
        except RequestError as refused:
            assert refused.message == REFUSED
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_of_many_frames_one_is_read(monkeypatch):
    from PIL import GifImagePlugin, Image

    frames = [Image.new("P", (30, 30), i % 200) for i in range(500)]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    seen: list[int] = []
    seek = GifImagePlugin.GifImageFile._seek
    monkeypatch.setattr(
        GifImagePlugin.GifImageFile, "_seek", lambda self, i, *a: (seen.append(i), seek(self, i, *a))[1]
    )
    assert decode(out.getvalue(), MediaPolicy(), "here").size == (30, 30) and set(seen) <= {0}


async def test_a_thousand_images_are_counted_before_any_is_read(monkeypatch):
    monkeypatch.setattr(reading, "fetch", lambda *a: pytest.fail("one was fetched"))
    monkeypatch.setattr(reading, "decode", lambda *a: pytest.fail("one was unpacked"))
    with pytest.raises(RequestError, match="1000 images; at most 64"):
        await prepared(image_service(MockEngine()), *[part(uri(encoded(1, 1)))] * 1000)


async def test_pixels_of_a_request_are_counted_before_they_are_unpacked():
    service = image_service(MockEngine(), MediaPolicy(max_request_pixels=5_000))
    three = [part(uri(encoded(40, 40, seed=i))) for i in range(3)]
    assert (await prepared(service, *three)).children[0].media
    with pytest.raises(RequestError, match="more than 5000 pixels together"):
        await prepared(service, *[part(uri(encoded(40, 40, seed=i))) for i in range(10, 14)])
    assert (await prepared(service, *three, part(uri(encoded(41, 41))))).children[0].media, (
        "what is kept is not unpacked"
    )


def test_hours_of_silence_are_not_held():
    data = wav(np.zeros((192_000 * 20, 2), np.float32), 192_000, "FLAC", "PCM_16")  # 30 MB, or twice that
    assert len(data) < 200_000
    tracemalloc.start()
    try:
        assert len(read_sound(data, 60.0, "file")) == 16_000 * 20
        assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
    finally:
        tracemalloc.stop()


OUTSIDE = "http://169.254.169.254/latest/meta-data/"
PLACES = {
    "images": part(OUTSIDE),
    "images, without an object": {"type": "image_url", "image_url": OUTSIDE},
    "responses' images": {"type": "input_image", "image_url": OUTSIDE},
    "Hugging Face's images": {"type": "image", "image": OUTSIDE},
    "Hugging Face's images by url": {"type": "image", "url": OUTSIDE},
    "Pillow's": {"type": "image_pil", "image_pil": OUTSIDE},
    "videos": {"type": "video_url", "video_url": {"url": OUTSIDE}},
    "Hugging Face's videos": {"type": "video", "video": OUTSIDE},
    "frames": {"type": "video", "video": [OUTSIDE]},
    "sounds": {"type": "audio_url", "audio_url": {"url": OUTSIDE}},
    "Hugging Face's sounds": {"type": "audio", "audio": OUTSIDE},
    "files": {"type": "file", "file": {"file_data": OUTSIDE}},
    "files by url": {"type": "input_file", "file_url": OUTSIDE},
}  # fmt: skip


class SeesAndHears(type(PROCESSOR)):
    """Qwen2-VL's processor, which would read sounds, too."""

    @property
    def sound(self):
        return AudioProcessor.qwen2({}).sound


@pytest.mark.parametrize("outside", [OUTSIDE, "file:///etc/passwd", "/etc/passwd", "ftp://inside/"])
@pytest.mark.parametrize("place", PLACES)
async def test_no_place_for_media_goes_around_what_fetches(place, outside, monkeypatch):
    """No processor, template or reader of a kind of its own looks anything up: not where nothing may be fetched, and no address
    inside where everything may."""
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("a connection was made"))
    monkeypatch.setattr(os, "open", lambda *a, **k: pytest.fail("a file was opened"))
    said = json.loads(json.dumps(PLACES[place]).replace(OUTSIDE, outside))
    reads = SeesAndHears(**{field.name: getattr(PROCESSOR, field.name) for field in dataclasses.fields(PROCESSOR)})
    for policy in (MediaPolicy(), ANY):
        service = mock_service(MockEngine(), template=ImageTemplate(), media=MediaReader(reads, policy, 64))
        with pytest.raises(RequestError) as refused:
            await prepared(service, "a", said)
        assert refused.value.kind is ErrorKind.INVALID_ARGUMENT and "content[1]" in refused.value.message


@pytest.mark.parametrize("kind", ["image_embeds", "audio_embeds", "video_embeds", "prompt_embeds"])
async def test_embeddings_are_no_input(kind, monkeypatch):
    """Unpickled tensors have been the end of other servers."""
    monkeypatch.setattr(pickle, "loads", lambda *a, **k: pytest.fail("unpickled"))
    monkeypatch.setattr(pickle, "Unpickler", lambda *a, **k: pytest.fail("unpickled"))
    torch_file = base64.b64encode(pickle.dumps([1.0])).decode()
    engine = MockEngine(reply="ok")
    app = create_app(image_service(engine), page=False)
    for content in (torch_file, {"image_grid_thw": torch_file, kind: torch_file}):
        body = {"messages": asked("a", {"type": kind, kind: content}), "max_tokens": 2}
        status, reply = await call_app(app, "/v1/chat/completions", body, "a")
        assert status == 400 and not engine.requests, reply
    if kind == "prompt_embeds":
        status, reply = await call_app(app, "/v1/completions", {"model": "default", "prompt_embeds": torch_file}, "a")
        assert status == 400 and not engine.requests, reply
