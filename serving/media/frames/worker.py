"""The process that reads a video: `python -P worker.py`.

A video comes from anywhere, and its decoders are large: they run where the parent can kill them after a deadline and the
operating system limits their memory. This file imports nothing of ours. On its standard input come a line of JSON ({"size": bytes
of the file, "max_pixels", "max_frames", "max_seconds"}) and the file; it answers with a line, {"frames", "fps", "width",
"height"} or {"error": sentence}. Then comes a line
{"indices": of the frames that are wanted, ascending, "width", "height", "resample": Pillow's filter, or null for frames as they
are}, and the frames go out as bytes, RGB, one behind the other.
"""

import io
import json
import math
import sys
from typing import Any

MEMORY_LIMIT_BYTES = 4 << 30
CONTAINERS = {"mov": "mov", "matroska": "matroska", "avi": "avi"}
"""FFmpeg's names of what is opened; nothing else is, whatever a file claims to be."""
CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "libvpx", "libvpx-vp9", "mpeg4", "mjpeg")
TURNS = {90: "ROTATE_90", 180: "ROTATE_180", -180: "ROTATE_180", -90: "ROTATE_270"}


class RefusedError(Exception):
    """A sentence for whoever sent the video."""


def container_of(head: bytes) -> str:
    """Which container a file is, by its first bytes."""
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mov"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if head[:4] == b"RIFF" and head[8:11] == b"AVI":
        return "avi"
    raise RefusedError("it is none that is read here: MP4, MOV, WebM, Matroska and AVI are.")


class Video:
    """An opened file.

    Attributes:
        frames: that it has, by its packets: what its header says of that is not believed.
    """

    def __init__(self, data: bytes, said: dict) -> None:
        self._said = said
        kind = container_of(data[:16])
        self._container = self._open(data, kind)
        stream = self._container.streams.video[0]
        self.frames = 0
        for packet in self._container.demux(stream):
            self.frames += packet.size > 0
            if self.frames > said["max_frames"]:
                raise RefusedError(f"it has more than {said['max_frames']} frames.")
        if not self.frames:
            raise RefusedError("there are no pictures in it.")
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        self.fps = rate if math.isfinite(rate) and 0 < rate <= 1000 else None
        if self.fps and self.frames / self.fps > said["max_seconds"]:
            raise RefusedError(f"it is longer than {said['max_seconds']:g} seconds.")
        self._container.close()
        self._container = self._open(data, kind)
        self.pictures = self._decoded()

    def _open(self, data: bytes, kind: str) -> Any:
        import av
        import av.logging

        av.logging.set_level(av.logging.PANIC)
        container = av.open(io.BytesIO(data), format=CONTAINERS[kind], metadata_errors="ignore")
        if not container.streams.video:
            raise RefusedError("there are no pictures in it.")
        context = container.streams.video[0].codec_context
        if context.name not in CODECS:
            raise RefusedError(
                "its codec is none that is read here: H.264, HEVC, VP8, VP9, AV1, MPEG-4 and Motion JPEG are."
            )
        self._check(context.width, context.height)
        context.options = {"max_pixels": str(self._said["max_pixels"])}
        container.streams.video[0].thread_type = "AUTO"
        return container

    def _check(self, width: int, height: int) -> None:
        if width * height > self._said["max_pixels"]:
            raise RefusedError(
                f"its frames have {width} x {height} pixels; at most {self._said['max_pixels']} are taken."
            )

    def _decoded(self):
        from PIL import Image

        for frame in self._container.decode(self._container.streams.video[0]):
            self._check(frame.width, frame.height)
            turn = TURNS.get(round(frame.rotation))
            yield lambda frame=frame, turn=turn: _upright(frame, turn, Image)


def _upright(frame, turn, pillow):
    image = pillow.fromarray(frame.to_ndarray(format="rgb24"))
    return image if turn is None else image.transpose(getattr(pillow.Transpose, turn))


def send(video: Video, first, wanted: dict, out) -> None:
    """The wanted frames. What a damaged end does not give is the last frame that there is."""
    at, picture, done = 0, first, False
    for index in wanted["indices"]:
        while at < index and not done:
            following = next(video.pictures, None)
            done = following is None
            picture, at = (picture, at) if following is None else (following, at + 1)
        image = picture()
        size = (wanted["width"], wanted["height"])
        if wanted["resample"] is not None:
            image = image.resize(size, resample=wanted["resample"])
        if image.size != size:
            raise RefusedError("its frames change their size.")
        out.write(image.tobytes())


def main() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    except (ImportError, ValueError, OSError):
        pass  # no such limit on this system: the deadline remains
    source, out = sys.stdin.buffer, sys.stdout.buffer
    said = json.loads(source.readline())
    data = source.read(said["size"])
    try:
        video = Video(data, said)
        first = next(video.pictures, None)
        if first is None:
            raise RefusedError("there are no pictures in it.")
        size = first().size
        about = {"frames": video.frames, "fps": video.fps, "width": size[0], "height": size[1]}
    except RefusedError as refused:
        about = {"error": str(refused)}
    except MemoryError:
        about = {"error": "reading it needs more memory than it is given."}
    except Exception:  # whatever a damaged file makes a decoder raise: its words may tell of this process's memory
        about = {"error": "it is damaged."}
    out.write(json.dumps(about).encode() + b"\n")
    out.flush()
    line = b"" if "error" in about else source.readline()
    if line:
        try:
            send(video, first, json.loads(line), out)
        except Exception:  # the parent sees that frames are missing
            sys.exit(1)
        out.flush()


if __name__ == "__main__":
    main()
