"""Images, sounds and files of a request on their way into its prompt: images and sounds where the model reads them, files as their
texts."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from serving.errors import invalid
from serving.media.documents import text_of_file
from serving.media.fetching import MediaPolicy, fetch
from serving.media.parts import Source, has_media, take_out, with_texts
from serving.service.requests import prepare as prep
from serving.service.requests.inputs import GenerateInput
from serving.service.requests.limits import Limits
from serving.service.threads import TextThreads

if TYPE_CHECKING:
    from serving.engine.api.media import Media
    from serving.media import MediaReader
    from serving.service.voice import Voice


def take_images(given: GenerateInput, reader: MediaReader | None) -> tuple[GenerateInput, Sequence[Source]]:
    """The request without its images and files, and those. Images stay where the model reads none: whoever checks it refuses them.

    Raises:
        RequestError: INVALID_ARGUMENT naming the part, for one that is no image; or what does not go with images.
    """
    images = reader is not None
    if given.media:
        if given.token_ids is None:
            raise invalid("media need a prompt of token ids: messages have theirs among their parts.", "media")
        if reader is None:
            raise invalid("This model takes text.", "media")
        return dataclasses.replace(given, media=()), given.media
    if isinstance(given.messages, str) or not has_media(given.messages, images):
        return given, ()
    if given.truncate_prompt_tokens is not None:
        raise invalid("truncate_prompt_tokens does not go with images: it might cut one.", "truncate_prompt_tokens")
    sound = None if reader is None else reader.processor.sound
    messages, sources = take_out(
        given.messages or (), images, sound.mark if sound is not None and sound.wordless else ""
    )
    return dataclasses.replace(given, messages=messages, images=sum(not one.file for one in sources)), sources


async def _with_files(
    given: GenerateInput, sources: Sequence[Source], limits: Limits, policy: MediaPolicy
) -> GenerateInput:
    """The request with its files' texts in their places.

    Raises:
        RequestError: INVALID_ARGUMENT: a file that cannot be read, or too much text.
    """
    files = [source for source in sources if source.file]
    if not files:
        return given
    if len(files) > policy.max_files:
        raise invalid(f"The request has {len(files)} files; at most {policy.max_files} are taken.", "messages")
    texts: dict[tuple[int, int], str] = {}
    for source in files:
        content = source.content
        data = await asyncio.to_thread(fetch, content, policy, source.place) if isinstance(content, str) else content
        text = await text_of_file(data, source.place)
        texts[source.at] = f"{source.name}:\n{text}\n" if source.name else f"{text}\n"
    given = dataclasses.replace(given, messages=with_texts(given.messages or (), texts))
    given.check(limits)
    return given


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
    given = await _with_files(given, sources, limits, MediaPolicy() if reader is None else reader.policy)
    asked = (given, voice.tokenizer, voice.chat_template, limits)
    pictures = [source for source in sources if not source.file]
    if not pictures or reader is None:
        return *(await threads.run(prep.render_and_encode, *asked)), None
    most = limits.context or limits.max_prompt_chars
    images = await reader.read(pictures, salt, most, given.mm_processor_kwargs, limits.max_media_bytes)
    rewrite = functools.partial(reader.write, found=images) if reader.writes(images) else None  # not of token ids
    prompt, ids = await threads.run(prep.render_and_encode, *asked, rewrite)
    ids, media = await threads.run(reader.expand, ids, images, given.mm_processor_kwargs)
    return prompt, ids, media
