"""What a text service has where the model reads images."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.access.keys import caller_of_task
from serving.engine.api.media import Media
from serving.errors import ErrorKind, RequestError, invalid
from serving.media.decoding import check_size, decode
from serving.media.fetching import MediaPolicy, fetch
from serving.media.parts import Source
from serving.media.processors import PROCESSORS, Processor
from serving.media.processors.base import Patched
from serving.media.prompt import with_images, written

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

KEPT_BYTES = 256 * 2**20
THREADS = 2
MAX_NAMED = 4096
"""Names that clients have given images, the last ones."""


def reader_of(hf: Mapping[str, Any], architecture: str, policy: MediaPolicy, max_patches: int) -> MediaReader:
    """The reader of a checkpoint.

    Args:
        hf: its config.json, with preprocessor_config.json under "preprocessor".
        max_patches: of one image, that its tower takes.
    """
    return MediaReader(PROCESSORS[architecture](hf), policy, max_patches)


class MediaReader:
    """Fetches, decodes and cuts images, in threads of its own; keeps the last ones, so that a conversation's are cut once."""

    def __init__(self, processor: Processor, policy: MediaPolicy, max_patches: int) -> None:
        self.processor = processor
        self.policy = policy
        self._max_patches = max_patches
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="jaxserve-media")
        self._kept: OrderedDict[bytes, Patched] = OrderedDict()
        self._kept_bytes = 0
        self._named: OrderedDict[tuple[str | None, str | None, str], bytes] = OrderedDict()
        self._lock = Lock()

    async def read(
        self, sources: Sequence[Source], salt: str | None, max_tokens: int, said: Mapping[str, Any] | None = None
    ) -> Images:
        """All images of a request.

        Args:
            salt: requests share what is made of images only with requests of the same one.
            said: how the request wants images cut, see `Processor.asked`.
            max_tokens: of a prompt: more embeddings than this are not made.
        Raises:
            RequestError: INVALID_ARGUMENT naming the part; the words are the same whatever is wrong inside.
        """
        if len(sources) > self.policy.max_images:
            raise invalid(
                f"The request has {len(sources)} images; at most {self.policy.max_images} are taken.", "messages"
            )
        loop, found = asyncio.get_running_loop(), Images([], [])
        caller = caller_of_task.get()
        owner = (salt, None if caller is None else caller.name)
        try:
            processor = self.processor.asked(said or {})
        except ValueError as error:
            raise invalid(f"mm_processor_kwargs: {error}", "mm_processor_kwargs") from None
        try:
            async with asyncio.timeout(self.policy.read_s):
                for source in sources:
                    digest, image = await loop.run_in_executor(self._threads, self._read, source, processor, *owner)
                    found.digests.append(digest)
                    found.images.append(image)
                    if sum(one.size for one in found.images) > max_tokens:
                        raise invalid(
                            f"The request's images have more embeddings than this model's maximum context length of "
                            f"{max_tokens} tokens. Send fewer, or smaller ones.", "messages",
                        )  # fmt: skip
        except TimeoutError:
            limit = self.policy.read_s
            raise invalid(f"The request's images took more than {limit:g} seconds to read.", "messages") from None
        except RequestError:
            raise
        except Exception as error:
            log.error("an image of a request could not be read", exc_info=error)
            raise RequestError(
                ErrorKind.INTERNAL, "The server failed to read this request's images; its log says why."
            ) from error
        return found

    def write(self, text: str, found: Images) -> str:
        """See `prompt.written`."""
        return written(text, found.images, self.processor)

    def expand(self, ids: Sequence[int], found: Images) -> tuple[list[int], Media]:
        """See `prompt.with_images`."""
        return with_images(ids, found.images, found.digests, self.processor)

    def _read(
        self, source: Source, processor: Processor, salt: str | None, caller: str | None
    ) -> tuple[bytes, Patched]:
        """(digest, image). What a client calls an image (`uuid`) finds it again for the same caller, and decides nothing else:
        images are told apart by their content."""
        if source.content is None:
            return self._found(source, (salt, caller, source.uuid or ""))
        digest, patched = self._read_content(source, processor, salt)
        if source.uuid is not None:
            with self._lock:
                self._named[salt, caller, source.uuid] = digest
                self._named.move_to_end((salt, caller, source.uuid))
                while len(self._named) > MAX_NAMED:
                    self._named.popitem(last=False)
        return digest, patched

    def _found(self, source: Source, name: tuple[str | None, str | None, str]) -> tuple[bytes, Patched]:
        with self._lock:
            digest = self._named.get(name)
            kept = None if digest is None else self._kept.get(digest)
            if digest is None or kept is None:
                raise invalid(f"{source.place}: no image of this uuid is kept: send its content.", source.place)
            self._named.move_to_end(name)
            self._kept.move_to_end(digest)
            return digest, kept

    def _read_content(self, source: Source, processor: Processor, salt: str | None) -> tuple[bytes, Patched]:
        from PIL import ImageOps

        content, place = source.content, source.place
        data, image = b"", None
        if isinstance(content, str | bytes):
            data = fetch(content, self.policy, place) if isinstance(content, str) else content
            if len(data) > self.policy.max_bytes:
                raise invalid(f"{place} is too large: at most {self.policy.max_bytes} bytes are taken.", place)
            digest = self._digest(processor, b"file", data, salt)
        else:
            picture = _picture(content, place)
            check_size(picture.size, self.policy, place)
            image = ImageOps.exif_transpose(picture).convert("RGB")
            digest = self._digest(processor, repr(image.size).encode(), image.tobytes(), salt)
        with self._lock:
            if (kept := self._kept.get(digest)) is not None:
                self._kept.move_to_end(digest)
                return digest, kept
        image = decode(data, self.policy, place) if image is None else image
        try:
            patched = processor.patched(image)
        except ValueError as error:
            raise invalid(f"{place}: {error}", place) from None
        if len(patched.patches_PX) > self._max_patches:
            raise invalid(
                f"{place}: the image is more than this model's context has room for. Send a smaller one.", place
            )
        self._keep(digest, patched)
        return digest, patched

    @staticmethod
    def _digest(processor: Processor, kind: bytes, content: bytes, salt: str | None) -> bytes:
        """Of everything that decides an image's embeddings, and of who may share them; each part behind its length."""
        h = hashlib.blake2b(digest_size=32)
        for part in (processor.identity().encode(), b"" if salt is None else b"\0" + salt.encode(), kind, content):
            h.update(len(part).to_bytes(8, "little"))
            h.update(part)
        return h.digest()

    def _keep(self, digest: bytes, patched: Patched) -> None:
        size = patched.patches_PX.nbytes
        with self._lock:
            if size > KEPT_BYTES or digest in self._kept:
                return
            self._kept[digest] = patched
            self._kept_bytes += size
            while self._kept_bytes > KEPT_BYTES:
                self._kept_bytes -= self._kept.popitem(last=False)[1].patches_PX.nbytes


def _picture(content: Any, place: str) -> Image:
    """A Pillow image, or an array as one: uint8 [H, W] or [H, W, 3]."""
    from PIL import Image as Pillow

    if hasattr(content, "convert"):
        return content
    try:
        return Pillow.fromarray(np.asarray(content))
    except (TypeError, ValueError):
        raise invalid(f"{place}: an array must be of uint8 [H, W] or [H, W, 3].", place) from None


class Images:
    """A request's images, read.

    Attributes:
        images, digests: one each, in the order of the request's parts.
    """

    __slots__ = ("digests", "images")

    def __init__(self, images: list[Patched], digests: list[bytes]) -> None:
        self.images = images
        self.digests = digests
