"""What a text service has where the model reads images, videos or sounds."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import weakref
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.access.keys import caller_of_task
from serving.engine.api.media import Media, MediaOrigin
from serving.errors import ErrorKind, RequestError, invalid
from serving.media.clips import GivenSound
from serving.media.decoding import Room, check_size, decode
from serving.media.fetching import MediaPolicy, fetch
from serving.media.frames.sampling import Sampling
from serving.media.parts import Source
from serving.media.processors import PROCESSORS, Processor
from serving.media.prompt import Seen, mark_of, with_media, written
from serving.media.video import GivenVideo, piece_digests

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

KEPT_BYTES = 256 * 2**20
THREADS = 2
VIDEO_NAMES = ("fps", "num_frames", "do_sample_frames")
"""What `mm_processor_kwargs` says of videos."""
MAX_NAMED = 4096
"""Names that clients have given images, the last ones."""


def reader_of(
    hf: Mapping[str, Any], architecture: str, policy: MediaPolicy, max_patches: int, sends_on: bool = False
) -> MediaReader:
    """The reader of a checkpoint.

    Args:
        hf: its config.json, with preprocessor_config.json under "preprocessor".
        max_patches: of one image, that its tower takes.
        sends_on: see MediaReader.
    """
    return MediaReader(PROCESSORS[architecture](hf), policy, max_patches, sends_on)


@dataclasses.dataclass(frozen=True)
class _How:
    """How one request's images, videos and sounds are read. `most_held` as in `MediaReader.read`."""

    processor: Processor
    sampling: Sampling | None
    max_tokens: int
    room: Room
    most_held: int | None


class MediaReader:
    """Fetches, decodes and cuts images, videos and sounds, in threads of its own; keeps the last ones, so that a conversation's are
    cut once.

    Args:
        max_patches: of one image.
        sends_on: keep what came, for whoever reads it again behind a gateway.
    """

    def __init__(self, processor: Processor, policy: MediaPolicy, max_patches: int, sends_on: bool = False) -> None:
        self.processor = processor
        self._sends_on = sends_on
        self.policy = policy
        self._max_patches = max_patches
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="jaxserve-media")
        self._kept: OrderedDict[bytes, Seen] = OrderedDict()
        self._kept_bytes = self._held_bytes = 0
        self._named: OrderedDict[tuple[str | None, str | None, str], bytes] = OrderedDict()
        self._lock = (
            RLock()
        )  # what is cut may go, and be counted, whenever memory is collected: with the lock held, too

    async def read(
        self,
        sources: Sequence[Source],
        salt: str | None,
        max_tokens: int,
        said: Mapping[str, Any] | None = None,
        most_held: int | None = None,
    ) -> Sequence[Seen]:
        """All images, videos and sounds of a request, in the order of its parts.

        Args:
            salt: requests share what is made of images only with requests of the same one.
            said: how the request wants images and videos cut, see `Processor.asked` and `Sampling.asked`.
            max_tokens: of a prompt: more embeddings than this are not made.
            most_held: bytes of what is cut, of all requests that wait or run and of what is kept, beyond which a further one is
                asked to come later; None for no bound.
        Raises:
            RequestError: INVALID_ARGUMENT naming the part; the words are the same whatever is wrong inside. RESOURCE_EXHAUSTED.
        """
        self._count(sources)
        loop, found = asyncio.get_running_loop(), []
        caller = caller_of_task.get()
        how = self._asked(said or {}, max_tokens, most_held)
        owner = (salt, None if caller is None else caller.name)
        what = "sounds" if sources and all(source.sound for source in sources) else "images"
        try:
            async with asyncio.timeout(self.policy.read_s):
                for source in sources:
                    found.append(await loop.run_in_executor(self._threads, self._read, source, how, *owner))
                    if sum(one.size for one in found) > max_tokens:
                        raise invalid(
                            f"The request's {what} have more embeddings than this model's maximum context length of "
                            f"{max_tokens} tokens. Send fewer, or {'shorter' if what == 'sounds' else 'smaller'} ones.", "messages",
                        )  # fmt: skip
        except TimeoutError:
            limit = self.policy.read_s
            raise invalid(f"The request's {what} took more than {limit:g} seconds to read.", "messages") from None
        except RequestError:
            raise
        except Exception as error:
            log.error("what a request brought along could not be read", exc_info=error)
            raise RequestError(
                ErrorKind.INTERNAL, f"The server failed to read this request's {what}; its log says why."
            ) from error
        return found

    def _count(self, sources: Sequence[Source]) -> None:
        """Raises RequestError where there are too many, or such as nothing here reads."""
        processor, policy = self.processor, self.policy
        reads = {"image": processor.images, "video": processor.video is not None, "sound": processor.sound is not None}
        limits = {"image": policy.max_images, "video": policy.max_videos, "sound": policy.max_sounds}
        counts = Counter(source.what for source in sources)
        for source in sources:
            if not reads[source.what]:
                takes = " and ".join(["text", *(f"{name}s" for name, read in reads.items() if read)])
                one = f"an {source.what}" if source.what == "image" else f"a {source.what}"
                raise invalid(f"{source.place} is {one}; this model takes {takes}.", source.place)
        for what, count in counts.items():
            if count > limits[what]:
                raise invalid(f"The request has {count} {what}s; at most {limits[what]} are taken.", "messages")

    def _asked(self, said: Mapping[str, Any], max_tokens: int, most_held: int | None) -> _How:
        video = self.processor.video
        own = {} if video is None else {name: said[name] for name in VIDEO_NAMES if name in said}
        try:
            processor = self.processor.asked({name: value for name, value in said.items() if name not in own})
            sampling = None if video is None else video.sampling.asked(own)
            return _How(processor, sampling, max_tokens, Room(self.policy), most_held)
        except ValueError as error:
            raise invalid(f"mm_processor_kwargs: {error}", "mm_processor_kwargs") from None

    def writes(self, found: Sequence[Seen]) -> bool:
        """Whether something is written in the prompt for what was read."""
        return any(mark_of(one, self.processor) for one in found)

    def write(self, text: str, found: Sequence[Seen]) -> str | list[str]:
        """See `prompt.written`."""
        return written(text, found, self.processor)

    def expand(
        self, ids: Sequence[int], found: Sequence[Seen], said: Mapping[str, Any] | None = None
    ) -> tuple[list[int], Media]:
        """See `prompt.with_media`; `said` as for `read`."""
        whole, media = with_media(ids, found, self.processor)
        if not self._sends_on:
            return whole, media
        sources = tuple((one.raw, "video" if one.video else "sound" if one.sound else "image") for one in found)
        return whole, dataclasses.replace(media, origin=MediaOrigin(tuple(ids), sources, said or {}))

    def _read(self, source: Source, how: _How, salt: str | None, caller: str | None) -> Seen:
        """What a client calls an image (`uuid`) finds it again for the same caller, and decides nothing else: images are told apart
        by their content."""
        if source.content is None:
            return self._found(source, (salt, caller, source.uuid or ""))
        read = {"image": self._read_image, "video": self._read_video, "sound": self._read_sound}[source.what]
        digest, seen = read(source, how, salt)
        if source.uuid is not None:
            with self._lock:
                self._named[salt, caller, source.uuid] = digest
                self._named.move_to_end((salt, caller, source.uuid))
                while len(self._named) > MAX_NAMED:
                    self._named.popitem(last=False)
        return seen

    def _found(self, source: Source, name: tuple[str | None, str | None, str]) -> Seen:
        with self._lock:
            digest = self._named.get(name)
            kept = None if digest is None else self._kept.get(digest)
            if digest is None or kept is None or (kept.video, kept.sound) != (source.video, source.sound):
                raise invalid(f"{source.place}: no {source.what} of this uuid is kept: send its content.", source.place)
            self._named.move_to_end(name)
            self._kept.move_to_end(digest)
            return kept

    def _read_image(self, source: Source, how: _How, salt: str | None) -> tuple[bytes, Seen]:
        from PIL import ImageOps

        content, place, processor = source.content, source.place, how.processor
        data, image = b"", None
        if isinstance(content, str | bytes):
            data = fetch(content, self.policy, place) if isinstance(content, str) else content
            if len(data) > self.policy.max_bytes:
                raise invalid(f"{place} is too large: at most {self.policy.max_bytes} bytes are taken.", place)
            digest = self._digest(processor.identity(), salt, b"file", data)
        else:
            picture = _picture(content, place)
            check_size(picture.size, self.policy, place)
            image = ImageOps.exif_transpose(picture).convert("RGB")
            digest = self._digest(processor.identity(), salt, repr(image.size).encode(), image.tobytes())
        if (kept := self._again(digest)) is not None:
            return digest, kept
        image = decode(data, self.policy, place, how.room) if image is None else image
        try:
            pieces = tuple(processor.pieces(image))
        except ValueError as error:
            raise invalid(f"{place}: {error}", place) from None
        digests = (digest,) if len(pieces) == 1 else tuple(piece_digests(digest, len(pieces)))
        return digest, self._keep(Seen(pieces, digests, raw=data if self._sends_on else b""), digest, place, how)

    def _read_video(self, source: Source, how: _How, salt: str | None) -> tuple[bytes, Seen]:
        video = how.processor.video
        assert video is not None and how.sampling is not None  # `_count` has looked
        given = GivenVideo(source.content, self.policy, source.place)
        digest = self._digest(f"{video!r} {how.sampling!r}", salt, b"video", *given.parts())
        if (kept := self._again(digest)) is not None:
            return digest, kept
        pieces = given.patched(video, how.sampling, how.max_tokens, how.room)
        raw = (given.data or source.content) if self._sends_on else b""
        seen = Seen(tuple(pieces), tuple(piece_digests(digest, len(pieces))), video=True, raw=raw)
        return digest, self._keep(seen, digest, source.place, how)

    def _read_sound(self, source: Source, how: _How, salt: str | None) -> tuple[bytes, Seen]:
        sound = how.processor.sound
        assert sound is not None  # `_count` has looked
        given = GivenSound(source.content, self.policy, source.place)
        digest = self._digest(how.processor.identity(), salt, b"sound", *given.parts())
        if (kept := self._again(digest)) is not None:
            return digest, kept
        pieces = sound.pieces(given.heard(sound.most_seconds(how.max_tokens), sound.enough_s))
        raw = (given.data or b"") if self._sends_on else b""
        seen = Seen(tuple(pieces), tuple(piece_digests(digest, len(pieces))), sound=True, raw=raw)
        return digest, self._keep(seen, digest, source.place, how)

    @staticmethod
    def _digest(identity: str, salt: str | None, *content: bytes) -> bytes:
        """Of everything that decides an image's embeddings, and of who may share them; each part behind its length."""
        h = hashlib.blake2b(digest_size=32)
        for part in (identity.encode(), b"" if salt is None else b"\0" + salt.encode(), *content):
            h.update(len(part).to_bytes(8, "little"))
            h.update(part)
        return h.digest()

    def _again(self, digest: bytes) -> Seen | None:
        with self._lock:
            if (kept := self._kept.get(digest)) is not None:
                self._kept.move_to_end(digest)
            return kept

    def _keep(self, seen: Seen, digest: bytes, place: str, how: _How) -> Seen:
        if max(len(piece.patches_PX) for piece in seen.pieces) > self._max_patches:
            what, other = ("sound", "shorter") if seen.sound else ("image", "smaller")
            raise invalid(
                f"{place}: the {what} is more than this model's context has room for. Send a {other} one.", place
            )
        with self._lock:
            self._hold(seen, how.most_held)
            if seen.nbytes <= KEPT_BYTES and digest not in self._kept:
                self._kept[digest] = seen
                self._kept_bytes += seen.nbytes
                while self._kept_bytes > KEPT_BYTES:
                    self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return seen

    def _hold(self, seen: Seen, most: int | None) -> None:
        """Counts what is cut for as long as somebody has it: a request that waits or runs, or this, which keeps little."""
        others = self._held_bytes - self._kept_bytes
        if most is not None and others > 0 and others + seen.nbytes > most:  # one alone is always taken
            raise RequestError(
                ErrorKind.RESOURCE_EXHAUSTED, f"The images, videos and sounds of requests that wait or run have more than {most} "
                "bytes. Try again later.", code="queue_full", retry_after_s=1.0,
            )  # fmt: skip
        for at, piece in enumerate(seen.pieces):
            size = piece.patches_PX.nbytes + (0 if at else len(seen.raw))
            self._held_bytes += size
            weakref.finalize(piece.patches_PX, self._let_go, size)

    def _let_go(self, size: int) -> None:
        with self._lock:
            self._held_bytes -= size


def _picture(content: Any, place: str) -> Image:
    """A Pillow image, or an array as one: uint8 [H, W] or [H, W, 3]."""
    from PIL import Image as Pillow

    if hasattr(content, "convert"):
        return content
    try:
        return Pillow.fromarray(np.asarray(content))
    except (TypeError, ValueError):
        raise invalid(f"{place}: an array must be of uint8 [H, W] or [H, W, 3].", place) from None
