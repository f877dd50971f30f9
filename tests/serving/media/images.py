"""Images and a text service that reads them, over the mock engine."""

from __future__ import annotations

import base64
import io
from typing import Any

from serving.media import MediaPolicy, MediaReader
from serving.media.processors.qwen import QwenVLProcessor
from tests.mock_engine import SPECIAL, MockEngine, MockTemplate, mock_service
from tests.models.tiny_vision import picture

PLACE, VIDEO_PLACE = (256 + SPECIAL.index(token) for token in ("<|tool|>", "<|system|>"))
PROCESSOR = QwenVLProcessor.of(
    {
        "image_token_id": PLACE,
        "video_token_id": VIDEO_PLACE,
        "preprocessor": {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 16},
    }
)
MARKS = {"image": "<|tool|>", "video": "<|system|>"}


class ImageTemplate(MockTemplate):
    """The mock template, with `<|tool|>` where an image is and `<|system|>` where a video is."""

    def render(self, messages: Any, *args: Any, **kwargs: Any) -> str:
        return super().render([{**m, "content": _shown(m["content"])} for m in messages], *args, **kwargs)


def _shown(content: Any) -> Any:
    parts = content if isinstance(content, list) else [content]
    return [
        {"text": MARKS[one["type"]]} if isinstance(one, dict) and one.get("type") in MARKS else one for one in parts
    ]


def reader(policy: MediaPolicy | None = None, max_patches: int = 64) -> MediaReader:
    return MediaReader(PROCESSOR, policy or MediaPolicy(), max_patches)


def image_service(engine: MockEngine, policy: MediaPolicy | None = None, **more: Any):
    return mock_service(engine, template=ImageTemplate(), media=reader(policy), **more)


def encoded(width: int = 40, height: int = 30, kind: str = "PNG", seed: int = 0, **how: Any) -> bytes:
    """An image as a file's bytes."""
    out = io.BytesIO()
    picture(width, height, seed).save(out, kind, **how)
    return out.getvalue()


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def asked(*parts: Any) -> list[dict[str, Any]]:
    """One user's turn."""
    return [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}]
