"""Images, videos, sounds and files in messages: found and taken out, whichever client's way of writing them it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from serving.errors import invalid

IMAGE, VIDEO, AUDIO = PLACES = ("image", "video", "audio")
"""The types of the parts that a chat template is given in an image's, a video's and a sound's place."""

_KINDS = {
    "image_url": IMAGE,
    "input_image": IMAGE,
    "image": IMAGE,
    "image_pil": IMAGE,
    "video_url": VIDEO,
    "video": VIDEO,
    "input_audio": AUDIO,
    "audio_url": AUDIO,
    "audio": AUDIO,
}
_FILES = ("file", "input_file")
MAX_UUID = 128
MAX_FORMAT = 16


@dataclasses.dataclass(frozen=True)
class Source:
    """One image, video, sound or file of a request, not looked at yet.

    Attributes:
        content: a URL, the file's bytes, or (from Python) a `PIL.Image.Image` or an array of pixels; of a video also a list of
            those, its frames, or a pair of an array and an object with its `fps`; of a sound also samples, alone or in a pair with
            their rate, and a path. None where `uuid` alone names an image that was sent before.
        place: of its part in the request, for errors.
        at: its message, and its place among the message's parts.
        uuid: the client's name for it.
        file: whether it is a file whose text is wanted; `name` is what the client calls it.
        video, sound: whether it is a video, or a sound.
    """

    content: Any
    place: str
    at: tuple[int, int] = (0, 0)
    uuid: str | None = None
    file: bool = False
    name: str = ""
    video: bool = False
    sound: bool = False

    @property
    def what(self) -> str:
        """It, for people."""
        return "video" if self.video else "sound" if self.sound else "file" if self.file else "image"


def has_media(messages: Sequence[Any] | None, images: bool = True) -> bool:
    """Whether some message has a part that is a file or, where `images`, an image or a video."""
    return any(_is_taken(part, images) for message in messages or () for part in _content(message))


def senses_of(messages: Sequence[Any] | None) -> frozenset[str]:
    """What a model must read to take these, in the words of `EngineInfo.modalities`."""
    parts = (part for message in messages or () for part in _content(message))
    return frozenset(_KINDS[part["type"]] for part in parts if _is_taken(part, True) and part["type"] in _KINDS)


def take_out(
    messages: Sequence[Mapping[str, Any]], images: bool = True, mark: str = ""
) -> tuple[list[dict[str, Any]], list[Source]]:
    """The messages with `{"type": "image"}` where their images were, `{"type": "video"}` where videos were, and empty texts where
    files were, and those, in their order. Sounds leave `{"type": "audio"}`, or `mark` as text.

    Args:
        images: whether images, videos and sounds are taken out.
        mark: what stands for a sound where the chat template knows nothing of them.
    Raises:
        RequestError: INVALID_ARGUMENT for a part of an image's or file's type without one.
    """
    shaped: list[dict[str, Any]] = []
    sources: list[Source] = []
    for i, message in enumerate(messages):
        parts = _content(message)
        if not any(_is_taken(part, images) for part in parts):
            shaped.append(dict(message) if isinstance(message, Mapping) else message)
            continue
        content: list[Any] = []
        for j, part in enumerate(parts):
            if _is_taken(part, images):
                place, kind = f"messages[{i}].content[{j}]", _KINDS.get(part["type"])
                source = _file(part, place) if kind is None else _READ[kind](part, place)
                sources.append(dataclasses.replace(source, at=(i, j)))
                text = mark if source.sound else ""
                part = {"type": "text", "text": text} if source.file or text else {"type": kind}
            content.append(part)
        shaped.append({**message, "content": content})
    return shaped, sources


def with_texts(messages: Sequence[Mapping[str, Any]], texts: Mapping[tuple[int, int], str]) -> list[dict[str, Any]]:
    """The messages of `take_out` with texts in their files' places."""
    shaped = [dict(message) for message in messages]
    for (i, j), text in texts.items():
        content = list(shaped[i]["content"])
        content[j] = {"type": "text", "text": text}
        shaped[i]["content"] = content
    return shaped


def _content(message: Any) -> Sequence[Any]:
    content = message.get("content") if isinstance(message, Mapping) else None
    return content if isinstance(content, Sequence) and not isinstance(content, str) else ()


def _is_taken(part: Any, images: bool) -> bool:
    return isinstance(part, Mapping) and part.get("type") in (*_FILES, *(_KINDS if images else ()))


def _image(part: Mapping[str, Any], place: str) -> Source:
    kind = part["type"]
    found = part.get("image_url") if kind in ("image_url", "input_image") else part.get(kind)
    if kind == IMAGE and found is None:
        found = part.get("url")
    uuid = _uuid(part, place)
    if isinstance(found, Mapping):
        found = found.get("url")
    if found is None and uuid is not None:
        return Source(None, place, uuid=uuid)
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
    return Source(found, place, uuid=uuid)


def _video(part: Mapping[str, Any], place: str) -> Source:
    kind = part["type"]
    found = part.get(kind) if part.get(kind) is not None else part.get("url")
    uuid = _uuid(part, place)
    fps = part.get("fps")
    if isinstance(found, Mapping):
        found, fps = found.get("url"), found.get("fps", fps)
    if found is None and uuid is not None:
        return Source(None, place, uuid=uuid, video=True)
    if found is None or (isinstance(found, str | bytes | list) and not found):
        raise invalid(f"{place} of type {kind!r} has no video.", place)
    if fps is not None and not (isinstance(found, tuple) and len(found) == 2):
        found = (found, {"fps": fps})
    return Source(found, place, uuid=uuid, video=True)


def _audio(part: Mapping[str, Any], place: str) -> Source:
    """OpenAI's way, base64 with the format's name beside it; vLLM's, a URL; and what Python has."""
    kind = part["type"]
    found = part.get(kind) if part.get(kind) is not None else part.get("url")
    uuid = _uuid(part, place)
    if kind == "input_audio" and isinstance(found, Mapping):
        found, said = found.get("data"), found.get("format")
        if said is not None and (not isinstance(said, str) or not said.isalnum() or len(said) > MAX_FORMAT):
            raise invalid(f"{place}: input_audio.format must be a name such as wav or mp3.", place)
        if isinstance(found, str) and found and not found.startswith("data:"):
            found = f"data:audio/{said or 'wav'};base64,{found}"
    elif isinstance(found, Mapping):
        found = found.get("url")
    if found is None and uuid is not None:
        return Source(None, place, uuid=uuid, sound=True)
    if found is None or (isinstance(found, str | bytes) and not found):
        raise invalid(f"{place} of type {kind!r} has no sound.", place)
    if isinstance(found, list | Mapping | bool | int | float) or (isinstance(found, tuple) and len(found) != 2):
        raise invalid(
            f"{place} of type {kind!r} has a {type(found).__name__}; give a URL, or data: with its content.", place
        )
    return Source(found, place, uuid=uuid, sound=True)


_READ = {IMAGE: _image, VIDEO: _video, AUDIO: _audio}


def _uuid(part: Mapping[str, Any], place: str) -> str | None:
    found = part.get("uuid")
    if found is not None and (not isinstance(found, str) or not 0 < len(found) <= MAX_UUID):
        raise invalid(f"{place}: uuid must be a text of 1 to {MAX_UUID} characters.", place)
    return found


def _file(part: Mapping[str, Any], place: str) -> Source:
    """OpenAI's two ways: {"type": "file", "file": {...}}, and in responses its fields beside the type."""
    said = part.get("file") if part["type"] == "file" else part
    if not isinstance(said, Mapping):
        raise invalid(f"{place} of type 'file' has no file.", place)
    if said.get("file_id") is not None:
        raise invalid(f"{place}: file_id is not taken here; give the content as file_data.", place)
    found, name = said.get("file_data") or said.get("file_url"), said.get("filename") or ""
    if not isinstance(found, str | bytes) or not found or not isinstance(name, str):
        raise invalid(f"{place} has no file_data: give data:application/pdf;base64,... .", place)
    if isinstance(found, str) and said.get("file_data") and not found.startswith("data:"):
        found = f"data:application/octet-stream;base64,{found}"  # as some clients send it
    return Source(found, place, file=True, name=name[:256])
