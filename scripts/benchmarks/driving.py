"""Sends a trace to something that generates, each request at its time, and notes when tokens come back."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence

from serving.errors import RequestError
from serving.simulator.simulate import Outcome
from serving.simulator.trace import TraceRequest, prompt_token_ids

Send = Callable[[int, TraceRequest, Sequence[int]], AsyncIterator[tuple[int, int]]]
"""(index, request, prompt) -> one (new tokens, cached prompt tokens) a message, until the completion's end."""


async def drive(
    send: Send, trace: Sequence[TraceRequest], prompts: Sequence[Sequence[int]] | None = None
) -> list[Outcome]:
    """Runs a trace open-loop: a request is sent at its arrival, however many are still running.

    Args:
        prompts: token ids in place of those that the trace stands for.
    Returns:
        An outcome a request, in trace order; `arrival` is when it was really sent. A request that failed has the error's
        name and status as its reason; the first one's message goes to stderr.
    """
    prompts = prompts or [prompt_token_ids(r, i) for i, r in enumerate(trace)]
    zero = time.perf_counter()
    failures: list[int] = []

    async def one(index: int) -> Outcome:
        request = trace[index]
        await asyncio.sleep(max(0.0, request.arrival - (time.perf_counter() - zero)))
        sent = time.perf_counter()
        times: list[float] = []
        tokens = cached = 0
        reason = "length"
        try:
            async for new, found in send(index, request, prompts[index]):
                if new:
                    times.append(time.perf_counter())
                tokens += new
                cached = max(cached, found)
        except Exception as error:  # whatever it was, the others go on
            reason = f"{type(error).__name__} {_status(error)}".strip()
            if not failures:
                print(f"request {index} failed: {str(error)[:500]}", file=sys.stderr)
            failures.append(index)
        return _outcome(request, sent - zero, times, tokens, cached, time.perf_counter() - sent, reason, sent)

    return list(await asyncio.gather(*(one(i) for i in range(len(trace)))))


def _status(error: Exception) -> str:
    """What kind of failure it was, so that equal ones are counted together."""
    if isinstance(error, RequestError):
        return error.kind.name
    code = getattr(error, "code", None)  # gRPC's
    return code().name if callable(code) else str(getattr(error, "status", ""))


def _outcome(
    request: TraceRequest,
    arrival: float,
    times: list[float],
    tokens: int,
    cached: int,
    e2e: float,
    reason: str,
    sent: float,
) -> Outcome:
    nan = float("nan")
    gaps = [b - a for a, b in itertools.pairwise(times)]
    return Outcome(
        arrival=arrival,
        priority=request.priority,
        prompt_tokens=request.prompt_tokens,
        cached_tokens=cached,
        output_tokens=tokens,
        ttft=times[0] - sent if times else nan,
        tpot=(times[-1] - times[0]) / (tokens - 1) if tokens > 1 else nan,
        worst_gap=max(gaps, default=nan),
        e2e=e2e,
        reason=reason,
        tenant=request.tenant,
    )


def span(outcomes: Sequence[Outcome]) -> float:
    """Seconds from the first submission to the last token."""
    return max(o.arrival + o.e2e for o in outcomes) - min(o.arrival for o in outcomes)


def throughput(outcomes: Sequence[Outcome]) -> float:
    """Output tokens a second over the whole run."""
    return sum(o.output_tokens for o in outcomes) / span(outcomes)
