"""Parsers of bytes for a fuzzer that watches which branches a case takes (scripts/fuzz_guided.py).

A target is `make(folder) -> one(data)`: raises nothing, whatever the bytes are, but what its reader documents, which it catches.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

One = Callable[[bytes], None]


def _read_all(path: pathlib.Path, open_file: Callable[[pathlib.Path], Any], data: bytes) -> None:
    path.write_bytes(data)
    try:
        file = open_file(path)
        for name in list(file.tensors)[:4]:
            file.read(name)
    except ValueError:
        pass


def gguf(folder: pathlib.Path) -> One:
    """A GGUF file: header, metadata, tensors."""
    from models.loading.gguf.file import GGUFFile

    return lambda data: _read_all(folder / "x.gguf", GGUFFile, data)


def safetensors(folder: pathlib.Path) -> One:
    """A safetensors file. The length in front is put right, so that the header behind it is what is searched."""
    from models.loading.files.safetensors import SafetensorsFile

    def one(data: bytes) -> None:
        header, _, content = data.partition(b"\0")
        _read_all(folder / "x.safetensors", SafetensorsFile, len(header).to_bytes(8, "little") + header + content)

    return one


def reply(folder: pathlib.Path) -> One:
    """A model's text through the reader of tool calls and reasoning that the first byte chooses. However the text is cut, the same
    content and the same calls come out."""
    from serving.text.tools.events import ContentDelta
    from serving.text.tools.families import REASONING_FAMILIES, TOOL_FAMILIES
    from serving.text.tools.parser import ReplyParser

    def read(parts: list[str], tools: int) -> tuple[str, int]:
        parser = ReplyParser(TOOL_FAMILIES[tools], REASONING_FAMILIES[0], schemas={"f": {}})
        events = [event for part in parts for event in parser.push(part)] + parser.finish()
        return "".join(event.text for event in events if isinstance(event, ContentDelta)), parser.num_calls

    def one(data: bytes) -> None:
        text = data[1:].decode("utf-8", "replace")
        tools = data[0] % len(TOOL_FAMILIES) if data else 0
        whole, single = read([text], tools), read(list(text), tools)
        assert whole == single, f"{TOOL_FAMILIES[tools].name}: {whole} of the whole text, {single} of single characters"

    return one


TARGETS: dict[str, Callable[[pathlib.Path], One]] = {
    "gguf": gguf, "safetensors": safetensors, "reply": reply,
}  # fmt: skip

SEEDS: dict[str, tuple[bytes, ...]] = {
    "safetensors": (
        b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,4],"data_offsets":[0,32]}}\0' + bytes(32),
    ),
    "reply": (
        b'\0<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', b'\x01[f(a=1, b="x")]', b"\x02<think>x</think>y",
        b'\x05<|python_tag|>{"name": "f", "parameters": {}}', b"\x03call:f{a:<escape>x<escape>}",
    ),
}  # fmt: skip


def seeds(name: str, folder: pathlib.Path) -> tuple[bytes, ...]:
    """Valid input to start from."""
    if name == "gguf":
        from tests.fuzz.parsers import write_gguf

        return (write_gguf(folder / "seed.gguf"),)
    return SEEDS[name]
