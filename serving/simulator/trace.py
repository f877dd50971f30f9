"""Traces of requests: their file format (JSON lines), the tokens they stand for, and generators of typical loads."""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

TOKEN_LOW, TOKEN_HIGH = 100, 40_000
"""Token ids are drawn from [TOKEN_LOW, TOKEN_HIGH)."""


@dataclasses.dataclass(frozen=True, slots=True)
class TraceRequest:
    """One line of a trace.

    Attributes:
        arrival: seconds from the trace's start.
        prompt_tokens: length of the prompt, prefix included.
        output_tokens: tokens it generates.
        priority: lower runs first under policy `priority`.
        prefix: (id, tokens) of the segments that the prompt starts with: equal ids are equal tokens. What is behind them
            is the request's own.
        output_id: segment id of its completion, so that a later prompt may contain it (multi-turn); None: nobody's.
        deadline, ttft_deadline: seconds after arrival, or None.
        tenant: whom it is for, where shares are fair.
    """

    arrival: float
    prompt_tokens: int
    output_tokens: int
    priority: int = 0
    prefix: tuple[tuple[int, int], ...] = ()
    output_id: int | None = None
    deadline: float | None = None
    ttft_deadline: float | None = None
    tenant: str | None = None


def write_trace(path: str | pathlib.Path, requests: Iterable[TraceRequest]) -> int:
    """Writes one JSON object a line, leaving out what has its default; the number of lines."""
    count = 0
    defaults = {f.name: f.default for f in dataclasses.fields(TraceRequest)}
    with open(path, "w", encoding="utf-8") as file:
        for request in requests:
            row = {k: v for k, v in dataclasses.asdict(request).items() if v != defaults[k]}
            file.write(json.dumps(row) + "\n")
            count += 1
    return count


def read_trace(path: str | pathlib.Path) -> Iterator[TraceRequest]:
    """Reads a trace, line by line.

    Raises:
        ValueError: naming the line that is not a request, or arrives before the one above it.
    """
    last = -math.inf
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                row["prefix"] = tuple((int(i), int(n)) for i, n in row.get("prefix", ()))
                request = TraceRequest(**row)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number} is not a trace request: {error}") from error
            if request.arrival < last:
                raise ValueError(f"{path}, line {number} arrives at {request.arrival}, before the line above it.")
            if request.prompt_tokens < 1 or request.output_tokens < 1:
                raise ValueError(f"{path}, line {number} needs at least one prompt token and one output token.")
            last = request.arrival
            yield request


@functools.lru_cache(maxsize=65_536)
def segment_tokens(segment: int, length: int) -> tuple[int, ...]:
    """The tokens of a segment; a longer length extends a shorter one."""
    return _draw(segment, length)


def prompt_token_ids(request: TraceRequest, index: int) -> tuple[int, ...]:
    """The prompt's tokens. `index` (its place in the trace) makes its own part unlike any other's."""
    shared = [segment_tokens(segment, length) for segment, length in request.prefix]
    own = request.prompt_tokens - sum(map(len, shared))
    if own > 0:
        shared.append(_draw(-1 - index, own))
    return tuple(itertools.chain.from_iterable(shared))[: request.prompt_tokens]


def _draw(seed: int, length: int) -> tuple[int, ...]:
    # An affine walk and not a Generator: 15 us to set up a bit generator, a million requests.
    start = (seed * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFF
    steps = np.arange(length, dtype=np.uint64) * np.uint64(6364136223846793005)
    mixed = (steps + np.uint64(start)) * np.uint64(0xD6E8FEB86659FD93)
    return tuple(((mixed >> np.uint64(40)) % np.uint64(TOKEN_HIGH - TOKEN_LOW) + np.uint64(TOKEN_LOW)).tolist())


# ---- generators: endless, in order of arrival; take as many as wanted ----


@dataclasses.dataclass(frozen=True)
class Lengths:
    """A log-normal mix of lengths, cut to [low, high].

    `mean` is that of the distribution before it is cut; `sigma` is the standard deviation of the logarithm.
    """

    mean: float
    sigma: float
    low: int
    high: int

    def sampler(self, rng: np.random.Generator) -> Callable[[], int]:
        mu = math.log(self.mean) - self.sigma**2 / 2

        def sample() -> int:
            return int(min(max(round(math.exp(rng.normal(mu, self.sigma))), self.low), self.high))

        return sample


SHAREGPT_PROMPT = Lengths(161, 1.1, 4, 1024)
SHAREGPT_OUTPUT = Lengths(338, 0.9, 4, 1024)
"""Means of the ShareGPT conversations as the vLLM paper gives them (Kwon et al. 2023, figure 11: 161.31 in, 337.99 out)."""

RAG_QUESTION, RAG_OUTPUT = Lengths(512, 0.2, 64, 1024), Lengths(64, 0.5, 8, 256)
CHAT_MESSAGE, CHAT_OUTPUT = Lengths(60, 0.8, 4, 512), Lengths(120, 0.7, 8, 512)
AGENT_RESULT, AGENT_CALL = Lengths(120, 0.8, 8, 600), Lengths(40, 0.6, 8, 160)
MIXED_PROMPT, MIXED_OUTPUT = Lengths(128, 0.9, 16, 512), Lengths(64, 0.9, 8, 256)
"""Chosen, not taken from a data set; the mixed lengths are those of the benchmark against static batching."""


def poisson(
    rate: float, prompt: Lengths, output: Lengths, seed: int = 0, **same: int | float | None
) -> Iterator[TraceRequest]:
    """Independent requests at `rate` a second. `same` sets further fields of every request."""
    rng = np.random.default_rng(seed)
    prompt_of, output_of = prompt.sampler(rng), output.sampler(rng)
    now = 0.0
    while True:
        now += rng.exponential(1 / rate)
        yield TraceRequest(now, prompt_of(), output_of(), **same)  # pyright: ignore[reportArgumentType]


def sharegpt(rate: float, seed: int = 0) -> Iterator[TraceRequest]:
    """Single turns with ShareGPT's lengths."""
    return poisson(rate, SHAREGPT_PROMPT, SHAREGPT_OUTPUT, seed)


def rag(
    rate: float,
    seed: int = 0,
    *,
    documents: int = 200,
    system_tokens: int = 128,
    document_tokens: int = 384,
    question: Lengths = RAG_QUESTION,
    output: Lengths = RAG_OUTPUT,
) -> Iterator[TraceRequest]:
    """A system prompt, one of many documents (Zipf popularity), then the request's own text: half of it shared."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, documents + 1)
    shares = np.cumsum(weights / weights.sum())
    question_of, output_of = question.sampler(rng), output.sampler(rng)
    now = 0.0
    while True:
        now += rng.exponential(1 / rate)
        document = 1 + int(np.searchsorted(shares, rng.random()))
        prefix = ((0, system_tokens), (document, document_tokens))
        yield TraceRequest(now, system_tokens + document_tokens + question_of(), output_of(), prefix=prefix)


def multi_turn(
    rate: float,
    seed: int = 0,
    *,
    turns: float = 4,
    think_s: float = 20.0,
    max_tokens: int = 4096,
    message: Lengths = CHAT_MESSAGE,
    output: Lengths = CHAT_OUTPUT,
    systems: int = 0,
    system_tokens: int = 0,
) -> Iterator[TraceRequest]:
    """Conversations: each prompt is the whole history, earlier completions included, plus a new message. With `systems`, each
    begins with one of so many system prompts of `system_tokens`, some far more often than others (Zipf).

    `rate` conversations start a second; each has a geometric number of turns with mean `turns`, and ends before a prompt
    and its completion would pass `max_tokens`. `think_s` is the mean time from one message to the next.
    """
    rng = np.random.default_rng(seed)
    message_of, output_of = message.sampler(rng), output.sampler(rng)
    segments = itertools.count(1 + systems)
    shares = np.cumsum(1 / np.arange(1, systems + 1))
    starts = 0.0
    pending: list[tuple[float, int, tuple[tuple[int, int], ...]]] = []  # (arrival, tie-break, history)
    ties = itertools.count()
    while True:
        starts += rng.exponential(1 / rate)
        history = ()
        if systems:
            history = ((1 + int(np.searchsorted(shares, rng.random() * shares[-1])), system_tokens),)
        heapq.heappush(pending, (starts, next(ties), history))
        while pending[0][0] <= starts:  # later conversations start after this
            arrival, _, history = heapq.heappop(pending)
            said, answered = message_of(), output_of()
            length = sum(n for _, n in history) + said
            if length + answered <= max_tokens:
                mine, answer = next(segments), next(segments)
                prefix = (*history, (mine, said))
                yield TraceRequest(arrival, length, answered, prefix=prefix, output_id=answer)
                if rng.random() > 1 / turns:
                    later = arrival + rng.exponential(think_s)
                    heapq.heappush(pending, (later, next(ties), (*prefix, (answer, answered))))
            if not pending:
                break


def overload(
    rate: float,
    seed: int = 0,
    *,
    urgent_share: float = 0.2,
    prompt: Lengths = MIXED_PROMPT,
    output: Lengths = MIXED_OUTPUT,
) -> Iterator[TraceRequest]:
    """Two classes under one load: `urgent_share` of the requests with priority 0, the others with priority 1."""
    rng = np.random.default_rng(seed)
    for request in poisson(rate, prompt, output, seed + 1):
        yield dataclasses.replace(request, priority=int(rng.random() >= urgent_share))


def crowd(rate: float, seed: int = 0, *, heavy_share: float = 0.9) -> Iterator[TraceRequest]:
    """Two tenants: "heavy" sends `heavy_share` of the requests, "light" the others."""
    rng = np.random.default_rng(seed)
    for request in poisson(rate, MIXED_PROMPT, MIXED_OUTPUT, seed + 1):
        yield dataclasses.replace(request, tenant="heavy" if rng.random() < heavy_share else "light")


GENERATORS: dict[str, Callable[[float, int], Iterator[TraceRequest]]] = {
    "sharegpt": sharegpt,
    "rag": rag,
    "multi-turn": multi_turn,
    "agents": lambda rate, seed: multi_turn(
        rate, seed, turns=6, think_s=4.0, systems=8, system_tokens=600, message=AGENT_RESULT, output=AGENT_CALL
    ),
    "overload": overload,
    "crowd": crowd,
    "short": lambda rate, seed: poisson(rate, Lengths(64, 0.5, 4, 512), Lengths(32, 0.5, 2, 256), seed),
    "labels": lambda rate, seed: poisson(rate, Lengths(64, 0.5, 4, 512), Lengths(4, 0.5, 1, 16), seed),
}
"""What `scripts/simulate.py --trace NAME` knows."""
