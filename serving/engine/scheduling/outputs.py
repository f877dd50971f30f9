"""What a step's results mean for a request: whether it ends, and what goes out to whoever waits for it."""

from __future__ import annotations

import logging
import time

import numpy as np

from serving.engine.api.constraint import TooComplexError
from serving.engine.api.types import EngineOutput, FinishReason, RequestTimes, TokenLogprobs
from serving.engine.requests.plan import Chunk
from serving.engine.requests.request import Request

log = logging.getLogger(__name__)


def verdict(request: Request, max_model_len: int) -> tuple[FinishReason | None, str | None]:
    """Whether the token that was just appended ends the completion, and the sentence that goes with an error.

    Advances the request's grammar.
    """
    reason = request.check_stop(max_model_len)
    constraint = request.spec.constraint
    if constraint is None or reason is FinishReason.STOP:
        return reason, None
    try:
        if not constraint.accept(request.tokens[-1]):
            return FinishReason.ERROR, "the grammar does not allow the sampled token."
        return (FinishReason.STOP if constraint.finished else reason), None
    except Exception as error:
        return grammar_failure(request, error)


def grammar_failure(request: Request, error: Exception) -> tuple[FinishReason, str]:
    """What ends a request whose grammar raised, which is not everybody's step: its own complexity, or a failure of ours."""
    if isinstance(error, TooComplexError):
        log.warning("request %s: its grammar cannot go on: %s", request.request_id, error)
        return FinishReason.REFUSED, str(error)
    log.error("request %s: its grammar failed", request.request_id, exc_info=error)
    return FinishReason.ERROR, "the grammar failed."


class Outputs:
    """Makes outputs, and keeps what they are to hold until the first one of a request goes out."""

    def __init__(self) -> None:
        self._prompt_logprobs: dict[str, list[TokenLogprobs | None]] = {}
        self._logprobs: dict[str, list[TokenLogprobs]] = {}  # of tokens that the last output is to hold

    def token(self, request: Request, token: int, logprobs: TokenLogprobs | None) -> EngineOutput | None:
        """A token that does not end its request; None where the last output is to hold it."""
        if request.spec.whole and len(request.tokens) > request.prompt_len + 1:
            if logprobs is not None:
                self._logprobs.setdefault(request.spec.request_id, []).append(logprobs)
            return None
        found = None if logprobs is None else (logprobs,)
        counts = request.prompt_len, request.num_cached_tokens
        if len(request.tokens) > request.prompt_len + 1:  # by position: 1.2 us and not 1.4, 256 times a step
            return EngineOutput(request.spec.request_id, (token,), found, None, None, None, None, *counts)
        prompt_logprobs, times = self._take_prompt_logprobs(request), _times(request)
        return EngineOutput(request.spec.request_id, (token,), found, prompt_logprobs, None, None, None, *counts, times)

    def last(
        self,
        request: Request,
        reason: FinishReason,
        tokens: tuple[int, ...] = (),
        logprobs: TokenLogprobs | None = None,
        error: str | None = None,
        now: float | None = None,
        pooled: np.ndarray | None = None,
    ) -> EngineOutput:
        """The end of a request."""
        verified, accepted = map(sum, zip(*request.acceptance or [(0, 0)], strict=True))
        if request.spec.whole and request.num_output > 1:  # the first was told at once
            tokens = tuple(request.tokens[request.prompt_len + 1 :])
        found = self._logprobs.pop(request.spec.request_id, []) + ([] if logprobs is None else [logprobs])
        return EngineOutput(
            request.spec.request_id,
            tokens,
            tuple(found) or None,
            self._take_prompt_logprobs(request),
            finish_reason=reason,
            stop_reason=request.stop_reason,
            error=error,
            num_prompt_tokens=request.prompt_len,
            num_cached_tokens=request.num_cached_tokens,
            times=_times(request, time.monotonic() if now is None else now),
            pooled=pooled,
            num_preemptions=request.num_preemptions,
            accepted_drafts=accepted,
            rejected_drafts=verified - accepted,
        )

    def keep_prompt_logprobs(self, chunk: Chunk, entries: list[TokenLogprobs]) -> None:
        """Entries of prompt positions [chunk.start + 1, chunk.start + 1 + len(entries))."""
        if not chunk.request.finished:
            kept = self._prompt_logprobs.setdefault(chunk.request.request_id, [None])
            del kept[chunk.start + 1 :]  # a preempted request computes its prompt again
            kept.extend(entries)

    def _take_prompt_logprobs(self, request: Request) -> tuple[TokenLogprobs | None, ...] | None:
        kept = self._prompt_logprobs.pop(request.request_id, None)
        if kept is None:
            # A one-token prompt has no position to report on, but was asked.
            asked = request.spec.params.prompt_logprobs is not None and request.num_output == 1
            return (None,) if asked and request.prompt_len == 1 else None
        return tuple(kept[: request.prompt_len])


def add_pooled(chunk: Chunk, share: np.ndarray) -> np.ndarray | None:
    """Adds a step's share to its request's pooled hidden states; the result where the prompt is complete, else None."""
    request = chunk.request
    first = chunk.start == request.num_cached_tokens or request.pooled is None
    request.pooled = share + (0 if first else request.pooled)
    if chunk.start + chunk.length < request.prompt_len:
        return None
    return request.pooled / (request.prompt_len if request.spec.pooling == "mean" else 1)


def _times(request: Request, finished: float = 0.0) -> RequestTimes:
    return RequestTimes(request.spec.arrival_time, request.scheduled_time, request.first_token_time, finished)
