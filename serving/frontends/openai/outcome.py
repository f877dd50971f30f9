"""From the service's outputs to the parts of replies that chat and completions share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from serving.frontends.openai.protocol.kv_transfer import reply_of
from serving.service import Outcome, TextService, TokenLogprob, Usage

LOWEST_LOGPROB = -9999.0
"""JSON has no infinity: a token that could not be sampled is shown with this, as vLLM does."""


def usage_dict(usages: Iterable[Usage]) -> dict[str, Any]:
    """OpenAI's `usage` over the prompts of one request."""
    prompt = completion = cached = reasoning = accepted = rejected = 0
    for usage in usages:
        reasoning += usage.reasoning_tokens
        prompt += usage.prompt_tokens
        completion += usage.completion_tokens
        cached += usage.cached_tokens
        accepted += usage.accepted_drafts
        rejected += usage.rejected_drafts
    drafts = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": rejected}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning} | (drafts if accepted + rejected else {}),
    }


def transfer_of(outcome: Outcome, service: TextService) -> dict[str, Any]:
    """What a reply has besides, where another server goes on with the request."""
    found = reply_of(outcome.transfer, service.kv_address)
    return {} if found is None else {"kv_transfer_params": found}


def finite(logprob: float) -> float:
    """A logprob that JSON can carry."""
    return max(logprob, LOWEST_LOGPROB)


def token_text(entry: TokenLogprob, as_ids: bool) -> str:
    """How a token is written in logprobs."""
    return f"token_id:{entry.token_id}" if as_ids else entry.token


def chat_logprobs(entries: Iterable[TokenLogprob], as_ids: bool) -> dict[str, Any]:
    """OpenAI's chat form: each token with its bytes and the likeliest tokens at its place."""

    def one(entry: TokenLogprob) -> dict[str, Any]:
        return {"token": token_text(entry, as_ids), "logprob": finite(entry.logprob), "bytes": list(entry.bytes)}

    return {"content": [{**one(e), "top_logprobs": [one(t) for t in e.top]} for e in entries], "refusal": None}


def completion_logprobs(
    entries: Sequence[TokenLogprob | None], offsets: Sequence[int], first: str, as_ids: bool
) -> dict[str, Any]:
    """OpenAI's older form for /v1/completions: parallel lists.

    Args:
        entries: None stands for a prompt's first token, which has no logprob.
        offsets: where each token's text begins in the reply's text.
        first: a prompt's first token as text.
    """
    tokens: list[str] = []
    logprobs: list[float | None] = []
    top: list[dict[str, float] | None] = []
    for entry in entries:
        if entry is None:
            tokens.append(first)
            logprobs.append(None)
            top.append(None)
            continue
        tokens.append(token_text(entry, as_ids))
        logprobs.append(finite(entry.logprob))
        # The token itself is always there, and first, likeliest or not: evaluation harnesses compare it with the others.
        places = {tokens[-1]: finite(entry.logprob)}
        for likely in entry.top:
            places.setdefault(token_text(likely, as_ids), finite(likely.logprob))
        top.append(places)
    return {"text_offset": list(offsets), "token_logprobs": logprobs, "tokens": tokens, "top_logprobs": top}


def prompt_logprobs(entries: tuple[TokenLogprob | None, ...] | None) -> list[dict[str, Any] | None] | None:
    """vLLM's form: a dictionary of token id -> logprob, rank, text for each position; None for the first."""
    if entries is None:
        return None

    def one(entry: TokenLogprob) -> dict[str, Any]:
        return {
            str(e.token_id): {"logprob": finite(e.logprob), "rank": e.rank, "decoded_token": e.token}
            for e in (entry, *entry.top)
        }

    return [entry and one(entry) for entry in entries]
