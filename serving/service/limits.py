"""Bounds that keep one request from taking the server with it, the same for every entry.

Ranges of sampling parameters live with `SamplingParams`; what depends on the served model (context, vocabulary) is
checked by `TextService.prepare`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from serving.engine.api.sampling_params import MAX_N, MAX_STOP_STRING_CHARS, MAX_STOP_STRINGS
from serving.errors import RequestError, invalid

CHARS_PER_TOKEN = 32
"""Longer prompts are refused unread. English has about 4 characters a token and source code 3; only runs of blanks
come near this."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """How large a request may be, how long it may take to come, and how many may: the same for gRPC, HTTP, gateways, batch
    files and `LLM`, as far as an entry has the thing that is bounded.

    Attributes:
        max_body_bytes: one gRPC message or HTTP body.
        max_head_bytes: an HTTP request's head, or a call's metadata.
        max_headers: header lines of an HTTP request.
        head_timeout_s: for an HTTP request's head to come, from its first byte or from connecting.
        body_gap_s: between two pieces of an HTTP body.
        stalled_reader_s: for a client to take something of a stream that has more for it; then the request is aborted.
        max_prompt_chars: a prompt's text, rendered.
        max_messages: messages of a chat.
        max_tools: tools offered to a chat.
        max_template_arguments, max_template_argument_chars: variables for the chat template, and the text in each.
        max_batch: prompts in one HTTP request.
        max_n: completions of one prompt.
        max_stop_strings, max_stop_chars: strings that end a completion, and characters of each.
        max_sequences: prompts times `n` in one request.
        max_grammar_chars: a JSON schema, regular expression, grammar, or all choices together.
        grammar_timeout_s: time to compile a grammar.
        max_name_chars: request ids, model names, salts, tenants.
        max_timeout_s: the largest timeout taken; one day.
        requests_per_minute: of one API key (of everybody together, where there are no keys); None: no bound.
    """

    max_body_bytes: int = 16 * 2**20
    max_head_bytes: int = 64 * 1024
    max_headers: int = 256
    head_timeout_s: float = 30.0
    body_gap_s: float = 60.0
    stalled_reader_s: float = 60.0
    max_prompt_chars: int = 1 << 20
    max_messages: int = 2048
    max_tools: int = 128
    max_template_arguments: int = 64
    max_template_argument_chars: int = 64 * 1024
    max_batch: int = 1024
    max_n: int = MAX_N
    max_stop_strings: int = MAX_STOP_STRINGS
    max_stop_chars: int = MAX_STOP_STRING_CHARS
    max_sequences: int = 1024
    max_grammar_chars: int = 256 * 1024
    grammar_timeout_s: float = 10.0
    max_name_chars: int = 256
    max_timeout_s: float = 86400.0
    requests_per_minute: int | None = None

    @classmethod
    def for_model(cls, max_model_len: int, **changes: Any) -> Limits:
        """The defaults for a context of `max_model_len` tokens."""
        chars = max(64 * 1024, max_model_len * CHARS_PER_TOKEN)
        return cls(**{"max_prompt_chars": chars, **changes})

    def check_count(self, what: str, count: int, limit: int, param: str | None = None) -> None:
        """Raises INVALID_ARGUMENT when there are more than `limit` of something."""
        if count > limit:
            raise invalid(f"The request has {count} {what}; at most {limit} are taken.", param)

    def check_name(self, param: str, value: str | None) -> None:
        """Request ids, model names, salts and tenants: short, printable."""
        if value is None:
            return
        if not isinstance(value, str):
            raise invalid(f"{param} must be a string, got {value!r}.", param)
        if len(value) > self.max_name_chars:
            raise invalid(f"{param} has {len(value)} characters; at most {self.max_name_chars} are taken.", param)
        if not value.isprintable():
            raise invalid(f"{param} must be printable text, got {value!a}.", param)

    def check_timeout(self, param: str, value: float | None) -> None:
        """Seconds, more than 0 and at most a day."""
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise invalid(f"{param} must be a number of seconds, got {value!r}.", param)
        if not 0 < value <= self.max_timeout_s:
            raise invalid(
                f"{param} must be more than 0 and at most {self.max_timeout_s:g} seconds, got {value}.", param
            )


def check_text(text: str, param: str) -> None:
    """Refuses what is not Unicode text: JSON can smuggle lone surrogates in, and no tokenizer takes them.

    Raises:
        RequestError: INVALID_ARGUMENT naming the place.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise not_unicode(f"U+{ord(text[error.start]):04X} at character {error.start}", param) from None


def not_unicode(what: str, param: str | None = None) -> RequestError:
    """The error for text that is not valid Unicode."""
    return invalid(f"{param or 'The request'} is not valid Unicode text: {what} is half of a surrogate pair.", param)
