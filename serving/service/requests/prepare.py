"""From what a client asks for to what an engine takes: tokens, resolved parameters, one engine request a completion."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from serving.engine.api.constraint import TokenConstraint
from serving.engine.api.sampling_params import SamplingParams, StructuredOutputs
from serving.engine.api.types import EngineInfo, EngineRequest, TransferParams
from serving.errors import beyond_context, invalid
from serving.service.requests.history import as_templates_know_it
from serving.service.requests.inputs import GenerateInput, check_prompt_text
from serving.service.requests.json_bounds import check_nesting
from serving.service.requests.limits import Limits, check_text
from serving.text.chat_template import check_variables
from serving.text.detokenizer import IncrementalDetokenizer
from serving.text.tools.reply import ReplyReader

if TYPE_CHECKING:
    from serving.text.chat_template import ChatTemplate
    from serving.text.tokenizer import Tokenizer

ConstraintFactory = Callable[[], TokenConstraint]
"""Makes a fresh grammar state for one completion."""


@dataclasses.dataclass(frozen=True)
class PreparedRequest:
    """A request that was found good: nothing about it can be refused any more but for load.

    Attributes:
        request_id: the client's, or one made for it.
        model: the served name that it asked for.
        prompt: the text that was tokenized; None when token ids were given.
        prompt_token_ids: after truncation.
        params: with `max_tokens` resolved.
        children: one engine request a completion, in order of index; their ids are unique in this process.
        tokenizer: what its completions are read with.
        owner: name of the API key that sent it, or None.
        markers: control tokens that stay in the text, because it is parsed by them.
        reader: makes what tells content, thinking and calls of one completion apart; None where the text is the content.
        continues: the completion's text goes on with the prompt's, so that a blank at its beginning is part of it.
        share: whose share of the room it takes, see `Caller.share`.
    """

    request_id: str
    model: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    children: tuple[EngineRequest, ...]
    tokenizer: Tokenizer
    owner: str | None = None
    markers: frozenset[int] = frozenset()
    reader: Callable[[], ReplyReader] | None = None
    continues: bool = False
    share: str | None = None


def render_and_encode(
    given: GenerateInput,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    limits: Limits,
    rewrite: Callable[[str], str | list[str]] | None = None,
) -> tuple[str | None, list[int]]:
    """The prompt as text (None for token ids) and as token ids. Runs off the event loop.

    Args:
        rewrite: see `ChatTemplate.encode`.
    Raises:
        RequestError: INVALID_ARGUMENT.
    """
    if given.token_ids is not None:
        return None, list(given.token_ids)
    if given.text is not None:
        special = given.add_special_tokens is not False
        return given.text, tokenizer.encode(given.text, add_special_tokens=special, parse_special=True)
    if template is None:
        raise invalid(
            "This model has no chat template: send text, or start the server with --chat-template.", "messages"
        )
    variables: dict[str, Any] = dict(given.chat_template_kwargs)
    check_variables(variables)
    if given.documents:
        if "documents" not in getattr(template, "variables", ("documents",)):
            raise invalid(
                "documents: this model's chat template has no place for them. Write them into a message.", "documents"
            )
        variables["documents"] = given.documents
    prompt, ids = template.encode(
        tokenizer,
        as_templates_know_it(given.messages or (), limits),
        *(() if rewrite is None else (rewrite,)),
        tools=given.tools or None,
        add_generation_prompt=given.add_generation_prompt,
        continue_final_message=given.continue_final_message,
        **variables,
    )
    check_prompt_text(prompt, limits, "messages")
    if given.add_special_tokens:
        # What the tokenizer itself puts around a text, but not a second time where the template wrote it.
        own = tokenizer.encode("", add_special_tokens=True)
        before = own[: own.index(tokenizer.bos_token_id) + 1] if tokenizer.bos_token_id in own else []
        ids = [*before, *ids] if ids[: len(before)] != before else ids
    return prompt, ids


def check_token_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Refuses a prompt without tokens, and ids outside the vocabulary."""
    if not ids:
        raise invalid("The prompt is empty: it has no tokens.", "prompt")
    for i, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise invalid(f"Prompt token {i} is {token!r}; this model's ids go from 0 to {vocab_size - 1}.", "prompt")


def cut(ids: Sequence[int], keep: int, side: str | None) -> Sequence[int]:
    """At most `keep` of the ids, without what the `side` has too many (None: the left one)."""
    return ids[:keep] if side == "right" else ids[-keep:]


def fit_prompt(
    ids: Sequence[int], params: SamplingParams, given: GenerateInput, vocab_size: int, max_model_len: int
) -> tuple[tuple[int, ...], SamplingParams]:
    """Checks the token ids, truncates where asked, and resolves `max_tokens` against the context.

    Raises:
        RequestError: INVALID_ARGUMENT: no tokens, an id outside the vocabulary, or more tokens than the context has.
    """
    check_token_ids(ids, vocab_size)
    truncate = given.truncate_prompt_tokens
    if truncate is not None:
        keep = max_model_len - (params.max_tokens or 1) if truncate == -1 else truncate
        ids = cut(ids, max(keep, 1), given.truncation_side)
    room = max_model_len - len(ids)
    if room < 1:
        what = f"your {given.place} resulted in {len(ids)} tokens"
        raise beyond_context(
            max_model_len,
            what if room < 0 else f"{what}, which leaves none to the completion",
            given.place,
            given.place,
        )
    if params.max_tokens is None or (given.clip_max_tokens and params.max_tokens > room):
        # min_tokens may not ask for more than the context leaves: SamplingParams says so in its own words.
        params = dataclasses.replace(params, max_tokens=room)
    elif params.max_tokens > room:
        raise beyond_context(
            max_model_len,
            f"you requested {len(ids) + params.max_tokens} tokens ({len(ids)} in the {given.place}, {params.max_tokens} in the "
            "completion)",
            given.place,
            f"{given.place} or completion",
        )
    return tuple(ids), params


def check_params(params: SamplingParams, vocab_size: int, limits: Limits) -> None:
    """Checks what of the sampling parameters depends on the model or on the server's limits."""
    limits.check_count("completions (n)", params.n, min(limits.max_n, limits.max_sequences), "n")
    for name in ("logprobs", "prompt_logprobs"):
        asked = getattr(params, name)
        if asked is not None and asked > limits.max_logprobs:
            raise invalid(f"{name} is {asked}; this server gives those of {limits.max_logprobs} tokens at most.", name)
    limits.check_count("stop strings", len(params.stop_strings), limits.max_stop_strings, "stop")
    for text in params.stop_strings:
        limits.check_count("characters in a stop string", len(text), limits.max_stop_chars, "stop")
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        for token in getattr(params, name) or ():
            if token >= vocab_size:
                raise invalid(f"{name} has token id {token}; this model's ids go from 0 to {vocab_size - 1}.", name)
    for name in ("stop_strings", "bad_words"):
        for text in getattr(params, name):
            check_text(text, name.removesuffix("_strings"))
    if params.structured_outputs is not None:
        check_grammar_size(params.structured_outputs, limits)


def check_reads_text(params: SamplingParams, tokenizer: Tokenizer) -> None:
    """Refuses what acts on text where the model has no tokenizer: it would be ignored without a word."""
    if tokenizer.reads_text:
        return
    for name in ("stop_strings", "bad_words"):
        if getattr(params, name):
            field = name.removesuffix("_strings")
            raise invalid(f"{field} acts on text, and this model was started without a tokenizer.", field)


def check_grammar_size(grammar: StructuredOutputs, limits: Limits) -> None:
    """Refuses a grammar too large to compile, or nested too deeply to be walked."""
    if isinstance(grammar.json, Mapping):
        check_nesting(grammar.json, limits, "structured_outputs")
    size = sum(
        len(value if isinstance(value, str) else str(value))
        for value in (grammar.json, grammar.regex, grammar.choice, grammar.grammar)
        if value is not None
    )
    if size > limits.max_grammar_chars:
        raise invalid(
            f"structured_outputs has {size} characters; at most {limits.max_grammar_chars} are taken.",
            "structured_outputs",
        )


def bad_word_ids(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The token sequences that spell `words`, both at the start of a text and behind a blank."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word, " " + word.lstrip()):
            ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            if ids:
                found[ids] = None
    return tuple(found)


def offsets(ids: Sequence[int], text: str, tokenizer: Tokenizer) -> list[int]:
    """See `TextService.offsets`."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    found, at = [], 0
    for token in ids:
        found.append(at)
        piece = detokenizer.push((token,))
        if text.startswith(piece, at):
            at += len(piece)
        elif not tokenizer.is_special(token):
            at = min(at + len(piece), len(text))
    return found


def transfer_of(given: GenerateInput, info: EngineInfo) -> TransferParams | None:
    """Which part of the request another engine does.

    Raises:
        RequestError: INVALID_ARGUMENT, where this one exchanges no pages with any.
    """
    if given.transfer is not None and not info.role:
        raise invalid(
            "kv_transfer_params is for servers that exchange pages with others: start this one with --role prefill, decode or "
            "both, or leave it out.", "kv_transfer_params",
        )  # fmt: skip
    return given.transfer


def params_of_each(params: SamplingParams) -> list[SamplingParams]:
    """The parameters of each of `n` completions: their own seeds, and the prompt's logprobs with the first, as the prompt is the
    same one. Without a seed the others share one object."""
    first = dataclasses.replace(params, n=1)
    if params.n == 1:
        return [first]
    other = dataclasses.replace(first, prompt_logprobs=None)
    if params.seed is None:
        return [first, *[other] * (params.n - 1)]
    return [first, *(dataclasses.replace(other, seed=child_seed(params.seed, i)) for i in range(1, params.n))]


def child_seed(seed: int | None, index: int) -> int | None:
    """The seed of completion `index`. The first keeps the request's, so that n = 1 and n = 2 agree on it.

    The others step by the odd constant of splitmix64 (Steele, Lea, Flood 2014): distinct for distinct indices, and
    far from the small neighbouring seeds that people choose.
    """
    if seed is None or index == 0:
        return seed
    mixed = (seed + index * 0x9E3779B97F4A7C15) % 2**64
    return mixed - 2**63
