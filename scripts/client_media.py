"""Sends an image, a file and sound with the clients that people use, as far as the server's model takes them:

    python scripts/client_media.py --url http://127.0.0.1:8000/v1

It checks those that the interpreter running it has: openai, litellm, langchain-openai. Exit status 1 when one failed, or none was
there.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import io
import math
import os
import struct
import sys
import wave
import zlib
from collections.abc import Callable
from typing import Any

ASK = "What is it?"


def png(side: int = 64) -> bytes:
    """A square in two colours."""
    rows = b"".join(
        b"\0" + b"".join(bytes((200, 30, 30) if (x // 8 + y // 8) % 2 else (30, 30, 200)) for x in range(side))
        for y in range(side)
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def sound(seconds: float = 2.0, rate: int = 22_050) -> bytes:
    """A tone as a WAV file."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        count = int(seconds * rate)
        file.writeframes(b"".join(struct.pack("<h", int(9000 * math.sin(i / 9))) for i in range(count)))
    return out.getvalue()


def uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def turn(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": ASK}]}]


def image() -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": uri(png(), "image/png")}}


def file() -> dict[str, Any]:
    content = {"filename": "notes.txt", "file_data": uri(b"The harbour is closed.", "text/plain")}
    return {"type": "file", "file": content}


def heard() -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(sound()).decode(), "format": "wav"}}


def check_openai(url: str, reads: set[str]) -> None:
    """Chat and responses with an image, chats with a file and with sounds, a transcript and its stream."""
    import openai

    client = openai.OpenAI(base_url=url, api_key="none")
    if {"audio", "text"} <= reads:
        messages: Any = turn(heard(), heard())
        said = client.chat.completions.create(model="default", messages=messages, max_tokens=8)
        assert said.usage and said.usage.prompt_tokens > 20 and said.usage.completion_tokens
    elif "audio" in reads:
        how: Any = {"model": "default", "language": "en"}
        said = client.audio.transcriptions.create(file=("a.wav", sound()), **how)
        assert isinstance(said.text, str)
        timed = client.audio.transcriptions.create(file=("a.wav", sound()), response_format="verbose_json", **how)
        assert abs(timed.duration - 2.0) < 0.1 and timed.language
        events = list(client.audio.transcriptions.create(file=("a.wav", sound()), stream=True, **how))
        assert events[-1].type == "transcript.text.done"
        try:
            client.audio.transcriptions.create(file=("a.wav", b"no sound"), **how)
        except openai.BadRequestError as error:
            assert "cannot be read as sound" in error.message
        return
    plain = client.chat.completions.create(model="default", messages=turn(file()), max_tokens=4)  # type: ignore[arg-type]
    assert plain.usage and plain.usage.prompt_tokens > 8
    if "image" in reads:
        seen = client.chat.completions.create(model="default", messages=turn(image(), image()), max_tokens=4)  # type: ignore[arg-type]
        assert seen.usage and seen.usage.prompt_tokens > 8
        picture = {"type": "input_image", "image_url": uri(png(), "image/png"), "detail": "auto"}
        asked: Any = [{"role": "user", "content": [{"type": "input_text", "text": ASK}, picture]}]
        assert client.responses.create(model="default", input=asked, max_output_tokens=16).usage


def check_litellm(url: str, reads: set[str]) -> None:
    """A chat with an image or a file; a transcript."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks the network for prices
    import litellm

    how: Any = {"api_base": url, "api_key": "none", "model": "openai/default"}
    if "audio" in reads and "text" not in reads:
        assert isinstance(litellm.transcription(file=("a.wav", sound()), language="en", **how).text, str)
        return
    part = image() if "image" in reads else heard() if "audio" in reads else file()
    found = litellm.completion(messages=turn(part), max_tokens=4, **how)
    assert found.usage.prompt_tokens > 8


def check_langchain(url: str, reads: set[str]) -> None:
    """A chat with an image, in OpenAI's form and in its own."""
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=url, api_key="none", model="default", max_tokens=4)  # type: ignore[arg-type]
    own = {"type": "image", "base64": base64.b64encode(png()).decode(), "mime_type": "image/png"}
    for part in (image(), own):
        assert model.invoke(turn(part)).usage_metadata["input_tokens"] > 8  # type: ignore[index,call-overload]


CHECKS: dict[str, Callable[[str, set[str]], None]] = {
    "openai": check_openai, "litellm": check_litellm, "langchain_openai": check_langchain,
}  # fmt: skip


def main() -> int:
    """Returns the exit status."""
    import json
    import urllib.request

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    args = parser.parse_args()
    with urllib.request.urlopen(args.url + "/models") as reply:
        (card,) = json.load(reply)["data"]
    reads = set(card["input_modalities"])
    takes = [
        name for name in CHECKS if name != "langchain_openai" or "image" in reads
    ]  # it sends no sound to be written down
    there = [name for name in takes if importlib.util.find_spec(name) is not None]
    failed = not there
    for name in there:
        try:
            CHECKS[name](args.url, reads)
            print(f"{name}: well ({', '.join(sorted(reads))})", flush=True)
        except Exception as error:
            failed = True
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
