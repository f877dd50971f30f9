"""What a client asks for, before anything was looked at: the same for every entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from serving.engine.api.types import TransferParams
from serving.errors import invalid, kind_of
from serving.media.parts import PLACES, Source
from serving.service.requests.json_bounds import check_nesting
from serving.service.requests.limits import Limits, check_text

Scalar = str | int | float | bool | None
TEMPLATE_ARGUMENTS = frozenset(
    ("self", "tokenizer", "messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
)
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


@dataclasses.dataclass(frozen=True)
class GenerateInput:
    """One prompt, in exactly one of three forms, and what concerns the request rather than the sampling.

    Attributes:
        text: the prompt as text. Control tokens written in it are control tokens: its author writes the whole prompt.
        token_ids: the prompt as token ids, taken as they are.
        messages: a chat in OpenAI's shape, rendered with the model's chat template.
        mm_processor_kwargs: how images are to be cut, see `serving.media.processors.base.Processor.asked`.
        images: how many parts of the messages stand for images that were taken out; see `serving.service.images`.
        tools: tools in OpenAI's shape, handed to the template; only with `messages`.
        documents: what the model may quote from, for chat templates that take it; only with `messages`.
        chat_template_kwargs: extra variables for the template; scalars only.
        add_generation_prompt: end the rendered chat with the opening of an assistant turn.
        continue_final_message: leave the last message open, so that the completion goes on with it. Excludes
            `add_generation_prompt`.
        add_special_tokens: put the tokenizer's own (BOS) around the prompt. None means yes for `text` and no for
            `messages`, whose template writes them.
        truncate_prompt_tokens: keep so many prompt tokens at most; -1 keeps what leaves room for the completion.
        truncation_side: which end is cut off then, "left" or "right". None: the left one; of what an encoder reads, the right.
        clip_max_tokens: a `max_tokens` beyond what the context leaves is what it leaves, not refused.
        model: the served model to use; None, "" and "default" mean the base model.
        request_id: the client's name for the request, for logs and `abort`; None makes one. Need not be unique:
            aborting a name ends every live request that has it.
        priority: lower runs first.
        timeout_s: seconds from now by which it must be finished.
        ttft_timeout_s: seconds from now by which the first token must be out.
        cache_salt: requests share cached prompt pages only with requests of the same salt.
        tenant: fair-share key.
        transfer: which part of it another engine does.
        media: images and videos in the places of `token_ids` that stand for them; with `mm_processor_kwargs`.
        whole: nobody looks at the completion before it has ended; see `EngineRequest.whole`. Its outputs are few then, and long.
    """

    text: str | None = None
    token_ids: Sequence[int] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    clip_max_tokens: bool = False
    model: str | None = None
    request_id: str | None = None
    priority: int = 0
    timeout_s: float | None = None
    ttft_timeout_s: float | None = None
    cache_salt: str | None = None
    tenant: str | None = None
    transfer: TransferParams | None = None
    images: int = 0
    mm_processor_kwargs: Mapping[str, Any] | None = None
    media: Sequence[Source] = ()
    whole: bool = False

    @property
    def place(self) -> str:
        """The field that holds the prompt, as errors name it."""
        return "messages" if self.messages is not None else "prompt"

    def check(self, limits: Limits) -> None:
        """Checks everything that needs no model.

        Raises:
            RequestError: INVALID_ARGUMENT naming the field.
        """
        self._check_prompt(limits)
        for name in ("model", "request_id", "cache_salt", "tenant"):
            limits.check_name(name, getattr(self, name))
        if (
            isinstance(self.priority, bool)
            or not isinstance(self.priority, int)
            or not -(2**31) <= self.priority < 2**31
        ):
            raise invalid(f"priority must be a whole number of 32 bits, got {self.priority!r}.", "priority")
        if self.transfer is not None:
            limits.check_name("kv_transfer_params", self.transfer.host)
            limits.check_name("kv_transfer_params", self.transfer.ticket)
        limits.check_timeout("timeout", self.timeout_s)
        limits.check_timeout("ttft_timeout", self.ttft_timeout_s)
        keep = self.truncate_prompt_tokens
        if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or (keep < 1 and keep != -1)):
            raise invalid(
                f"truncate_prompt_tokens must be at least 1, or -1 for what fits, got {keep!r}.",
                "truncate_prompt_tokens",
            )
        if keep is not None and limits.context is not None and keep > limits.context:
            raise invalid(
                f"truncate_prompt_tokens is {keep}, more than this model's maximum context length of {limits.context} tokens.",
                "truncate_prompt_tokens",
            )
        if self.truncation_side not in (None, "left", "right"):
            raise invalid(f"truncation_side must be left or right, got {self.truncation_side!r}.", "truncation_side")

    def _check_prompt(self, limits: Limits) -> None:
        given = [name for name in ("text", "token_ids", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            raise invalid(
                "A request takes exactly one prompt: text, token_ids or messages; "
                + (f"got {' and '.join(given)}." if given else "got none."),
                given[-1] if given else "prompt",
            )
        if self.text is not None:
            if not isinstance(self.text, str):
                raise invalid(f"The prompt must be text, got {kind_of(self.text)}.", "prompt")
            check_prompt_text(self.text, limits)
        elif self.token_ids is not None:
            if not self.token_ids:
                raise invalid("The prompt is empty: give at least one token id.", "prompt")
            limits.check_count("token ids", len(self.token_ids), limits.max_prompt_chars, "prompt")
        else:
            limits.check_count("messages", len(self.messages or ()), limits.max_messages, "messages")
            check_messages(self.messages or (), limits, images=self.images > 0)
        for name, most in (("tools", limits.max_tools), ("documents", limits.max_batch)):
            given_too = getattr(self, name)
            if given_too:
                if self.messages is None:
                    raise invalid(f"{name} need messages: a prompt of text or token ids has no place for them.", name)
                limits.check_count(name, len(given_too), most, name)
                check_nesting(given_too, limits, name)
        if self.continue_final_message and self.add_generation_prompt and self.messages is not None:
            raise invalid(
                "continue_final_message and add_generation_prompt exclude each other: set the latter to false.",
                "continue_final_message",
            )
        limits.check_count(
            "chat_template_kwargs",
            len(self.chat_template_kwargs),
            limits.max_template_arguments,
            "chat_template_kwargs",
        )
        for name, value in self.chat_template_kwargs.items():
            if len(name) > limits.max_name_chars or (
                isinstance(value, str) and len(value) > limits.max_template_argument_chars
            ):
                raise invalid(
                    f"An entry of chat_template_kwargs is too long: names have at most {limits.max_name_chars} characters, "
                    f"texts {limits.max_template_argument_chars}.",
                    "chat_template_kwargs",
                )
            if name in TEMPLATE_ARGUMENTS:
                raise invalid(f"chat_template_kwargs cannot set {name!r}.", "chat_template_kwargs")
            if value is not None and not isinstance(value, str | int | float | bool):
                raise invalid(
                    f"chat_template_kwargs takes scalars; {name} is {kind_of(value)}.", "chat_template_kwargs"
                )


def effort_variables(effort: str | None) -> dict[str, Any]:
    """The template variables that a reasoning effort stands for: its own name (gpt-oss), and what turns thinking off (Qwen 3 and
    DeepSeek V3.1 with Granite)."""
    if effort is None:
        return {}
    return {"reasoning_effort": effort, **({"enable_thinking": False, "thinking": False} if effort == "none" else {})}


def check_prompt_text(text: str, limits: Limits, param: str = "prompt") -> None:
    """Refuses an empty prompt, one far beyond any context, and what is not Unicode."""
    if not text:
        raise invalid("The prompt is empty: give at least one character.", param)
    if len(text) > limits.max_prompt_chars:
        raise limits.too_many_chars(f"the prompt has {len(text)} characters", param)
    check_text(text, param)


def check_messages(messages: Sequence[Mapping[str, Any]], limits: Limits, images: bool = False) -> None:
    """Checks the shape and size of a chat; what its texts become is the template's affair.

    Args:
        messages: OpenAI's messages; a content is text, None (with tool calls), or a list of text parts.
        images: whether parts may stand for images.
    Raises:
        RequestError: INVALID_ARGUMENT naming the message.
    """
    if not messages:
        raise invalid("messages is empty: give at least one message.", "messages")
    chars = parts = 0
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise invalid(f"{where} must be an object with role and content, got {kind_of(message)}.", where)
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise invalid(f"{where}.role must be text, such as 'user'; got {_brief(role)}.", f"{where}.role")
        limits.check_name(f"{where}.role", role)
        content = message.get("content")
        if content is None and not any(message.get(name) for name in _INSTEAD_OF_CONTENT):
            raise invalid(f"{where}.content is missing: give text.", f"{where}.content")
        for name in ("content", "tool_calls"):
            if isinstance(message.get(name), Sequence) and not isinstance(message[name], str):
                parts += len(message[name])
        limits.check_count("parts and tool calls in its messages", parts, limits.max_content_parts, "messages")
        for text in _texts(content, where, images):
            check_text(text, f"{where}.content")
            chars += len(text)
        if chars > limits.max_prompt_chars:
            raise limits.too_many_chars(f"the messages have more than {limits.max_prompt_chars} characters", "messages")
    check_nesting(messages, limits, "messages")


_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "refusal", "reasoning", "reasoning_content", "thinking")
"""What a turn may have and no content: an assistant's."""


def _brief(value: Any) -> str:
    shown = repr(value) if isinstance(value, str | int | float | bool | None) else kind_of(value)
    return shown if len(shown) <= 64 else shown[:64] + "..."


def _texts(content: Any, where: str, images: bool) -> list[str]:
    """The texts of one message's content."""
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, Sequence):
        raise invalid(f"{where}.content must be text or a list of parts, got {kind_of(content)}.", f"{where}.content")
    texts = []
    for j, part in enumerate(content):
        place = f"{where}.content[{j}]"
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or not isinstance(kind, str):
            raise invalid(f'{place} must be {{"type": "text", "text": ...}}.', place)
        if images and kind in PLACES:
            continue
        if kind not in TEXT_PARTS:
            takes = "text and images" if images else "text only"
            raise invalid(f"{place} is of type {kind!r}; this model takes {takes}.", place)
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise invalid(f"{place} of type {kind!r} has no text.", place)
        texts.append(text)
    return texts
