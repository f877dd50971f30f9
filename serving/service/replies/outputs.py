"""What comes back: text deltas for streams, and whole results in vLLM's shape."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.engine.api.types import FinishReason, RequestTimes, TransferParams
from serving.text.tools import Event

if TYPE_CHECKING:
    from serving.service.requests.prepare import PreparedRequest


_NOT_REACHED = RequestTimes()


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its text and log probability (natural log, before temperature and filters).

    Attributes:
        token: its text alone; U+FFFD stands for bytes that are not a whole character.
        bytes: its exact bytes; joined over tokens they are the text.
        rank: 1 for the likeliest token of the vocabulary.
        top: the likeliest tokens at this position, likeliest first, as many as were asked for.
        start: of a completion's token: characters of its text that come before the token's. Tokens of one character start where
            that does or behind it, and a stop string that was left out counts here.
    """

    token_id: int
    token: str
    bytes: bytes
    logprob: float
    rank: int
    top: tuple[TokenLogprob, ...] = ()
    start: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class TextOutput:
    """What is new about one completion since its last output. The last one has `finish_reason`.

    Attributes:
        index: which of the `n` completions.
        text: new text. It may lag behind `token_ids`: half a character, or what may be the start of a stop string,
            is held back until it is decided. Text behind a stop string never appears.
        token_ids: new token ids, in order; the one that ended the completion included.
        logprobs: one entry a token in `token_ids` where asked for, else None.
        prompt_logprobs: in the first output of index 0 only, where asked for: None for the first prompt token.
        finish_reason: STOP, LENGTH or ABORT, on the last output. Failures raise instead.
        stop_reason: the stop string or stop token id that ended it; None for end-of-sequence.
        num_prompt_tokens, num_cached_tokens: of the prompt, and of them found in the cache.
        num_completion_tokens: of this completion so far.
        times: milestones of this completion.
        events: of a chat whose content, thinking and calls are told apart: what is new, instead of `text`, which stays what
            the model wrote (and comes at once with the last output, where there are stop strings). None elsewhere.
        called: a tool call was seen, in this output or earlier.
        num_reasoning_tokens: of the new tokens, those known by now to be thinking.
        accepted_drafts, rejected_drafts: of the drafts that were verified for it; with the last output.
        transfer: of a request that another engine goes on with: what that one is to be told; with the last output.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0
    times: RequestTimes = _NOT_REACHED
    events: tuple[Event, ...] | None = None
    called: bool = False
    num_reasoning_tokens: int = 0
    accepted_drafts: int = 0
    rejected_drafts: int = 0
    transfer: TransferParams | None = None


@dataclasses.dataclass
class Usage:
    """Token counts over all completions of one request. Feed it every output."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    accepted_drafts: int = 0
    rejected_drafts: int = 0

    def add(self, output: TextOutput) -> None:
        """Takes in one output of any index."""
        self.prompt_tokens = output.num_prompt_tokens
        if output.index == 0:  # its siblings find the prompt that it has just computed
            self.cached_tokens = max(self.cached_tokens, output.num_cached_tokens)
        self.completion_tokens += len(output.token_ids)
        self.reasoning_tokens += output.num_reasoning_tokens
        self.accepted_drafts += output.accepted_drafts
        self.rejected_drafts += output.rejected_drafts

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclasses.dataclass(frozen=True, slots=True)
class Logprob:
    """vLLM's entry in a position's dictionary of token id -> Logprob."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclasses.dataclass
class CompletionOutput:
    """One completion, whole. Names are vLLM's.

    Attributes:
        logprobs: one dictionary a token (token id -> Logprob; the sampled token and the likeliest), or None.
        cumulative_logprob: sum over the sampled tokens, or None.
        finish_reason: "stop", "length" or "abort".
        message: of a chat: the completion as an assistant's message in OpenAI's shape, with `tool_calls` and `reasoning`
            told apart from `content`; ready to be the conversation's next turn. `text` is all that the model wrote.
    """

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    message: dict[str, Any] | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclasses.dataclass
class RequestOutput:
    """A request with all its completions, in order of index. Names are vLLM's."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    outputs: list[CompletionOutput] = dataclasses.field(default_factory=list)
    finished: bool = False
    num_cached_tokens: int = 0
    metrics: RequestTimes = _NOT_REACHED

    @classmethod
    def of(cls, prepared: PreparedRequest) -> RequestOutput:
        """The empty result of a request, to `add` its outputs to."""
        return cls(
            request_id=prepared.request_id,
            prompt=prepared.prompt,
            prompt_token_ids=list(prepared.prompt_token_ids),
            outputs=[CompletionOutput(index=i) for i in range(prepared.params.n)],
        )

    def add(self, output: TextOutput) -> None:
        """Takes in one output of any index."""
        choice = self.outputs[output.index]
        choice.text += output.text
        choice.token_ids.extend(output.token_ids)
        if output.logprobs is not None:
            choice.logprobs = (choice.logprobs or []) + [_position(entry) for entry in output.logprobs]
            choice.cumulative_logprob = (choice.cumulative_logprob or 0.0) + sum(e.logprob for e in output.logprobs)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = [entry and _position(entry) for entry in output.prompt_logprobs]
        if output.index == 0:
            self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        if output.finish_reason is not None:
            choice.finish_reason = output.finish_reason.value
            choice.stop_reason = output.stop_reason
            self.metrics = output.times
            self.finished = all(c.finished for c in self.outputs)


def _position(entry: TokenLogprob) -> dict[int, Logprob]:
    """The sampled token first, as vLLM has it, then the likeliest ones."""
    return {e.token_id: Logprob(e.logprob, e.rank, e.token) for e in (entry, *entry.top)}


@dataclasses.dataclass(frozen=True)
class Embedding:
    """A prompt as a vector.

    Attributes:
        vector: float32 [embed], of length 1.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    vector: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scores:
    """Relevance of pairs of texts.

    Attributes:
        values: one a pair.
        prompt_tokens: tokens that were read for them.
    """

    values: tuple[float, ...]
    prompt_tokens: int


@dataclasses.dataclass(frozen=True)
class Classification:
    """What one text is.

    Attributes:
        prompt_token_ids: what was read.
        values: one number a label, in the order of `EngineInfo.labels`.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    values: tuple[float, ...]


@dataclasses.dataclass
class ClassificationOutput:
    """vLLM's shape: `out.outputs.probs`."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        return len(self.probs)


@dataclasses.dataclass
class ClassificationRequestOutput:
    """A prompt with what it is. Names are vLLM's."""

    request_id: str
    outputs: ClassificationOutput
    prompt_token_ids: list[int]
    finished: bool = True


@dataclasses.dataclass
class EmbeddingOutput:
    """vLLM's shape: `out.outputs.embedding`."""

    embedding: list[float]


@dataclasses.dataclass
class EmbeddingRequestOutput:
    """A prompt with its embedding. Names are vLLM's."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True


async def collect(prepared: PreparedRequest, stream: AsyncIterator[TextOutput]) -> RequestOutput:
    """Reads a stream to its end.

    Raises:
        RequestError: as the stream does.
    """
    result = RequestOutput.of(prepared)
    async for output in stream:
        result.add(output)
    return result
