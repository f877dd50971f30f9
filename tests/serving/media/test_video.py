"""Videos of requests: files, frames one by one and arrays, within bounds; what an engine is asked, and what is refused."""

import base64
import io
import pathlib
import subprocess
import sys
import weakref

import av
import numpy as np
import pytest
from PIL import Image

from proto.jaxserve.v1 import inference_pb2 as pb
from serving.errors import RequestError
from serving.frontends.grpc.convert import input_from
from serving.media import MediaPolicy
from serving.media import video as video_module
from serving.media.decoding import decode
from serving.media.frames.sampling import Sampling
from serving.service import GenerateInput
from tests.mock_engine import MockEngine, mock_service
from tests.models.tiny_video import clip
from tests.serving.media.images import PROCESSOR, VIDEO_PLACE, asked, encoded, image_service, part, uri


def video_file(frames: np.ndarray, fps: int = 8, kind: str = "mp4", codec: str = "libx264") -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode(None))
    return out.getvalue()


FRAMES = clip(6, 64, 48)
MP4 = video_file(FRAMES)


def video(content, **more):
    return {"type": "video_url", "video_url": {"url": content}, **more}


async def items(part, service=None, **more):
    service = service or image_service(MockEngine())
    given = GenerateInput(messages=asked("a", part, "b"), **more)
    made = await service.prepare(given, service.make_params({"max_tokens": 2}))
    media = made.children[0].media
    assert made.prompt_token_ids.count(VIDEO_PLACE) == sum(item.size for item in media.items)
    return media.items


def pixels(items) -> np.ndarray:
    return np.concatenate([item.patches_PX for item in items])


def jpegs(frames) -> str:
    def one(frame):
        out = io.BytesIO()
        Image.fromarray(frame).save(out, "JPEG")
        return base64.b64encode(out.getvalue()).decode()

    return "data:video/jpeg;base64," + ",".join(map(one, frames))


async def test_a_file_is_read_frame_by_frame_as_an_array_is():
    """What a decoder gives is what the same one gives here; two frames are one item."""
    with av.open(io.BytesIO(MP4)) as container:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    read = await items(video(uri(MP4, "video/mp4")))
    given = await items({"type": "video", "video": (decoded, {"fps": 8})})
    assert len(read) == 3 and len({item.digest for item in read}) == 3
    np.testing.assert_array_equal(pixels(read), pixels(given))
    assert abs(pixels(read) - pixels(await items({"type": "video", "video": FRAMES}))).mean() < 0.2
    again = await items({"type": "video", "video": MP4})
    assert [item.digest for item in again] == [item.digest for item in read]


@pytest.mark.parametrize(
    ("kind", "codec"), [("webm", "libvpx"), ("matroska", "libx264"), ("avi", "mpeg4"), ("mov", "mjpeg")]
)
async def test_other_containers_and_codecs(kind, codec):
    frames = FRAMES if codec != "mjpeg" else FRAMES[:3]
    data = video_file(frames, kind=kind, codec=codec) if codec != "mjpeg" else video_file(frames, kind=kind)
    assert len(await items(video(uri(data, f"video/{kind}")))) == (len(frames) + 1) // 2


async def test_frames_one_by_one_and_lists_of_images():
    sent = await items(video(jpegs(FRAMES)))
    assert len(sent) == 3
    listed = await items({"type": "video", "video": [Image.fromarray(frame) for frame in FRAMES]})
    arrays = await items({"type": "video", "video": FRAMES})
    np.testing.assert_array_equal(pixels(listed), pixels(arrays))
    urls = await items({"type": "video", "video": [uri(encoded(64, 48, seed=i)) for i in range(5)]})
    assert len(urls) == 3, "the last frame stands for the one that lacks"


async def test_a_request_says_which_frames_are_read():
    long = {"type": "video", "video": (clip(20, 64, 48), {"fps": 10.0})}
    whole, two = await items(long), await items(long, mm_processor_kwargs={"fps": 2, "do_sample_frames": True})
    assert (len(whole), len(two)) == (10, 2)
    four = await items(long, mm_processor_kwargs={"num_frames": 4})
    np.testing.assert_array_equal(pixels(four), pixels([*two]))
    assert not {one.digest for one in four} & {one.digest for one in whole}
    for wrong in ({"fps": 0}, {"fps": "2"}, {"fps": 1, "num_frames": 2}, {"num_frames": 0}, {"do_sample_frames": 1}):
        with pytest.raises(RequestError, match="mm_processor_kwargs"):
            await items(long, mm_processor_kwargs=wrong)
    with pytest.raises(RequestError, match="the video has 20"):
        await items(long, mm_processor_kwargs={"num_frames": 22})


def test_of_long_files_without_a_rule_frames_are_taken_evenly():
    times = Sampling().chosen(1000, 25.0, True)
    assert len(times.indices) == 32 and (times.indices[0], times.indices[-1]) == (0, 999)
    assert times.sampled_fps == pytest.approx(0.8)
    assert len(Sampling().chosen(1000, 25.0, False).indices) == 1000, "frames that somebody has chosen stay"


async def test_over_grpc_bytes_and_urls():
    for one in (pb.ContentPart(video=MP4), pb.ContentPart(video_url=uri(MP4, "video/mp4"))):
        chat = pb.Chat(
            messages=[pb.ChatMessage(role="user", parts=[pb.ContentPart(text="a"), one, pb.ContentPart(text="b")])]
        )
        service = image_service(MockEngine())
        given = input_from(pb.GenerateRequest(chat=chat), service.limits)
        made = await service.prepare(given, service.make_params({"max_tokens": 2}))
        assert len(made.children[0].media.items) == 3


async def test_a_uuid_names_a_video():
    service = image_service(MockEngine())
    first = await items(video(uri(MP4), uuid="mine"), service)
    again = await items({"type": "video_url", "video_url": None, "uuid": "mine"}, service)
    assert [one.digest for one in again] == [one.digest for one in first]
    with pytest.raises(RequestError, match="no image of this uuid"):
        await items({"type": "image_url", "image_url": None, "uuid": "mine"}, service)


REFUSED = {
    "no video": (uri(b"hello there, this is no video", "video/mp4"), "MP4, MOV, WebM"),
    "an image": (uri(encoded(), "video/mp4"), "MP4, MOV, WebM"),
    "damaged": (uri(MP4[:40] + bytes(len(MP4) - 40), "video/mp4"), "damaged|no pictures"),
    "cut": (uri(MP4[: len(MP4) // 2], "video/mp4"), "damaged|no pictures"),
    "a playlist": (uri(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "video/mp4"), "MP4, MOV, WebM"),
    "sound alone": ("data:video/jpeg;base64,%%%", "base64"),
    "no frame": ("data:video/jpeg;base64," + base64.b64encode(b"nonsense").decode(), "cannot be read"),
    "web": ("https://example.com/a.mp4", "fetches nothing"),
    "file": ("file:///etc/passwd", "reads no files"),
    "empty": ("", "has no video"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
async def test_what_is_no_video_is_that_requests_400(what):
    url, words = REFUSED[what]
    with pytest.raises(RequestError, match=words) as refused:
        await items(video(url))
    for told in ("0x", "site-packages", "FFmpeg", "Errno", "Traceback"):
        assert told not in refused.value.message


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (MediaPolicy(max_videos=0), "1 videos; at most 0"),
        (MediaPolicy(max_stored_frames=5), "more than 5 frames"),
        (MediaPolicy(max_frames=5), "6 frames would be read; at most 5"),
        (MediaPolicy(max_seconds=0.5), "longer than 0.5 seconds"),
        (MediaPolicy(max_pixels=64 * 48 - 1), "64 x 48 pixels"),
        (MediaPolicy(max_bytes=len(MP4) - 1), "too large"),
        (MediaPolicy(video_s=0.001), "more time or memory"),
    ],
)
async def test_bounds(policy, words):
    with pytest.raises(RequestError, match=words):
        await items(video(uri(MP4, "video/mp4")), image_service(MockEngine(), policy))


async def test_frames_that_are_small_as_files_are_unpacked_one_by_one_and_not_for_ever(monkeypatch):
    """A frame of one colour has a hundred bytes and up to 200 MB of pixels; some hundred of them fit into a request."""
    alive: list[weakref.ref] = []
    most = 0

    def unpacked(*args):
        nonlocal most
        image = decode(*args)
        alive.append(weakref.ref(image))
        most = max(most, sum(one() is not None for one in alive))
        return image

    monkeypatch.setattr(video_module, "decode", unpacked)
    await items(video(jpegs([*FRAMES] * 4)))
    assert len(alive) == 24 and most == 1
    service = image_service(MockEngine(), MediaPolicy(max_request_pixels=10 * 64 * 48))
    with pytest.raises(RequestError, match="more than 30720 pixels together"):
        await items(video(jpegs([*FRAMES] * 2)), service)
    assert len(alive) == 24 + 10
    with pytest.raises(RequestError, match="not all of one size"):
        await items(video(jpegs([*FRAMES, FRAMES[0][:40]])))


async def test_more_than_the_context_is_refused_before_it_is_cut():
    with pytest.raises(RequestError, match="embeddings than"):
        await items(video(uri(MP4, "video/mp4")), image_service(MockEngine(max_model_len=8)))


async def test_models_without_videos_refuse_them():
    with pytest.raises(RequestError, match="text only"):
        await items(video(uri(MP4)), mock_service(MockEngine()))
    import dataclasses

    from serving.media import MediaReader
    from tests.serving.media.images import ImageTemplate

    blind = MediaReader(dataclasses.replace(PROCESSOR, video=None), MediaPolicy(), 64)
    service = mock_service(MockEngine(), template=ImageTemplate(), media=blind)
    with pytest.raises(RequestError, match="is a video; this model takes text and images"):
        await items(video(uri(MP4)), service)
    assert await prepared_image(service)


async def prepared_image(service):
    given = GenerateInput(messages=asked("a", part(uri(encoded())), "b"))
    return (await service.prepare(given, service.make_params({"max_tokens": 2}))).children[0].media


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="this system has no /proc")
def test_the_worker_takes_no_address_space_for_each_core():
    """Which its bound on memory counts."""
    code = (
        "import numpy; print(next(line for line in open('/proc/self/status') if line.startswith('Threads')).split()[1])"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], env=video_module._worker_environment(), capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == "1"
