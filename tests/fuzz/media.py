"""Images and sounds that somebody else made: files that are nearly valid, and such that lie about themselves."""

from __future__ import annotations

import io
import pathlib
import random
from typing import Any

import numpy as np

from serving.errors import RequestError
from serving.media.decoding import decode
from serving.media.fetching import MediaPolicy
from serving.media.processors.idefics import IdeficsProcessor
from serving.media.processors.next import NextProcessor
from serving.media.processors.qwen import QwenVLProcessor
from serving.media.sound import read_sound
from serving.media.video import GivenVideo
from tests.fuzz.mutate import mutate_bytes
from tests.fuzz.run import Case

POLICY = MediaPolicy(max_pixels=1 << 20)
TILES = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
PROCESSORS: tuple[Any, ...] = (
    QwenVLProcessor.of({"preprocessor": {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 64}}),
    NextProcessor.of(
        {"architectures": ["LlavaNextForConditionalGeneration"], "vision_config": {}, "preprocessor": {"size": 336}}
    ),
    IdeficsProcessor.of({"vision_config": {"patch_size": 14}, "preprocessor": TILES}),
)


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

    def case(rng: random.Random) -> list[str]:
        data = rng.choice(seeds)
        data = mutate_bytes(rng, data, 4) if rng.random() < 0.9 else data + rng.choice(seeds)
        try:
            image = decode(data, POLICY, "place")
            rng.choice(PROCESSORS).patched(image)
        except (RequestError, ValueError) as error:
            return [str(error)]
        return []

    return case


def sounds(folder: pathlib.Path) -> Case:
    """Sound files of each format that is read."""
    import soundfile

    tone = (0.1 * np.sin(np.arange(900) / 9)).astype(np.float32)
    seeds: list[bytes] = []
    for kind in ("WAV", "FLAC", "OGG", "MP3"):
        out = io.BytesIO()
        soundfile.write(out, tone, 16_000, format=kind)
        seeds.append(out.getvalue())

    def case(rng: random.Random) -> list[str]:
        data = mutate_bytes(rng, rng.choice(seeds), 4)
        try:
            read_sound(data, 5.0, "place")
        except RequestError as error:
            return [str(error)]
        return []

    return case


def videos(folder: pathlib.Path) -> Case:
    """Files and frames in a URL, to patches: each file in a process of its own, which is why there are few cases a second."""
    from tests.serving.media.images import PROCESSOR
    from tests.serving.media.test_video import FRAMES, MP4, jpegs, video_file

    video = PROCESSOR.video
    assert video is not None
    seeds = [MP4, video_file(FRAMES, kind="matroska"), video_file(FRAMES, kind="webm", codec="libvpx")]
    frames = jpegs(FRAMES).encode()

    def case(rng: random.Random) -> list[str]:
        content: Any = mutate_bytes(rng, rng.choice(seeds), 6)
        if rng.random() < 0.3:
            content = mutate_bytes(rng, frames, 3).decode("latin-1")
        try:
            given = GivenVideo(content, POLICY, "place")
            b"".join(given.parts())
            given.patched(video, video.sampling, 4096)
        except RequestError as error:
            return [str(error)]
        return []

    return case


TARGETS = {"image": images, "sound": sounds, "video": videos}
