"""Chat messages to one prompt text, by the model's own Jinja template.

The semantics are those of transformers' `apply_chat_template`, so that a model sees what it was trained on. Templates
come only from the model or from the operator, never from a request, and run in a process of their own under a deadline
and a size limit (`template_worker.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from serving.errors import invalid, kind_of
from serving.text.control_tokens import unmark
from serving.text.template_process import POOL, TemplateCrashError, TemplateTimeoutError

if TYPE_CHECKING:
    from serving.text.tokenizer import Tokenizer

RESERVED = (
    frozenset({"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"})
    | {"continue_final_message", "tokenizer"}
    | {"bos_token", "eos_token", "unk_token", "pad_token"}
    | {"range", "dict", "lipsum", "cycler", "joiner", "namespace", "loop", "self"}
)
# Roles of OpenAI's API, and what templates that do not know them call the same thing.
NEWER_ROLES = {"developer": "system", "function": "tool"}
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
# Ends an open last message while it goes through the template. The blank behind shows whether the template trims.
OPEN_END = "\ufdd2 "
PLACE = 2**31 - 1
"""Stands in token ids where something is that is no text."""


@dataclasses.dataclass(frozen=True)
class TemplateLimits:
    """What one rendering may cost.

    Attributes:
        deadline_s: seconds of wall clock. Real templates take under a millisecond for a short chat.
        max_chars: characters of the result.
    """

    deadline_s: float = 5.0
    max_chars: int = 1 << 24


class ChatTemplate:
    """A model's chat template. Safe to use from several threads; every call blocks, so keep it off an event loop.

    Args:
        source: Jinja source.
        tokenizer: gives the special tokens that templates name (`bos_token`, ...), and keeps users' text from
            becoming control tokens in `encode`.
        special_tokens: more of them, or others: variable name -> text.
        tool_source: another template for chats with tools ("tool_use" in some models).
    Raises:
        ValueError: the source is not valid Jinja, or does not compile within the limits.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer | None = None,
        *,
        special_tokens: Mapping[str, str | None] | None = None,
        tool_source: str | None = None,
        limits: TemplateLimits | None = None,
    ) -> None:
        self.source = source
        self.limits = limits or TemplateLimits()
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        found = {name: getattr(tokenizer, name) for name in names} if tokenizer is not None else {}
        self.special_tokens = {k: v for k, v in {**found, **(special_tokens or {})}.items() if v is not None}
        self._main = _Source(source, self.limits)
        self._tool = _Source(tool_source, self.limits) if tool_source is not None else self._main
        self._guard = tokenizer.chat_guard(source + (tool_source or "")) if tokenizer is not None else None

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, source: str | None = None) -> ChatTemplate | None:
        """The model's own template, or `source` (the operator's) instead of it. None where there is neither."""
        if source is not None:
            return cls(source, tokenizer)
        templates = tokenizer.chat_templates
        main = templates.get("default") or next(iter(templates.values()), None)
        return None if main is None else cls(main, tokenizer, tool_source=templates.get("tool_use"))

    @property
    def variables(self) -> frozenset[str]:
        """Names that the template reads and does not define: which `kwargs` have an effect."""
        return self._main.variables | self._tool.variables

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt as text.

        Args:
            messages: in OpenAI's shape: role, content (text, None, or a list of parts), tool_calls, ...
            tools: in OpenAI's shape; None and empty are the same.
            documents: title and text of what the model may quote, for templates that take them.
            add_generation_prompt: end with the opening of an assistant turn.
            continue_final_message: leave the last message open, so that the completion goes on with it.
            kwargs: more variables for the template (`enable_thinking`, ...).
        Raises:
            RequestError: INVALID_ARGUMENT: the template refuses these messages (its own words), or takes too long.
        """
        return self._render(messages, tools, documents, add_generation_prompt, continue_final_message, kwargs, False)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        rewrite: Callable[[str], str | list[str]] | None = None,
        /,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> tuple[str, list[int]]:
        """The prompt as text and as token ids. Control tokens are the template's own: what a user typed is text.

        For messages without control tokens the ids are those of transformers.

        Args:
            rewrite: changes the text before it becomes ids; control tokens that a user typed are broken there. Of several texts
                each becomes ids on its own, with `PLACE` between them.
        Raises:
            RequestError: as `render`.
        """
        guard = self._guard or tokenizer.chat_guard(self.source)
        if self._guard is None:
            self._guard = guard
        text = self._render(messages, tools, documents, add_generation_prompt, continue_final_message, kwargs, True)
        found = text if rewrite is None else rewrite(text)
        if isinstance(found, str):
            return unmark(found), guard.encode(found)
        first, *others = map(guard.encode, found)
        return unmark("".join(found)), [*first, *(token for ids in others for token in (PLACE, *ids))]

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        kwargs: Mapping[str, Any],
        mark: bool,
    ) -> str:
        if not messages:
            raise invalid("messages is empty: give at least one message.", "messages")
        if continue_final_message and add_generation_prompt:
            raise invalid(
                "continue_final_message and add_generation_prompt exclude each other: set the latter to false.",
                "continue_final_message",
            )
        check_variables(kwargs)
        source = self._tool if tools else self._main
        chat = [source.shape(message, f"messages[{i}]") for i, message in enumerate(messages)]
        variables = {"tools": list(tools) if tools else None, "documents": documents, **kwargs}
        if mark and self._guard is not None:
            chat = self._guard.mark_messages(chat)
            variables = self._guard.mark(variables)
        last = _open(chat) if continue_final_message else ""
        text = source.render(
            {
                **self.special_tokens,
                **variables,
                "messages": chat,
                "add_generation_prompt": add_generation_prompt,
            }
        )
        return _cut_open_end(text, last) if continue_final_message else text


def check_variables(names: Iterable[str]) -> None:
    """Refuses names that a request may not give to a template: they have a meaning there already.

    Raises:
        RequestError: INVALID_ARGUMENT naming the first.
    """
    for name in names:
        if name in RESERVED or name.startswith("_"):
            raise invalid(f"chat_template_kwargs cannot set {name!r}.", "chat_template_kwargs")


class _Source:
    """One template source: how it wants its messages, and its rendering."""

    def __init__(self, source: str, limits: TemplateLimits) -> None:
        self._source, self._limits = source, limits
        self._id = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        try:
            reply = POOL.load(self._id, source, limits.deadline_s)
        except TemplateTimeoutError:
            raise ValueError(f"The chat template did not compile within {limits.deadline_s:g} seconds.") from None
        except TemplateCrashError as error:
            raise ValueError(f"The chat template could not be compiled: {error}.") from None
        if "error" in reply:
            raise ValueError(f"The chat template is not valid: {reply['error']}.")
        facts = reply["facts"]
        self.variables = frozenset(facts["variables"])
        self._takes_parts = bool(facts["loops_over_content"])
        self._takes_text = bool(facts["tests_string"]) or not self._takes_parts
        self._takes_none = bool(facts["tests_none"])
        self._wants_call_text = bool(facts["joins_arguments"])

    def shape(self, message: Mapping[str, Any], where: str) -> dict[str, Any]:
        """`message` as this template expects it.

        Lists of parts become text for templates that only take text (texts joined by newlines), text becomes a list
        for those that only take lists; arguments of tool calls, JSON text in OpenAI's API, become mappings; reasoning
        goes by all names that templates know it by.
        """
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise invalid(f"{where} must be an object with a role.", where)
        # Clients send null and [] for what is not there; templates ask whether it is there.
        shaped = {k: v for k, v in message.items() if k == "content" or (v is not None and v != [])}
        role = message.get("role")
        if role in NEWER_ROLES and role not in self._source:
            shaped["role"] = NEWER_ROLES[role]
        shaped["content"] = self._content(message.get("content"), f"{where}.content")
        if "content" not in message and message.get("tool_calls") and self._takes_none:
            del shaped["content"]
        reasoning = next((message[name] for name in REASONING_FIELDS if message.get(name) is not None), None)
        if reasoning is not None:
            shaped["reasoning_content"] = reasoning
            shaped.setdefault("thinking", reasoning)
        if isinstance(shaped.get("tool_calls"), Sequence):
            shape = _call_as_text if self._wants_call_text else _call
            shaped["tool_calls"] = [shape(call) for call in shaped["tool_calls"]]
        return shaped

    def render(self, variables: dict[str, Any]) -> str:
        message = {"render": self._id, "variables": variables, "limit": self._limits.max_chars}
        try:
            reply = POOL.render(self._id, self._source, message, self._limits.deadline_s)
        except TemplateTimeoutError:
            raise invalid(
                f"The model's chat template took more than {self._limits.deadline_s:g} seconds for these messages. "
                "Send fewer or shorter messages.",
                "messages",
            ) from None
        except TemplateCrashError:
            raise invalid(
                "The model's chat template ran out of memory for these messages. Send fewer or shorter messages.",
                "messages",
            ) from None
        except (TypeError, ValueError) as error:
            raise invalid(f"The messages hold something that is not JSON: {error}.", "messages") from None
        if "text" in reply:
            return reply["text"]
        raise invalid(f"The model's chat template refused these messages: {reply['error'].rstrip('.')}.", "messages")

    def _content(self, content: Any, where: str) -> Any:
        if content is None:
            return None if self._takes_none else ""
        if isinstance(content, str):
            return content if self._takes_text else [{"type": "text", "text": content}]
        if not isinstance(content, Sequence):
            raise invalid(f"{where} must be text or a list of parts, got {kind_of(content)}.", where)
        parts = [_part(part, where) for part in content]
        if self._takes_parts:
            return parts
        others = [part["type"] for part in parts if part["type"] != "text"]
        if others:
            raise invalid(f"{where} has a part of type {others[0]!r}; this model's chats take text only.", where)
        return "\n".join(part["text"] for part in parts)


def _part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise invalid(f"a part of {where} must be an object with a type, got {kind_of(part)}.", where)
    kind = part.get("type", "text" if "text" in part else None)
    text = part.get("refusal") if kind == "refusal" else part.get("text")
    if kind in ("text", "input_text", "output_text", "refusal"):
        if not isinstance(text, str):
            raise invalid(f"a part of {where} of type {kind!r} has no text.", where)
        return {"type": "text", "text": text}
    if not isinstance(kind, str):
        raise invalid(f"a part of {where} has no type.", where)
    return dict(part)


def _call(call: Any) -> Any:
    """A tool call with its arguments as a mapping. What is not a JSON object counts as an empty one: templates go through it."""
    if not isinstance(call, Mapping):
        return call
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        arguments = {}
    if not isinstance(arguments, dict):
        arguments = {}
    return {**call, "function": {**function, "arguments": arguments}}


def _call_as_text(call: Any) -> Any:
    """A tool call with its arguments as JSON text, for templates that write them without a filter."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), Mapping):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _open(chat: list[dict[str, Any]]) -> str:
    """Puts OPEN_END behind the last message's text; returns that text."""
    content = chat[-1].get("content")
    if isinstance(content, str):
        chat[-1] = {**chat[-1], "content": content + OPEN_END}
        return content
    parts = list(content) if isinstance(content, list) else []
    for i in range(len(parts) - 1, -1, -1):
        if isinstance(parts[i].get("text"), str):
            text = parts[i]["text"]
            parts[i] = {**parts[i], "text": text + OPEN_END}
            chat[-1] = {**chat[-1], "content": parts}
            return text
    raise invalid("continue_final_message is set, but the last message has no text to go on with.", "messages")


def _cut_open_end(rendered: str, last: str) -> str:
    """`rendered` up to the end of the last message's text."""
    end = OPEN_END.strip()
    at = rendered.rfind(end)
    if at < 0 or last.strip() not in rendered:
        raise invalid(
            "continue_final_message is set, but the model's chat template leaves out or changes the last message.",
            "messages",
        )
    keeps_blanks = rendered[at : at + len(OPEN_END)] == OPEN_END
    return rendered[:at] if keeps_blanks else rendered[:at].rstrip()
