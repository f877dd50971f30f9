"""What a page is, in terms that two engines agree on, and the digest by which its content is known to be that."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from serving.engine.api.media import Media
from serving.engine.cache.page_pool import chain_digest, root_digest


def chain(
    identity: bytes,
    tokens: Sequence[int],
    page_size: int,
    adapter: str | None,
    salt: str | None,
    media: Media | None = None,
) -> list[bytes]:
    """Of each full page of a sequence: what decides its content, in every engine of this identity.

    Not what an engine's own index goes by, which also counts how often its cache was emptied.
    """
    found = [root_digest("travel", identity.hex(), adapter, salt)]
    raw, width = (np.array(tokens, np.int32) if media is None else media.standing(tokens)).tobytes(), 4 * page_size
    for end in range(width, len(raw) + 1, width):
        images = b"" if media is None else media.digests((end - width) // 4, end // 4)
        found.append(chain_digest(found[-1], raw[end - width : end] + images))
    return found[1:]


def content_digest(link: bytes, page: int, content: bytes) -> bytes:
    """Of a page that is known by `link` and has this content: differs where either does.

    Args:
        page: its place in the sequence; -1 for a recurrent state.
    """
    h = hashlib.blake2b(link + page.to_bytes(8, "little", signed=True), digest_size=16)
    h.update(content)
    return h.digest()
