"""Images in messages: found and taken out, whichever client's way of writing them it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from serving.errors import invalid

IMAGE = "image"
"""The type of the part that a chat template is given in an image's place."""

_KINDS = ("image_url", "input_image", "image", "image_pil")


@dataclasses.dataclass(frozen=True)
class Source:
    """One image of a request, not looked at yet.

    Attributes:
        content: a URL, the file's bytes, or (from Python) a `PIL.Image.Image` or an array of pixels.
        place: of its part in the request, for errors.
    """

    content: Any
    place: str


def has_media(messages: Sequence[Any] | None) -> bool:
    """Whether some message has a part that is an image."""
    return any(_is_image(part) for message in messages or () for part in _content(message))


def take_out(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Source]]:
    """The messages with `{"type": "image"}` where their images were, and the images, in their order.

    Raises:
        RequestError: INVALID_ARGUMENT for a part of an image's type without one.
    """
    shaped: list[dict[str, Any]] = []
    sources: list[Source] = []
    for i, message in enumerate(messages):
        parts = _content(message)
        if not any(map(_is_image, parts)):
            shaped.append(dict(message) if isinstance(message, Mapping) else message)
            continue
        content: list[Any] = []
        for j, part in enumerate(parts):
            if _is_image(part):
                sources.append(_source(part, f"messages[{i}].content[{j}]"))
                part = {"type": IMAGE}
            content.append(part)
        shaped.append({**message, "content": content})
    return shaped, sources


def _content(message: Any) -> Sequence[Any]:
    content = message.get("content") if isinstance(message, Mapping) else None
    return content if isinstance(content, Sequence) and not isinstance(content, str) else ()


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _KINDS


def _source(part: Mapping[str, Any], place: str) -> Source:
    kind = part["type"]
    found = part.get("image_url") if kind in ("image_url", "input_image") else part.get(kind)
    if kind == IMAGE and found is None:
        found = part.get("url")
    if isinstance(found, Mapping):
        found = found.get("url")
    if found is None or (isinstance(found, str) and not found):
        raise invalid(f"{place} of type {kind!r} has no image.", place)
    if (
        not isinstance(found, str | bytes)
        and not hasattr(found, "convert")
        and not hasattr(found, "__array_interface__")
    ):
        raise invalid(
            f"{place} of type {kind!r} has a {type(found).__name__}; give a URL, or data: with its content.", place
        )
    return Source(found, place)
