"""An engine without a model, with a tokenizer whose tokens are bytes: every front end is testable in milliseconds.

service = mock_service(MockEngine(reply="Hello"))
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

import numpy as np

from serving.engine.api.constraint import TooComplexError
from serving.engine.api.types import (
    EngineInfo,
    EngineOutput,
    EngineRequest,
    EngineStats,
    FinishReason,
    RequestTimes,
    TokenLogprobs,
    TokenPair,
)
from serving.errors import ErrorKind, RequestError
from serving.service import TextService

SPECIAL = ("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>")
BOS, EOS = 256, 257
END = 256 + SPECIAL.index("<|end|>")
VOCAB = 264  # one more than there are tokens: models pad their vocabulary too
PAGE_SIZE = 16


class MockTokenizer:
    """Token id = byte; the special tokens of `SPECIAL` follow from 256. Same face as serving.text's Tokenizer."""

    vocab_size = 256 + len(SPECIAL)
    eos_token_ids = (EOS, END)
    special_token_ids = frozenset(range(256, vocab_size))
    added_tokens: Mapping[str, int] = {token: 256 + i for i, token in enumerate(SPECIAL)}
    bos_token_id = BOS
    strips_leading_space = False
    reads_text = True

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        ids = [BOS] if add_special_tokens else []
        while text:
            found = [(text.find(token), i) for i, token in enumerate(SPECIAL) if token in text] if parse_special else []
            at, which = min(found, default=(len(text), -1))
            ids.extend(text[:at].encode("utf-8"))
            if which < 0:
                break
            ids.append(256 + which)
            text = text[at + len(SPECIAL[which]) :]
        return ids

    def encode_pair(
        self, first: str, second: str | None = None, max_tokens: int | None = None
    ) -> tuple[list[int], list[int]]:
        parts = [text.encode() for text in (first, second) if text is not None]
        if max_tokens is not None:
            parts = [part[: max(1, (max_tokens - 1) // len(parts))] for part in parts]
        ids = [BOS, *(i for part in parts for i in part)]
        return ids, [0] * (1 + len(parts[0])) + [1] * (len(ids) - 1 - len(parts[0]))

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 256:
            return bytes([token_id])
        return SPECIAL[token_id - 256].encode() if token_id < self.vocab_size else b""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        kept = (i for i in ids if i < 256 or not skip_special_tokens)
        return b"".join(self.token_bytes(i) for i in kept).decode("utf-8", errors="replace")

    def id_to_token(self, token_id: int) -> str | None:
        return chr(token_id) if token_id < 256 else SPECIAL[token_id - 256] if token_id < self.vocab_size else None

    def is_special(self, token_id: int) -> bool:
        return token_id in self.special_token_ids


def _said(content: Any) -> str:
    """The text of a content, whose parts may be bare texts or refusals, as a chat template reads it."""
    parts = content if isinstance(content, list) else [content or ""]
    return "".join(part if isinstance(part, str) else part.get("refusal") or part["text"] for part in parts)


class MockTemplate:
    """`<|role|>content<|end|>` a message, then the opening of an assistant turn."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        text = "".join(f"<|{m['role']}|>{_said(m['content'])}<|end|>" for m in messages)
        if tools:
            text = f"<|tool|>{len(tools)} tools<|end|>" + text
        if continue_final_message:
            return text.removesuffix("<|end|>")
        return text + ("<|assistant|>" if add_generation_prompt else "")

    def encode(self, tokenizer: MockTokenizer, messages: Any, *args: Any, **kwargs: Any) -> tuple[str, list[int]]:
        text = self.render(messages, *args, **kwargs)
        return text, tokenizer.encode(text, add_special_tokens=False, parse_special=True)


class MockEngine:
    """An `EngineClient` that answers with a fixed text, or with the prompt itself when none is given.

    Args:
        reply: a text, token ids, or a function of the request giving token ids; end-of-sequence follows by itself.
            None echoes the prompt. With `ignore_eos`, or while below `min_tokens`, the reply starts over.
        step_s: seconds a step takes (a token comes each step).
        tokens_per_output: tokens in one output.
        max_live: with more live requests, further ones are refused with RESOURCE_EXHAUSTED.
        max_model_len: context, in tokens.

    Attributes:
        requests: every request that came, in order.
        live: those that run, by id.
        aborted: ids that were aborted, by `abort` or by closing the stream.
        steps: tokens made, over all requests.
    """

    def __init__(
        self,
        reply: str | Sequence[int] | Callable[[EngineRequest], Sequence[int]] | None = None,
        *,
        step_s: float = 0.0,
        tokens_per_output: int = 1,
        max_live: int = 1024,
        max_model_len: int = 512,
        num_pages: int = 4097,
    ) -> None:
        self._reply = reply
        self.step_s = step_s
        self._tokens_per_output = tokens_per_output
        self._max_live = max_live
        self._info = EngineInfo(
            model_id="mock-1b", architecture="MockForCausalLM", vocab_size=VOCAB, max_model_len=max_model_len,
            max_num_seqs=64, max_num_batched_tokens=512, page_size=PAGE_SIZE, num_pages=num_pages, dtype="float32",
            quantization=None, mesh="data=1,model=1", platform="cpu", version="0.0.0", num_parameters=1_000_000_000,
        )  # fmt: skip
        self.lifecycle: Any = None
        self.adapters: Any = None
        self.residence: Any = None
        self.embedder: Any = None
        self.scorer: Any = None
        self.classifier: Any = None
        self.page_events: Any = None
        self.refusal: str | None = None
        self.requests: list[EngineRequest] = []
        self.live: dict[str, EngineRequest] = {}
        self.aborted: list[str] = []
        self.steps = 0
        self._abort_asked: set[str] = set()
        self._failing: dict[str, str] = {}
        self._pages: dict[str, int] = {}
        self.failure: BaseException | None = None
        self.fail_next: str | None = None
        self.drafts = 0, 0  # accepted and rejected of each request

    # -- EngineClient ------------------------------------------------------------------------------------------------

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        if not self.healthy:
            raise RequestError(ErrorKind.UNAVAILABLE, "The engine has stopped.")
        if len(self.live) >= self._max_live:
            raise RequestError(ErrorKind.RESOURCE_EXHAUSTED, "The queue is full; try again.", retry_after_s=1.0)
        assert request.request_id not in self.live, "ids are unique among live requests"
        assert request.params.n == 1 and request.params.max_tokens is not None
        self.requests.append(request)
        self.live[request.request_id] = request
        self._pages[request.request_id] = -(-len(request.prompt_token_ids) // PAGE_SIZE)
        fail, self.fail_next = self.fail_next, None
        done = False
        try:
            async for output in self._run(request, fail):
                done = output.finish_reason is not None
                yield output
        finally:
            del self.live[request.request_id], self._pages[request.request_id]
            if not done and self.healthy:
                self.aborted.append(request.request_id)

    async def abort(self, request_id: str) -> bool:
        if request_id not in self.live:
            return False
        self._abort_asked.add(request_id)
        return True

    def info(self) -> EngineInfo:
        return self._info

    def stats(self) -> EngineStats:
        total = self._info.num_pages - 1
        return EngineStats(
            num_running=len(self.live), num_pages_free=total - sum(self._pages.values()), num_pages_total=total,
            prompt_tokens=sum(len(r.prompt_token_ids) for r in self.requests), generation_tokens=self.steps,
            num_steps=self.steps,
        )  # fmt: skip

    @property
    def healthy(self) -> bool:
        return self.failure is None

    # -- what tests do to it -----------------------------------------------------------------------------------------

    def die(self, error: BaseException | None = None) -> None:
        """The engine thread has died: live requests fail with UNAVAILABLE, new ones are refused."""
        self.failure = error or RuntimeError("mock engine died")

    # -- inside ------------------------------------------------------------------------------------------------------

    def _tokens(self, request: EngineRequest) -> list[int]:
        reply = self._reply
        if reply is None:
            return list(request.prompt_token_ids)
        if callable(reply):
            return list(reply(request))
        return list(reply.encode("utf-8")) if isinstance(reply, str) else list(reply)

    async def _run(self, request: EngineRequest, fail: str | None) -> AsyncGenerator[EngineOutput, None]:
        params, start = request.params, time.monotonic()
        eos = request.eos_token_ids[0] if request.eos_token_ids else EOS
        reply = [*self._tokens(request), eos]
        position, count, first_token = 0, 0, 0.0
        pending: list[int] = []
        first = True
        assert params.max_tokens is not None
        while True:
            await asyncio.sleep(self.step_s)
            now = time.monotonic()
            finish: FinishReason | None = None
            stop_reason, error = None, None
            if not self.healthy:
                raise RequestError(ErrorKind.UNAVAILABLE, "The engine has stopped.")
            late = request.deadline is not None and now > request.deadline
            late |= not count and request.ttft_deadline is not None and now > request.ttft_deadline
            if request.request_id in self._abort_asked:
                self._abort_asked.discard(request.request_id)
                self.aborted.append(request.request_id)
                finish = FinishReason.ABORT
            elif late:
                finish = FinishReason.DEADLINE
            elif fail is not None and count == 2:
                finish, error = FinishReason.ERROR, fail
            else:
                try:
                    token = self._next(request, reply, position)
                except TooComplexError as too_complex:
                    finish, error = FinishReason.REFUSED, str(too_complex)
                    yield EngineOutput(request.request_id, finish_reason=finish, error=error)
                    return
                position += 1
                if token == eos and (params.ignore_eos or count < params.min_tokens):
                    position = 0
                    if params.ignore_eos is False or len(reply) > 1:
                        token = self._next(request, reply, position)
                        position = 1
                pending.append(token)
                count += 1
                self.steps += 1
                self._pages[request.request_id] = -(-(len(request.prompt_token_ids) + count) // PAGE_SIZE)
                first_token = first_token or now
                if count >= params.min_tokens and token in params.stop_token_ids:
                    finish, stop_reason = FinishReason.STOP, token
                elif count >= params.min_tokens and token in request.eos_token_ids and not params.ignore_eos:
                    finish = FinishReason.STOP
                elif count >= params.max_tokens:
                    finish = FinishReason.LENGTH
            if finish is None and len(pending) < self._tokens_per_output:
                continue
            ids, pending = tuple(pending), []
            yield EngineOutput(
                request_id=request.request_id,
                token_ids=ids,
                logprobs=None if params.logprobs is None else tuple(_logprobs(t, params.logprobs) for t in ids),
                prompt_logprobs=self._prompt_logprobs(request) if first else None,
                finish_reason=finish,
                stop_reason=stop_reason,
                error=error,
                num_prompt_tokens=len(request.prompt_token_ids),
                num_cached_tokens=0,
                times=RequestTimes(request.arrival_time, start, first_token, time.monotonic() if finish else 0.0),
                accepted_drafts=self.drafts[0] if finish else 0,
                rejected_drafts=self.drafts[1] if finish else 0,
            )
            first = False
            if finish is not None:
                return

    def _next(self, request: EngineRequest, reply: list[int], position: int) -> int:
        if request.constraint is None:
            return reply[position % len(reply)]
        mask = np.zeros(-(-VOCAB // 32), np.int32)
        request.constraint.fill_mask(mask)
        allowed = [t for t in range(VOCAB) if (int(mask[t // 32]) >> (t % 32)) & 1]
        ends = [t for t in allowed if t in request.eos_token_ids]
        token = (ends or allowed)[0]
        if not ends:
            request.constraint.accept(token)
        return token

    def _prompt_logprobs(self, request: EngineRequest) -> tuple[TokenLogprobs | None, ...] | None:
        k = request.params.prompt_logprobs
        if k is None:
            return None
        return (None, *(_logprobs(token, k) for token in request.prompt_token_ids[1:]))


class EmbeddingEngine(MockEngine):
    """Embeds a sequence as its first ids, at length 1. `embedded` has what it read."""

    def __init__(self, reply: Any = None, **options: Any) -> None:
        super().__init__(reply, **options)
        self.embedder = self
        self.embedded: list[tuple[int, ...]] = []
        self.poolings: list[str | None] = []
        self.embedded_media: list[Any] = []

    async def embed(
        self, request_id: str, token_ids: Sequence[int], *, pooling: str | None = None, priority: int = 0, media: Any = None,
        cache_salt: str | None = None,
    ) -> np.ndarray:  # fmt: skip
        if self.fail_next:
            raise RequestError(ErrorKind.RESOURCE_EXHAUSTED, self.fail_next)
        self.embedded.append(tuple(token_ids))
        self.embedded_media.append(media)
        self.poolings.append(pooling)
        vector = np.asarray([*token_ids, 0, 0, 0, 0][:4], np.float32)
        return vector / max(float(np.linalg.norm(vector)), 1e-9)


class ScoringEngine(MockEngine):
    """Reads pairs of texts alone, and scores each by the share of the second's tokens that the first has too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._info = dataclasses.replace(self._info, tasks=("score",))
        self.scorer = self
        self.scored: list[TokenPair] = []

    async def score(self, request_id: str, pairs: Sequence[TokenPair], *, priority: int = 0) -> np.ndarray:
        self.scored.extend(pairs)
        scores = []
        for pair in pairs:
            sides: tuple[list[int], list[int]] = ([], [])
            for token, segment in zip(pair.token_ids, pair.segment_ids, strict=True):
                sides[segment].append(token)
            scores.append(sum(token in sides[0] for token in sides[1]) / max(len(sides[1]), 1))
        return np.asarray(scores, np.float32)


class ClassifyingEngine(MockEngine):
    """Tells whether a text has more even or more odd tokens. `classified` has what it read."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._info = dataclasses.replace(self._info, tasks=("classify",), labels=("even", "odd"))
        self.classifier = self
        self.classified: list[tuple[int, ...]] = []

    async def classify(
        self, request_id: str, token_ids: Sequence[int], *, raw: bool = False, priority: int = 0
    ) -> np.ndarray:
        self.classified.append(tuple(token_ids))
        odd = sum(token % 2 for token in token_ids)
        counts = np.asarray([len(token_ids) - odd, odd], np.float32)
        return counts if raw else counts / counts.sum()


def _logprobs(token: int, k: int) -> TokenLogprobs:
    """The token itself is the likeliest, its neighbours follow."""
    return TokenLogprobs(token, -0.5, 1, tuple(((token + i) % VOCAB, -0.5 - i) for i in range(k)))


async def until(condition: Callable[[], Any], what: str = "the condition", seconds: float = 60.0) -> None:
    """Waits for something that another task brings about; fails after so many seconds, and a hundred looks."""
    end, looks = time.monotonic() + seconds, 0
    while not condition():
        looks += 1
        if looks > 100 and time.monotonic() > end:
            raise AssertionError(f"never came true: {what}")
        await asyncio.sleep(0.002)


def mock_service(
    engine: MockEngine | None = None, tokenizer: Any = None, template: Any = None, **kwargs: Any
) -> TextService:
    """A `TextService` over a mock engine, with the byte tokenizer and the mock chat template unless others are given."""
    kwargs.setdefault("model_id", "mock")
    tokenizer, template = tokenizer or MockTokenizer(), template or MockTemplate()
    return TextService(engine or MockEngine(), tokenizer, template, **kwargs)
