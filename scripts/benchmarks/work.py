"""What is run: the standard prompts, and traces."""

from __future__ import annotations

import itertools
import random

from serving.simulator.trace import MIXED_OUTPUT, MIXED_PROMPT, TraceRequest, poisson


def standard_prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    """The standard workload's token ids: every engine that is compared gets these."""
    rng = random.Random(seed)
    return [[rng.randrange(100, 40000) for _ in range(length)] for _ in range(count)]


def uniform(count: int, prompt_tokens: int, output_tokens: int) -> list[TraceRequest]:
    """Equal requests, all at once."""
    return [TraceRequest(0.0, prompt_tokens, output_tokens) for _ in range(count)]


def mixed(count: int, rate: float, seed: int = 0) -> list[TraceRequest]:
    """Log-normal lengths, 16 to 512 in and 8 to 256 out, arriving by Poisson."""
    return list(itertools.islice(poisson(rate, MIXED_PROMPT, MIXED_OUTPUT, seed), count))
