"""The events of a streamed response and, as their sum, the response itself."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from serving.engine.api.types import FinishReason
from serving.frontends.http.errors import failure_of
from serving.frontends.http.sse import dumps
from serving.frontends.openai import outcome as oc
from serving.frontends.openai.responses.items import sealed
from serving.frontends.openai.responses.protocol import CUSTOM_INPUT, ResponsesRequest
from serving.service import PreparedRequest, TextOutput, Usage

_TOOL_DEFAULTS: dict[str, dict[str, Any]] = {"function": {"parameters": None, "strict": False}}


class ResponseWriter:
    """Turns deltas into typed events, and keeps `response`, which is complete after `finish`.

    Output items follow each other: reasoning, a message, function calls. One is open at a time.

    Args:
        stored: the response is kept.
    """

    def __init__(self, body: ResponsesRequest, prepared: PreparedRequest, stored: bool = False) -> None:
        self._id = prepared.request_id
        if stored:  # the client may have chosen the request's id, and may choose it again
            self._id = f"{prepared.request_id[:64]}-{uuid.uuid4().hex[:12]}"
        self._custom = body.custom_tools
        self._seals = body.wants_encrypted
        self._input: list[str] = []  # of a custom tool's call that is open: pieces of its arguments
        self._wants_logprobs = body.wants_logprobs
        self._number = 0
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._call_index: int | None = None
        self._usage = Usage()
        self._finish: FinishReason | None = None
        choice = body.tool_choice
        self.response: dict[str, Any] = {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": bool(body.background),
            "conversation": None if body.conversation_id is None else {"id": body.conversation_id},
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": prepared.model,
            "output": self._items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "service_tier": "default",
            "store": stored,
            "temperature": prepared.params.temperature,
            "text": {"format": body.text.format.model_dump(by_alias=True, exclude_none=True)}
            if body.text and body.text.format
            else {"format": {"type": "text"}},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump() if choice is not None else "auto",
            "tools": [{**_TOOL_DEFAULTS.get(t.type, {}), **t.model_dump(exclude_none=True)} for t in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": prepared.params.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None,
        }

    def queued(self) -> bytes:
        """The first events of a response that runs in the background."""
        self.response["status"] = "queued"
        return self._event("response.created", response=self.response) + self._event(
            "response.queued", response=self.response
        )

    def start(self) -> bytes:
        """The first events; behind `queued` the next."""
        self.response["status"] = "in_progress"
        created = b"" if self._number else self._event("response.created", response=self.response)
        return created + self._event("response.in_progress", response=self.response)

    def push(self, output: TextOutput, deltas: list[dict[str, Any]]) -> bytes:
        """Events for new deltas (`content`, `reasoning`, `tool_calls`)."""
        self._usage.add(output)
        self._finish = output.finish_reason or self._finish
        logprobs: list[dict[str, Any]] = []
        if self._wants_logprobs and output.logprobs:
            logprobs = oc.chat_logprobs(output.logprobs, as_ids=False)["content"]
        out = []
        for delta in deltas:
            if "reasoning" in delta:
                out.append(self._text("reasoning", delta["reasoning"], []))
            if "content" in delta:
                out.append(self._text("message", delta["content"], logprobs))
                logprobs = []
            for call in delta.get("tool_calls", ()):
                out.append(self._call(call))
        return b"".join(out)

    def finish(self) -> bytes:
        """The last events: closes what is open and tells the outcome."""
        cut = self._finish is not FinishReason.STOP
        out = self._close("incomplete" if cut else "completed")
        if not self._items:
            out += self._add_text_item("message") + self._close("incomplete" if cut else "completed")
        usage = oc.usage_dict([self._usage])
        self.response["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": self._usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._usage.reasoning_tokens},
            "total_tokens": usage["total_tokens"],
        }
        if self._finish is FinishReason.ABORT:
            self.response["status"] = "cancelled"
            return out + self._event("response.incomplete", response=self.response)
        if cut:
            self.response["status"] = "incomplete"
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
            return out + self._event("response.incomplete", response=self.response)
        self.response["status"] = "completed"
        self.response["completed_at"] = int(time.time())
        return out + self._event("response.completed", response=self.response)

    def failed(self, error: Exception) -> bytes:
        """The end of a stream that failed after it had begun."""
        self.response["status"] = "failed"
        self.response["error"] = {"code": "server_error", "message": failure_of(error).message}
        return self._event("response.failed", response=self.response)

    def cancelled(self) -> bytes:
        """The end of a response that somebody ended."""
        out = self._close("incomplete")
        self.response["status"] = "cancelled"
        return out + self._event("response.incomplete", response=self.response)

    # -- items -------------------------------------------------------------------------------------------------------

    def _text(self, kind: str, text: str, logprobs: list[dict[str, Any]]) -> bytes:
        out = b""
        if self._open is None or self._open["type"] != kind:
            out = self._close("completed") + self._add_text_item(kind)
        assert self._open is not None
        part = self._open["content"][0]
        part["text"] += text
        more: dict[str, Any] = {}
        if kind == "message":
            part["logprobs"].extend(logprobs)
            more["logprobs"] = logprobs
        name = "response.output_text.delta" if kind == "message" else "response.reasoning_text.delta"
        return out + self._event(name, **self._place(), content_index=0, delta=text, **more)

    def _add_text_item(self, kind: str) -> bytes:
        number = len(self._items)
        if kind == "message":
            item: dict[str, Any] = {"id": f"msg_{self._id}_{number}", "type": "message", "role": "assistant"}
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"id": f"rs_{self._id}_{number}", "type": "reasoning", "summary": []}
            part = {"type": "reasoning_text", "text": ""}
        item.update(status="in_progress", content=[])
        out = self._add(item)
        item["content"].append(part)
        return out + self._event("response.content_part.added", **self._place(), content_index=0, part=part)

    def _call(self, call: dict[str, Any]) -> bytes:
        out, function = b"", call.get("function", {})
        if self._open is None or self._open["type"] not in _CALLS or self._call_index != call["index"]:
            out = self._close("completed")
            self._call_index = call["index"]
            out += self._add(self._new_call(call["id"], function["name"]))
        assert self._open is not None
        text = function.get("arguments") or ""
        if text and self._open["type"] == "custom_tool_call":
            self._input.append(text)  # its text is inside of JSON: told when that is whole
        elif text:
            self._open["arguments"] += text
            out += self._event("response.function_call_arguments.delta", **self._place(), delta=text)
        return out

    def _new_call(self, call_id: str, name: str) -> dict[str, Any]:
        custom = name in self._custom
        kind, prefix, field = ("custom_tool_call", "ctc", "input") if custom else ("function_call", "fc", "arguments")
        item = {
            "id": f"{prefix}_{self._id}_{len(self._items)}",
            "type": kind,
            "call_id": call_id,
            "name": name,
            field: "",
        }
        self._input = []
        return {**item, "status": "in_progress"}

    def _add(self, item: dict[str, Any]) -> bytes:
        self._items.append(item)
        self._open = item
        return self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)

    def _close(self, status: str) -> bytes:
        item = self._open
        if item is None:
            return b""
        place, out = self._place(), []
        if item["type"] == "custom_tool_call":
            item["input"] = _text_of("".join(self._input))
            out.append(self._event("response.custom_tool_call_input.delta", **place, delta=item["input"]))
            out.append(self._event("response.custom_tool_call_input.done", **place, input=item["input"]))
        elif item["type"] == "function_call":
            out.append(
                self._event(
                    "response.function_call_arguments.done", **place, name=item["name"], arguments=item["arguments"]
                )
            )
        else:
            part = item["content"][0]
            more = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            name = "response.output_text.done" if item["type"] == "message" else "response.reasoning_text.done"
            out.append(self._event(name, **place, content_index=0, text=part["text"], **more))
            out.append(self._event("response.content_part.done", **place, content_index=0, part=part))
        item["status"] = status
        if item["type"] == "reasoning" and self._seals:
            item["encrypted_content"] = sealed(item["content"][0]["text"])
        out.append(self._event("response.output_item.done", output_index=place["output_index"], item=item))
        self._open = None
        return b"".join(out)

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self._items) - 1}

    def _event(self, kind: str, /, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return f"event: {kind}\ndata: {dumps(data)}\n\n".encode()


_CALLS = ("function_call", "custom_tool_call")


def _text_of(arguments: str) -> str:
    """The text that a custom tool is called with; what is no such call is the text itself."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    text = value.get(CUSTOM_INPUT) if isinstance(value, dict) else None
    return text if isinstance(text, str) else arguments
