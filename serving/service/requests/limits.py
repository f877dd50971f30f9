"""Bounds that keep one request from taking the server with it, the same for every entry.

Ranges of sampling parameters live with `SamplingParams`; what depends on the served model (context, vocabulary) is
checked by `TextService.prepare`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from serving.engine.api.sampling_params import MAX_LOGPROBS, MAX_N, MAX_STOP_STRING_CHARS, MAX_STOP_STRINGS
from serving.errors import CONTEXT_LENGTH_EXCEEDED, RequestError, beyond_context, invalid

CHARS_PER_TOKEN = 32
"""Longer prompts are refused unread. English has about 4 characters a token and source code 3; only runs of blanks
come near this."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """How large a request may be, how long it may take to come, and how many may: the same for gRPC, HTTP, gateways, batch
    files and `LLM`, as far as an entry has the thing that is bounded.

    Attributes:
        max_body_bytes: one gRPC message or HTTP body.
        max_sound_bytes: a sound file that is transcribed, over HTTP.
        max_sounds_bytes: sound files that come in at one time, together; and those whose requests run.
        max_bodies_bytes: other HTTP bodies that are being read at one time, together; further ones are asked to come later.
        max_media_bytes: images, videos and sounds of all requests that wait or run, cut as their towers read them; further ones are
            asked to come later. None for no bound.
        max_head_bytes: an HTTP request's head, or a call's metadata; its trailers, too; and a line between two chunks.
        max_headers: header lines of an HTTP request, and trailers.
        max_pipelined: requests that come in a connection before earlier ones were answered.
        head_timeout_s: for an HTTP request's head to come, from its first byte or from connecting.
        body_gap_s: between two pieces of an HTTP body.
        body_timeout_s: for a whole HTTP body.
        max_json_values: objects, lists and members of one JSON text, together.
        max_json_depth: lists and objects inside each other.
        stalled_reader_s: for a client to take something of a stream that has more for it; then the request is aborted.
        context: tokens of the served model's context, where it is known; the sentences about longer prompts tell it.
        max_prompt_chars: a prompt's text, rendered; and token ids of a prompt.
        max_messages: messages of a chat.
        max_tools: tools offered to a chat.
        max_template_arguments, max_template_argument_chars: variables for the chat template, and the text in each.
        max_content_parts: parts of all contents of a chat, together; and tool calls in it.
        max_entries: of lists and maps that go with a request: biases, words, ids that end it.
        max_batch: prompts in one HTTP request.
        max_n: completions of one prompt.
        max_embed_len: tokens of a text to embed: one beyond the context is read in pieces. None: the context.
        max_logprobs: likeliest tokens told beside each.
        max_stop_strings, max_stop_chars: strings that end a completion, and characters of each.
        max_sequences: prompts times `n` in one request.
        max_live: requests that run or wait, of everybody; further ones are refused.
        max_live_extra: completions beyond the first of each of those, together.
        max_live_per_key: as max_live, of one API key (of one tenant of a gateway's); None: half of max_live. Of max_live_extra
            a key may have half.
        max_grammar_chars: a JSON schema, regular expression, grammar, or all choices together.
        grammar_timeout_s: time to compile a grammar.
        max_name_chars: request ids, model names, salts, tenants.
        max_timeout_s: the largest timeout taken; one day.
        requests_per_minute: of one API key (of everybody together, where there are no keys); None: no bound.
    """

    max_body_bytes: int = 16 * 2**20
    max_sound_bytes: int = 25 * 2**20
    max_sounds_bytes: int = 2**30
    max_bodies_bytes: int = 256 * 2**20
    max_media_bytes: int | None = 4 * 2**30
    max_head_bytes: int = 64 * 1024
    max_headers: int = 256
    max_pipelined: int = 64
    head_timeout_s: float = 30.0
    body_gap_s: float = 60.0
    body_timeout_s: float = 600.0
    max_json_values: int = 1_000_000
    max_json_depth: int = 128
    stalled_reader_s: float = 60.0
    context: int | None = None
    max_prompt_chars: int = 1 << 20
    max_messages: int = 2048
    max_tools: int = 128
    max_template_arguments: int = 64
    max_template_argument_chars: int = 64 * 1024
    max_content_parts: int = 8192
    max_entries: int = 1024
    max_batch: int = 1024
    max_n: int = MAX_N
    max_embed_len: int | None = None
    max_logprobs: int = MAX_LOGPROBS
    max_stop_strings: int = MAX_STOP_STRINGS
    max_stop_chars: int = MAX_STOP_STRING_CHARS
    max_sequences: int = 1024
    max_live: int = 16384
    max_live_extra: int = 2048
    max_live_per_key: int | None = None
    max_grammar_chars: int = 256 * 1024
    grammar_timeout_s: float = 10.0
    max_name_chars: int = 256
    max_timeout_s: float = 86400.0
    requests_per_minute: int | None = None

    @classmethod
    def for_model(cls, max_model_len: int, **changes: Any) -> Limits:
        """The defaults for a context of `max_model_len` tokens."""
        chars = max(64 * 1024, max(max_model_len, changes.get("max_embed_len") or 0) * CHARS_PER_TOKEN)
        return cls(**{"context": max_model_len, "max_prompt_chars": chars, **changes})

    def too_many_chars(self, what: str, param: str) -> RequestError:
        """The error for a text beyond `max_prompt_chars`: no context has room for its tokens."""
        if self.context is not None:
            return beyond_context(
                self.context, f"{what}, and more than {self.max_prompt_chars} cannot fit", param, param
            )
        return invalid(
            f"The request is too long: {what}; at most {self.max_prompt_chars} are read.",
            param,
            CONTEXT_LENGTH_EXCEEDED,
        )

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
