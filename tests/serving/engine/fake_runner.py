"""A device without a model (`scheduling.pipeline.Device`): the next token is a function of the sequence so far, so that any
mix-up shows in the tokens."""

from __future__ import annotations

import dataclasses

import numpy as np

from serving.engine.requests.buckets import Bucket
from serving.engine.requests.chunks import align
from serving.engine.requests.plan import StepPlan, StepResult
from serving.engine.requests.slots import SlotTable
from serving.engine.scheduling.masks import is_constrained
from serving.engine.scheduling.scheduler import Scheduler

VOCAB = 997


def next_token(tokens: list[int]) -> int:
    """What the fake model continues a sequence with: it looks at the last 8 tokens, and at how many there are."""
    h = 17
    for t in tokens[-8:]:
        h = (h * 31 + t + 1) % 1_000_003
    return (h + len(tokens)) % VOCAB


@dataclasses.dataclass
class Dispatched:
    """A step whose forward part has run; `tokens` are there once it has sampled."""

    plan: StepPlan
    work: list
    bucket: Bucket
    tokens: np.ndarray | None = None

    @property
    def constrained(self):
        return [(row, r) for row, r in enumerate(self.plan.sampled) if is_constrained(r)]


class Residues:
    """A grammar: the i-th token is i modulo 3, and after `count` tokens it is finished."""

    def __init__(self, count: int) -> None:
        self.count, self.seen = count, 0

    def fill_mask(self, mask_W: np.ndarray) -> None:
        """A fake mask, of one word: the residue that the next token must have."""
        mask_W[:] = self.seen % 3

    def accept(self, token: int) -> bool:
        allowed = token % 3 == self.seen % 3
        self.seen += 1
        return allowed

    @property
    def finished(self) -> bool:
        return self.seen >= self.count


class FakeDevice:
    """Keeps KV as (token at position) per page position, written and read through page tables like the real thing.

    A wrong page table, a page that two requests write, or a stale prefix makes it sample another token than `next_token`
    of the true sequence.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        c = scheduler.config
        self.scheduler = scheduler
        self.size = c.page_size
        self.kv = np.full((c.replicas, c.num_pages, c.page_size), -1, np.int64)
        self.least = min((w for w in c.windows if w is not None), default=c.max_model_len)
        self.last_token = np.full(c.replicas * c.max_num_seqs + 1, -1, np.int64)
        self.host: dict[bytes, np.ndarray] = {}

    def dispatch_forward(self, plan: StepPlan, slots: SlotTable) -> Dispatched:
        """Writes, as the first half of a step of the model does."""
        for page, digest in plan.spilled:
            self.host[digest] = self.kv[0, page].copy()
        for page, digest in plan.restored:
            self.kv[0, page] = self.host[digest]
        for digest in plan.dropped:
            del self.host[digest]
        work = []  # (request, its page tables now, its slot now, [(position, token)], whether it samples)
        for request, position in zip(plan.decode, plan.decode_positions, strict=True):
            known = position < len(request.tokens)
            token = request.tokens[position] if known else int(self.last_token[request.slot])
            work.append((request, slots.pages[:, request.slot].copy(), request.slot, [(position, token)], True))
        for chunk in plan.chunks:
            span = range(chunk.start, chunk.start + chunk.length)
            tokens = [(p, chunk.request.tokens[p]) for p in span]
            slot = chunk.request.slot
            work.append((chunk.request, slots.pages[:, slot].copy(), slot, tokens, chunk.samples))
        assert [r.request_id for r, *_, samples in work if samples] == [r.request_id for r in plan.sampled]
        self.write(work)
        return Dispatched(
            plan, work, Bucket(len(plan.decode), sum(align(c.length) for c in plan.chunks), len(plan.chunks))
        )

    def new_mask(self, step: Dispatched) -> np.ndarray:
        return np.full((len(step.plan.sampled), 1), -1, np.int32)

    def dispatch_sample(self, step: Dispatched, mask_SW: np.ndarray | None) -> None:
        """Attends through the page tables that the step was packed with, and samples; several times in a device loop."""
        work = step.work
        assert (mask_SW is not None) == bool(step.constrained)
        tokens = [self.sample_rows(work, mask_SW)]
        for _ in range(step.plan.num_steps - 1):
            work = [
                (request, pages, slot, [(positions[-1][0] + 1, int(self.last_token[slot]))], True)
                for request, pages, slot, positions, _ in work
            ]
            self.write(work)
            tokens.append(self.sample_rows(work, None))
        step.tokens = np.asarray(tokens, np.int32).T

    def write(self, work) -> None:
        for request, tables, _, positions, _ in work:
            for position, token in positions:
                pages = tables[:, position // self.size]
                assert 0 not in pages, "a real token is written to the null page"
                assert len(set(pages)) == len(pages), "a page is in the tables of two groups"
                self.kv[request.replica, pages, position % self.size] = token

    def sample_rows(self, work, mask_SW) -> list[int]:
        """One sampled token for each row that samples. Every chunk attends, whether it samples or not."""
        sampled = []
        for request, tables, slot, positions, samples in work:
            length = positions[-1][0] + 1
            contexts = []
            for window, pages in zip(self.scheduler.config.windows, tables, strict=True):
                context = self.kv[request.replica, pages[: -(-length // self.size)]].reshape(-1)[:length].tolist()
                first = 0 if window is None else max(0, positions[0][0] - window + 1)
                assert 0 not in pages[first // self.size : -(-length // self.size)], "attention reads the null page"
                assert -1 not in context[first:], "attention reads a position that was never written"
                contexts.append(context)
            seen = min(map(len, contexts), default=0)
            assert len({tuple(context[max(0, seen - self.least) :]) for context in contexts}) == 1, "groups disagree"
            if samples:
                token = next_token(contexts[0])
                residue = -1 if mask_SW is None else int(mask_SW[len(sampled), 0])
                sampled.append((slot, token if residue < 0 else token - token % 3 + residue))
        for slot, token in sampled:
            self.last_token[slot] = token
        return [t for _, t in sampled]

    def collect(self, step: Dispatched) -> StepResult:
        assert step.tokens is not None
        return StepResult(step.tokens, np.ones(step.tokens.shape, bool))


def expected(prompt: list[int], count: int, grammar: bool = False) -> list[int]:
    """The first `count` tokens of the true completion, under Residues if `grammar`."""
    tokens = list(prompt)
    for i in range(count):
        token = next_token(tokens)
        tokens.append(token - token % 3 + i % 3 if grammar else token)
    return tokens[len(prompt) :]
