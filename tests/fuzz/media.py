"""Images, sounds, videos and documents that somebody else made: files that are nearly valid, and such that lie about themselves."""

from __future__ import annotations

import asyncio
import io
import json
import pathlib
import random
from typing import Any

import numpy as np

from serving.errors import RequestError
from serving.media.clips import GivenSound
from serving.media.decoding import decode
from serving.media.documents import text_of_pdf
from serving.media.fetching import MediaPolicy
from serving.media.processors import PROCESSORS
from serving.media.video import GivenVideo
from tests.fuzz.mutate import mutate_bytes, mutate_text
from tests.fuzz.run import Case
from tests.models import tiny_conformers, tiny_granite
from tests.models.tiny_audio import MELS
from tests.models.tiny_audio import TINY as HEARS
from tests.models.tiny_towers import TINY
from tests.models.tiny_vision import picture

POLICY = MediaPolicy(max_pixels=1 << 20)
MAX_TOKENS = 4096
"""Of a prompt."""


def processors() -> list[tuple[str, Any]]:
    """(name, processor) of every family with a tower, as its tiny checkpoint has it."""
    made = []
    for name, tiny in TINY.items():
        hf = {"architectures": [tiny.model], "vision_config": dict(tiny.vision), "preprocessor": dict(tiny.processor)}
        made.append((name, PROCESSORS[tiny.model](hf | tiny.ids | {"video_preprocessor": dict(tiny.videos)})))
    for name, hears in HEARS.items():
        said = {"feature_size": MELS, "chunk_length": hears.seconds}
        hf = {"architectures": [hears.model], "audio_config": dict(hears.audio), "preprocessor": said}
        made.append((name, PROCESSORS[hears.model](hf | hears.ids)))
    for name, heard in tiny_conformers.TINY.items():
        hf = {"architectures": [heard.model], "audio_config": dict(heard.audio), "preprocessor": dict(heard.features)}
        made.append((name, PROCESSORS[heard.model](hf | {**heard.ids, "sound_preprocessor": dict(heard.features)})))
    for name, heard in tiny_granite.TINY.items():
        hf = {"encoder_config": dict(heard.audio), "preprocessor": {"n_mels": tiny_granite.MELS}}
        made.append((name, PROCESSORS[heard.model](hf | {**heard.ids})))
    return made


def images(folder: pathlib.Path) -> Case:
    """Files of each format that is read, to patches; what is no image is refused in a sentence."""
    from PIL import Image

    seeds: list[bytes] = []
    for kind, size, mode in (("PNG", (9, 7), "P"), ("PNG", (40, 3), "RGBA"), ("JPEG", (33, 21), "RGB"), ("WEBP", (8, 30), "RGB"),
                             ("GIF", (5, 5), "P")):  # fmt: skip
        pixels = np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3)
        out = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(out, kind)
        seeds.append(out.getvalue())
    seeds += [
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\x00\x01\x00\x00\x00\x0cfont",
        b"%PDF-1.4",
        b"II*\x00" * 9,
    ]

    readers = [one for _, one in processors() if one.images]

    def case(rng: random.Random) -> list[str]:
        data = rng.choice(seeds)
        data = mutate_bytes(rng, data, 4) if rng.random() < 0.9 else data + rng.choice(seeds)
        try:
            for piece in rng.choice(readers).pieces(decode(data, POLICY, "place")):
                assert piece.size > 0 and len(piece.patches_PX) == len(piece.place_P2)
        except (RequestError, ValueError) as error:
            return [str(error)]
        return []

    return case


def sounds(folder: pathlib.Path) -> Case:
    """Sound files of each format that is read, to what each family's encoder reads."""
    import soundfile

    tone = (0.1 * np.sin(np.arange(900) / 9)).astype(np.float32)
    seeds: list[bytes] = []
    for kind in ("WAV", "FLAC", "OGG", "MP3"):
        out = io.BytesIO()
        soundfile.write(out, tone, 16_000, format=kind)
        seeds.append(out.getvalue())

    readers = [one.sound for _, one in processors() if one.sound is not None]

    def case(rng: random.Random) -> list[str]:
        data, reader = mutate_bytes(rng, rng.choice(seeds), 4), rng.choice(readers)
        try:
            for piece in reader.pieces(GivenSound(data, POLICY, "place").heard(5.0)):
                assert np.isfinite(piece.patches_PX).all() and len(piece.patches_PX) == len(piece.place_P2)
        except RequestError as error:
            return [str(error)]
        return []

    return case


def videos(folder: pathlib.Path) -> Case:
    """Files and frames in a URL, to patches: each file in a process of its own, which is why there are few cases a second."""
    from tests.serving.media.images import encoded
    from tests.serving.media.test_video import FRAMES, MP4, jpegs, video_file

    readers = [one.video for _, one in processors() if one.video is not None]
    kinds = (("matroska", "libx264"), ("webm", "libvpx"), ("webm", "libvpx-vp9"), ("avi", "mpeg4"), ("mov", "libx264"))
    seeds = [MP4, *(video_file(FRAMES, kind=kind, codec=codec) for kind, codec in kinds)]
    seeds.append(encoded(64, 48, "GIF", save_all=True, append_images=[picture(64, 48, i) for i in range(3)]))
    frames = jpegs(FRAMES).encode()

    def case(rng: random.Random) -> list[str]:
        content: Any = mutate_bytes(rng, rng.choice(seeds), 6)
        match rng.randrange(10):
            case 0 | 1:
                content = mutate_bytes(rng, frames, 3).decode("latin-1")
            case 2:  # the beginning of one, and of another what is behind it
                content = content[: rng.randrange(len(content) + 1)] + rng.choice(seeds)[rng.randrange(1000) :]
        try:
            given, video = GivenVideo(content, POLICY, "place"), rng.choice(readers)
            b"".join(given.parts())
            given.patched(video, video.sampling, MAX_TOKENS)
        except RequestError as error:
            return [str(error)]
        return []

    return case


def documents(folder: pathlib.Path) -> Case:
    """PDFs to their texts: each in a process of its own, as videos."""
    from tests.serving.frontends.page.test_documents import pdf

    seeds = [pdf("The first page.", "", "The third."), pdf("AAA", letter="D800")]

    def case(rng: random.Random) -> list[str]:
        data = rng.choice(seeds)
        if rng.random() < 0.8:
            data = mutate_bytes(rng, data, 8)
        else:
            data = mutate_text(rng, data.decode("latin-1")).encode("latin-1", "replace")
        try:
            found = asyncio.run(text_of_pdf(data, "place"))
            json.dumps(found).encode()
            assert found["text"].encode() and found["pages"] > 0
        except RequestError as error:
            return [str(error)]
        return []

    return case


TARGETS = {"image": images, "sound": sounds, "video": videos, "document": documents}
