"""The events of a streamed message and, as their sum, the message itself."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from serving.engine.api.types import FinishReason
from serving.frontends.http.sse import dumps, quote
from serving.service import PreparedRequest, TextOutput, Usage
from serving.text.tools import ContentDelta, Event, ReasoningDelta, ToolCallArguments, ToolCallStart

PING = b'event: ping\ndata: {"type": "ping"}\n\n'


class MessageWriter:
    """Turns outputs into events, and keeps `message`, which is complete after `finish`.

    Blocks follow each other: thinking, text, calls. One is open at a time.

    Args:
        asked_tokens: the `max_tokens` that the client named; the context may have had room for fewer.
        shows_thinking: False leaves blocks of thinking empty but for their signature.
    """

    def __init__(self, prepared: PreparedRequest, asked_tokens: int, shows_thinking: bool = True) -> None:
        self._ran_out_of_context = (prepared.params.max_tokens or 0) < asked_tokens
        self._shows_thinking = shows_thinking
        self._blocks: list[dict[str, Any]] = []
        self._pieces: list[str] = []  # of the open block
        self._open: str | None = None  # its type
        self._head = ""  # of its deltas
        self._usage = Usage()
        self._finish: FinishReason | None = None
        self._stop: int | str | None = None
        self._called = False
        self.message: dict[str, Any] = {
            "id": f"msg_{prepared.request_id}",
            "type": "message",
            "role": "assistant",
            "model": prepared.model,
            "content": self._blocks,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._counts(),
        }

    def start(self, output: TextOutput) -> bytes:
        """The first events, which tell how many tokens were read.

        Args:
            output: the first one; it is to be pushed all the same.
        """
        first = Usage()
        first.add(output)
        counts = _counts(first)
        return _event("message_start", message={**self.message, "usage": counts}) + PING

    def push(self, output: TextOutput) -> bytes:
        """Events for what is new."""
        self._usage.add(output)
        if output.finish_reason is not None:
            self._finish, self._stop = output.finish_reason, output.stop_reason
        self._called |= output.called
        if output.events is None:
            return self._delta("text", output.text) if output.text else b""
        return b"".join(self._event_of(event) for event in output.events)

    def finish(self) -> bytes:
        """The last events: closes what is open and tells the outcome."""
        out = self._close()
        reason, sequence = self._outcome()
        self.message |= {"stop_reason": reason, "stop_sequence": sequence, "usage": self._counts()}
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        return out + _event("message_delta", delta=delta, usage=self._counts()) + _event("message_stop")

    def _outcome(self) -> tuple[str, str | None]:
        if self._finish is FinishReason.LENGTH:
            return ("model_context_window_exceeded" if self._ran_out_of_context else "max_tokens"), None
        if self._finish is FinishReason.ABORT:  # somebody asked for its end: what is there may be gone on with
            return "pause_turn", None
        if isinstance(self._stop, str):
            return "stop_sequence", self._stop
        return ("tool_use" if self._called else "end_turn"), None

    def _counts(self) -> dict[str, Any]:
        return _counts(self._usage)

    # -- blocks ------------------------------------------------------------------------------------------------------

    def _event_of(self, event: Event) -> bytes:
        if isinstance(event, ContentDelta):
            return self._delta("text", event.text)
        if isinstance(event, ReasoningDelta):
            return self._delta("thinking", event.text)
        if isinstance(event, ToolCallStart):
            block = {"type": "tool_use", "id": event.call_id, "name": event.name, "input": {}}
            return self._close() + self._begin(block, "input_json_delta", "partial_json")
        if isinstance(event, ToolCallArguments):
            return self._write(event.text)
        return self._close()  # a call's end

    def _delta(self, kind: str, text: str) -> bytes:
        """More of a block of text or thinking, which begins here if none is open."""
        out = b""
        if self._open != kind:
            more = {"signature": ""} if kind == "thinking" else {}
            out = self._close() + self._begin({"type": kind, kind: "", **more}, f"{kind}_delta", kind)
        return out + self._write(text)

    def _begin(self, block: dict[str, Any], delta: str, field: str) -> bytes:
        index = len(self._blocks)
        self._blocks.append(block)
        self._open = block["type"]
        self._pieces = []
        self._head = (
            f'event: content_block_delta\ndata: {{"type":"content_block_delta","index":{index},'
            f'"delta":{{"type":"{delta}","{field}":'
        )
        return _event("content_block_start", index=index, content_block=block)

    def _write(self, text: str) -> bytes:
        self._pieces.append(text)
        if not text or (self._open == "thinking" and not self._shows_thinking):
            return b""
        return f"{self._head}{quote(text)}}}}}\n\n".encode()

    def _close(self) -> bytes:
        kind, text = self._open, "".join(self._pieces)
        if kind is None:
            return b""
        self._open = None
        index, block, out = len(self._blocks) - 1, self._blocks[-1], b""
        if kind == "tool_use":
            block["input"] = _arguments(text)
        else:
            block[kind] = text
        if kind == "thinking":
            block["signature"] = _signature(text)
            block["thinking"] = text if self._shows_thinking else ""
            delta = {"type": "signature_delta", "signature": block["signature"]}
            out = _event("content_block_delta", index=index, delta=delta)
        return out + _event("content_block_stop", index=index)


def _counts(usage: Usage) -> dict[str, Any]:
    """Anthropic's `usage`: tokens found in the cache do not count as input."""
    counts: dict[str, Any] = {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
    if usage.reasoning_tokens:
        counts["output_tokens_details"] = {"thinking_tokens": usage.reasoning_tokens}
    return counts


def _arguments(text: str) -> dict[str, Any]:
    """A call's arguments. What was cut off, or is no object, goes under the name that Anthropic's documentation has for it."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"INVALID_JSON": text}


def _signature(thinking: str) -> str:
    """What clients send back with thinking. It is a digest, and is not looked at: an open model's thinking is no secret."""
    return base64.b64encode(hashlib.sha256(thinking.encode("utf-8", "replace")).digest()).decode()


def _event(kind: str, /, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {dumps({'type': kind, **fields})}\n\n".encode()
