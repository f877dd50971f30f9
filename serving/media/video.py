"""From what a request calls a video to frames: of a file by a process of its own, with a deadline and a memory limit, or given one
by one. How many there are, and how large, is looked at before any is unpacked."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from threading import Timer
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.errors import ErrorKind, RequestError, invalid
from serving.media.decoding import Room, check_size, decode
from serving.media.documents import KEPT_VARIABLES
from serving.media.fetching import MediaPolicy, fetch
from serving.media.frames import worker
from serving.media.frames.sampling import Frames, Sampling
from serving.media.processors.base import Patched, Video

if TYPE_CHECKING:
    from PIL.Image import Image

JPEGS = "data:video/jpeg;base64,"
"""Frames one by one, joined by commas, as vLLM takes them."""


class GivenVideo:
    """A video of a request, fetched and not looked into.

    Attributes:
        data: the file; None where the frames are given one by one.
        frames: those, not decoded; `still` where nobody is to choose among them.
        fps: of them; None where nobody says.
    """

    def __init__(self, content: Any, policy: MediaPolicy, place: str) -> None:
        self._policy, self._place = policy, place
        self.data: bytes | None = None
        self.frames: Sequence[Any] = ()
        self.still, self.fps = False, None
        if isinstance(content, tuple) and len(content) == 2 and isinstance(content[1], Mapping):
            content, self.fps = content[0], _fps(content[1].get("fps"), place)
        if isinstance(content, str) and content[: len(JPEGS)].lower() == JPEGS:
            self.frames, self.still = _jpegs(content, policy, place), True
        elif isinstance(content, str | bytes):
            data = fetch(content, policy, place) if isinstance(content, str) else content
            if len(data) > policy.max_bytes:
                raise invalid(f"{place} is too large: at most {policy.max_bytes} bytes are taken.", place)
            self.data = data
        else:
            self.frames = _frames(content, place)
            self.still = all(isinstance(one, str | bytes) for one in self.frames)
        if len(self.frames) > policy.max_frames:
            raise invalid(
                f"{place}: the video has {len(self.frames)} frames; at most {policy.max_frames} are taken.", place
            )

    def parts(self) -> Iterator[bytes]:
        """Everything that decides what is seen, for a digest."""
        yield repr((self.still, self.fps, len(self.frames))).encode()
        if self.data is not None:
            yield self.data
        for frame in self.frames:
            if isinstance(frame, str | bytes):
                yield frame if isinstance(frame, bytes) else frame.encode()
            else:
                pixels = np.asarray(frame)
                yield repr((pixels.shape, pixels.dtype.str)).encode()
                yield np.ascontiguousarray(pixels).tobytes()

    def patched(self, video: Video, sampling: Sampling, max_tokens: int, room: Room | None = None) -> list[Patched]:
        """Its pieces, as a model's towers read them. Blocks.

        Args:
            room: that the pixels of frames are taken from which are given one by one.
        Raises:
            RequestError: INVALID_ARGUMENT; UNIMPLEMENTED for files without PyAV.
        """
        try:
            if self.data is not None:
                return video.patched(*self._of_file(video, sampling, max_tokens))
            return video.patched(*self._of_frames(video, sampling, max_tokens, room or Room(self._policy)))
        except ValueError as error:
            raise invalid(f"{self._place}: the video cannot be read: {error}", self._place) from None

    def _sized(self, video: Video, times: Frames, width: int, height: int, max_tokens: int) -> tuple[int, int]:
        """(width, height) that frames are brought to."""
        check_size((width, height), self._policy, self._place)
        count = len(times.indices)
        if count > self._policy.max_frames:
            raise ValueError(f"{count} frames would be read; at most {self._policy.max_frames} are taken.")
        high, wide = video.size(count, height, width)
        if video.count(count, high, wide) > max_tokens:
            raise ValueError(
                f"its {count} frames have more embeddings than this model's maximum context length of {max_tokens} tokens. "
                "Ask for fewer (num_frames or fps), or send smaller ones."
            )
        return wide, high

    def _of_frames(
        self, video: Video, sampling: Sampling, max_tokens: int, room: Room
    ) -> tuple[list[np.ndarray], Frames]:
        """Each frame is scaled as soon as it is unpacked: a file of some hundred bytes is 200 MB of pixels."""
        total = len(self.frames)
        times = Frames(tuple(range(total)), total, self.fps) if self.still else sampling.chosen(total, self.fps, False)
        found: list[np.ndarray] = []
        first = size = (0, 0)
        for i in times.indices:
            image = _picture(self.frames[i], self._policy, self._place, room)
            if not found:
                first, size = image.size, self._sized(video, times, *image.size, max_tokens)
            if image.size != first:
                raise ValueError("its frames are not all of one size.")
            found.append(np.asarray(video.scaling.resized(image, *size)))
            del image  # before the next one is unpacked
        return found, times

    def _of_file(self, video: Video, sampling: Sampling, max_tokens: int) -> tuple[list[np.ndarray], Frames]:
        if importlib.util.find_spec("av") is None:
            raise RequestError(
                ErrorKind.UNIMPLEMENTED,
                "This server reads no video files: its operator can add that with pip install av. Frames one by one are read.",
            )
        assert self.data is not None
        with _worker(self._policy.video_s) as talk:
            limits = {name: getattr(self._policy, name) for name in ("max_pixels", "max_seconds")}
            about = talk({"size": len(self.data), "max_frames": self._policy.max_stored_frames, **limits}, self.data)
            if "error" in about:
                raise ValueError(about["error"])
            times = sampling.chosen(about["frames"], about["fps"], True)
            width, height = self._sized(video, times, about["width"], about["height"], max_tokens)
            how = video.scaling.resample if video.scaling.resize else None
            pixels = talk.frames({"indices": times.indices, "width": width, "height": height, "resample": how})
        return pixels, times


class _Talk:
    """What is asked of the process that reads."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def __call__(self, said: Mapping[str, Any], data: bytes) -> dict[str, Any]:
        self._say(said, data)
        assert self._process.stdout is not None
        try:
            return json.loads(self._process.stdout.readline())
        except ValueError:  # it ended without an answer
            return {"error": "reading it takes more time or memory than it is given."}

    def frames(self, wanted: Mapping[str, Any]) -> list[np.ndarray]:
        """uint8 [H, W, 3] each."""
        self._say(wanted)
        assert self._process.stdout is not None
        shape, found = (wanted["height"], wanted["width"], 3), []
        for _ in wanted["indices"]:
            data = self._process.stdout.read(shape[0] * shape[1] * 3)
            if len(data) < shape[0] * shape[1] * 3:
                raise ValueError("it is damaged, or reading it takes more time or memory than it is given.")
            found.append(np.frombuffer(data, np.uint8).reshape(shape))
        return found

    def _say(self, said: Mapping[str, Any], data: bytes = b"") -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: there will be no answer
            self._process.stdin.write(json.dumps(said).encode() + b"\n")
            self._process.stdin.write(data)
            self._process.stdin.flush()


def _worker_environment() -> dict[str, str]:
    """Nothing secret, and no address space for each core: on 64 of them numpy's threads (40 MB each) and the arenas of FFmpeg's
    were all that the process is given."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    return {**kept, "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}


@contextlib.contextmanager
def _worker(seconds: float) -> Iterator[_Talk]:
    """A process that reads one video, and is killed behind a deadline."""
    process = subprocess.Popen(
        [sys.executable, "-P", str(worker.__file__)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        env=_worker_environment(),
    )  # fmt: skip
    timer = Timer(seconds, process.kill)
    timer.start()
    try:
        yield _Talk(process)
    finally:
        timer.cancel()
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        process.wait()


def piece_digests(digest: bytes, count: int) -> list[bytes]:
    """Of each piece of a video: of the whole's, and which it is."""
    return [hashlib.blake2b(digest + at.to_bytes(8, "little"), digest_size=32).digest() for at in range(count)]


def _fps(said: Any, place: str) -> float | None:
    if said is None:
        return None
    if isinstance(said, bool) or not isinstance(said, int | float) or not 0 < said <= 1000:
        raise invalid(f"{place}: a video's fps must be a number above 0 and at most 1000.", place)
    return float(said)


def _jpegs(url: str, policy: MediaPolicy, place: str) -> list[bytes]:
    body = url[len(JPEGS) :]
    if len(body) > policy.max_bytes // 3 * 4 + 4:
        raise invalid(f"{place} is too large: at most {policy.max_bytes} bytes are taken.", place)
    if body.count(",") >= policy.max_frames:
        raise invalid(f"{place}: the video has more than {policy.max_frames} frames.", place)
    try:
        return [base64.b64decode(frame, validate=True) for frame in body.split(",")]
    except (binascii.Error, ValueError):
        raise invalid(f"{place} is not valid base64.", place) from None


def _frames(content: Any, place: str) -> Sequence[Any]:
    """The frames of a list, or of an array [T, H, W, 3]."""
    if hasattr(content, "__array_interface__"):
        content = np.asarray(content)
        if content.ndim != 4 or content.shape[-1] != 3 or content.dtype != np.uint8:
            raise invalid(f"{place}: a video's array must be of uint8 [frames, H, W, 3].", place)
    elif not isinstance(content, Sequence):
        raise invalid(f"{place}: a video is a URL, a file's bytes, a list of images, or an array.", place)
    if not len(content):
        raise invalid(f"{place}: the video has no frames.", place)
    return content


def _picture(frame: Any, policy: MediaPolicy, place: str, room: Room) -> Image:
    from PIL import Image as Pillow

    if isinstance(frame, str | bytes):
        return decode(fetch(frame, policy, place) if isinstance(frame, str) else frame, policy, place, room)
    if hasattr(frame, "convert"):
        check_size(frame.size, policy, place)
        return frame.convert("RGB")
    pixels = np.asarray(frame)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        raise ValueError("a frame's array must be of uint8 [H, W, 3].")
    return Pillow.fromarray(pixels)
