"""Images of a request on their way into its prompt, where the model reads some."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from serving.errors import invalid
from serving.media.parts import Source, has_media, take_out
from serving.service.requests import prepare as prep
from serving.service.requests.inputs import GenerateInput
from serving.service.requests.limits import Limits
from serving.service.threads import TextThreads

if TYPE_CHECKING:
    from serving.engine.api.media import Media
    from serving.media import MediaReader
    from serving.service.voice import Voice


def take_images(given: GenerateInput, reader: MediaReader | None) -> tuple[GenerateInput, Sequence[Source]]:
    """The request without its images, and those. As it is where the model reads none: whoever checks it refuses them.

    Raises:
        RequestError: INVALID_ARGUMENT naming the part, for one that is no image; or what does not go with images.
    """
    if reader is None or isinstance(given.messages, str) or not has_media(given.messages):
        return given, ()
    if given.truncate_prompt_tokens is not None:
        raise invalid("truncate_prompt_tokens does not go with images: it might cut one.", "truncate_prompt_tokens")
    messages, sources = take_out(given.messages or ())
    return dataclasses.replace(given, messages=messages, images=len(sources)), sources


async def read_prompt(
    given: GenerateInput,
    sources: Sequence[Source],
    voice: Voice,
    limits: Limits,
    threads: TextThreads,
    reader: MediaReader | None,
    salt: str | None = None,
) -> tuple[str | None, list[int], Media | None]:
    """The prompt as text (None for token ids), as token ids, and the images in it.

    Args:
        given, sources: from `take_images`.
        salt: see `MediaReader.read`.
    Raises:
        RequestError: INVALID_ARGUMENT.
    """
    asked = (given, voice.tokenizer, voice.chat_template, limits)
    if not sources or reader is None:
        return *(await threads.run(prep.render_and_encode, *asked)), None
    images = await reader.read(sources, salt, limits.context or limits.max_prompt_chars)
    rewrite = functools.partial(reader.write, found=images) if reader.processor.mark else None
    prompt, ids = await threads.run(prep.render_and_encode, *asked, rewrite)
    ids, media = await threads.run(reader.expand, ids, images)
    return prompt, ids, media
