"""Replies as JSON lines: one object a piece of text, the last with counts and durations; and the same as one object."""

from __future__ import annotations

import datetime
import json
from typing import Any

from serving.engine.api.types import FinishReason, RequestTimes
from serving.frontends.http.sse import dumps, quote
from serving.service import PreparedRequest, TextOutput, TokenLogprob, Usage
from serving.text.tools import ContentDelta, ReasoningDelta, ToolCallArguments, ToolCallStart

LOWEST_LOGPROB = -9999.0
"""JSON has no infinity."""


def now() -> str:
    """The time as their clients read it."""
    return datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")


class ReplyWriter:
    """Turns outputs into lines, and keeps what the whole reply is made of. A call is told when it is whole.

    Args:
        model: the name that the client asked for, which replies carry.
        chat: text goes into `message` (else into `response`).
    """

    def __init__(self, model: str, prepared: PreparedRequest, chat: bool) -> None:
        self._chat = chat
        self._prepared = prepared
        self._model = model
        self._text: list[str] = []
        self._thinking: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._arguments: list[str] = []  # of the call that is being written
        self._call: dict[str, Any] | None = None
        self._logprobs: list[dict[str, Any]] = []
        self._usage = Usage()
        self._finish: FinishReason | None = None
        self._times = RequestTimes()

    def push(self, output: TextOutput) -> bytes:
        """The lines for what is new; none while text is held back."""
        self._usage.add(output)
        if output.finish_reason is not None:
            self._finish, self._times = output.finish_reason, output.times
        new = {"logprobs": [_logprob(one) for one in output.logprobs]} if output.logprobs else {}
        self._logprobs += new.get("logprobs", ())
        lines = []
        if output.events is None:
            if output.text or new:
                self._text.append(output.text)
                lines.append(self._line(text=output.text, more=new))
            return b"".join(lines)
        for event in output.events:
            if isinstance(event, ContentDelta):
                self._text.append(event.text)
                lines.append(self._line(text=event.text, more=new))
                new = {}
            elif isinstance(event, ReasoningDelta):
                self._thinking.append(event.text)
                lines.append(self._line(thinking=event.text, more=new))
                new = {}
            elif isinstance(event, ToolCallStart):
                function = {"index": event.index, "name": event.name, "arguments": {}}
                self._call, self._arguments = {"id": event.call_id, "function": function}, []
            elif isinstance(event, ToolCallArguments):
                self._arguments.append(event.text)
            elif self._call is not None:
                lines.append(self._end_call(new))
                new = {}
        return b"".join(lines)

    def finish(self) -> bytes:
        """The last line, with the counts."""
        cut = self._end_call({}) if self._call is not None else b""
        part = {"message": {"role": "assistant", "content": ""}} if self._chat else {"response": ""}
        return cut + (dumps({**self._head(), **part, **self._end()}) + "\n").encode()

    def whole(self) -> dict[str, Any]:
        """The reply as one object; after `finish`."""
        text, thinking = "".join(self._text), "".join(self._thinking)
        part: dict[str, Any] = {"response": text} | ({"thinking": thinking} if thinking else {})
        if self._chat:
            message = {"role": "assistant", "content": text} | ({"thinking": thinking} if thinking else {})
            part = {"message": message | ({"tool_calls": self._calls} if self._calls else {})}
        logprobs = {"logprobs": self._logprobs} if self._logprobs else {}
        return {**self._head(), **part, **logprobs, **self._end()}

    def _line(self, text: str = "", thinking: str = "", more: dict[str, Any] | None = None) -> bytes:
        beside = "".join(f",{quote(key)}:{dumps(value)}" for key, value in (more or {}).items())
        head = f'{{"model":{quote(self._model)},"created_at":"{now()}",'
        thought = f',"thinking":{quote(thinking)}' if thinking else ""
        if self._chat:
            return f'{head}"message":{{"role":"assistant","content":{quote(text)}{thought}}},"done":false{beside}}}\n'.encode()
        return f'{head}"response":{quote(text)}{thought},"done":false{beside}}}\n'.encode()

    def _end_call(self, more: dict[str, Any]) -> bytes:
        call, self._call = self._call, None
        assert call is not None
        try:
            arguments = json.loads("".join(self._arguments) or "{}")
        except (ValueError, RecursionError):
            arguments = {}  # cut off: there is no half an object
        call["function"]["arguments"] = arguments if isinstance(arguments, dict) else {}
        self._calls.append(call)
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        return (dumps({**self._head(), "message": message, "done": False, **more}) + "\n").encode()

    def _head(self) -> dict[str, Any]:
        return {"model": self._model, "created_at": now()}

    def _end(self) -> dict[str, Any]:
        times = self._times
        return {
            "done": True,
            "done_reason": "length" if self._finish is FinishReason.LENGTH else "stop",
            "total_duration": _nanoseconds(times.arrival, times.finished),
            "load_duration": _nanoseconds(times.arrival, times.scheduled),
            "prompt_eval_count": self._usage.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(times.scheduled, times.first_token),
            "eval_count": self._usage.completion_tokens,
            "eval_duration": _nanoseconds(times.first_token, times.finished),
        }


def _nanoseconds(start: float, end: float) -> int:
    """From one milestone to another, in seconds; 0 where one was not reached."""
    return max(0, round((end - start) * 1e9)) if start and end else 0


def _logprob(entry: TokenLogprob) -> dict[str, Any]:
    def one(some: TokenLogprob) -> dict[str, Any]:
        return {"token": some.token, "logprob": max(some.logprob, LOWEST_LOGPROB), "bytes": list(some.bytes)}

    return {**one(entry), "top_logprobs": [one(likely) for likely in entry.top]}
