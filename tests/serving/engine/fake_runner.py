"""A runner without a model: the next token is a function of the sequence so far, so that any mix-up shows in the tokens."""

from __future__ import annotations

import dataclasses

import numpy as np

from serving.engine.plan import StepPlan, StepResult
from serving.engine.scheduler import Scheduler

VOCAB = 997


def next_token(tokens: list[int]) -> int:
    """What the fake model continues a sequence with."""
    h = 17
    for t in tokens[-8:]:
        h = (h * 31 + t + 1) % 1_000_003
    return (h + len(tokens)) % VOCAB


@dataclasses.dataclass
class Dispatched:
    plan: StepPlan
    tokens: np.ndarray


class FakeDevice:
    """Keeps KV as (token at position) per page position, written and read through page tables like the real thing.

    A wrong page table, a page that two requests write, or a stale prefix makes it sample another token than `next_token`
    of the true sequence.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        c = scheduler.config
        self.scheduler = scheduler
        self.size = c.page_size
        self.kv = np.full((c.num_pages, c.page_size), -1, np.int64)
        self.last_token = np.full(c.max_num_seqs + 1, -1, np.int64)
        self.host: dict[bytes, np.ndarray] = {}

    def dispatch(self, plan: StepPlan) -> Dispatched:
        """Writes first, then reads, as one step of the model does."""
        slots = self.scheduler.slots
        for page, digest in plan.spilled:
            self.host[digest] = self.kv[page].copy()
        for page, digest in plan.restored:
            self.kv[page] = self.host[digest]
        for digest in plan.dropped:
            del self.host[digest]
        work = []
        for request, position in zip(plan.decode, plan.decode_positions, strict=True):
            known = position < len(request.tokens)
            token = request.tokens[position] if known else int(self.last_token[request.slot])
            work.append((request, [(position, token)], True))
        for chunk in plan.chunks:
            span = range(chunk.start, chunk.start + chunk.length)
            work.append((chunk.request, [(p, chunk.request.tokens[p]) for p in span], chunk.samples))
        for request, positions, _ in work:
            for position, token in positions:
                page = slots.pages[request.slot, position // self.size]
                assert page != 0, "a real token is written to the null page"
                self.kv[page, position % self.size] = token
        rows = self.sample(work)
        tokens = [rows]
        for _ in range(plan.num_steps - 1):
            work = [(r, [(positions[-1][0] + 1, int(self.last_token[r.slot]))], True) for r, positions, _ in work]
            for request, positions, _ in work:
                page = slots.pages[request.slot, positions[0][0] // self.size]
                assert page != 0
                self.kv[page, positions[0][0] % self.size] = positions[0][1]
            tokens.append(self.sample(work))
        assert [r.request_id for r, _, samples in work if samples] == [r.request_id for r in plan.sampled]
        return Dispatched(plan, np.asarray(tokens if plan.num_steps > 1 else rows, np.int32))

    def sample(self, work) -> list[int]:
        """One sampled token for each row that samples."""
        slots = self.scheduler.slots
        sampled = []
        for request, positions, samples in work:
            if samples:
                length = positions[-1][0] + 1
                pages = slots.pages[request.slot, : -(-length // self.size)]
                context = self.kv[pages].reshape(-1)[:length].tolist()
                assert -1 not in context, "attention reads a position that was never written"
                token = next_token(context)
                sampled.append((request, token))
        for request, token in sampled:
            self.last_token[request.slot] = token
        return [t for _, t in sampled]

    def collect(self, step: Dispatched) -> StepResult:
        return StepResult(step.tokens, np.ones(step.tokens.shape, bool))


def expected(prompt: list[int], count: int) -> list[int]:
    """The first `count` tokens of the true completion."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]
