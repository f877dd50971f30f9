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


EMPTY = 17
"""The recurrent state before the first token."""


def accent_of(spec) -> int:
    """What a request's adapter and salt make of every token: pages and states of another one show."""
    return 1000 * sum(map(ord, f"{spec.adapter or ''}/{spec.cache_salt or ''}"[1 if spec.adapter is None else 0 :]))


def next_state(state: int, token: int) -> int:
    """A state that is a digest of every token seen."""
    return (state * 1_000_003 + token + 1) % ((1 << 61) - 1)


def mixed_token(context: list[int] | None, state: int | None) -> int:
    """What a model samples that looks at its last tokens' pages, or at a state of all tokens, or at both."""
    token = 0 if context is None else next_token(context)
    return token if state is None else (token + state) % VOCAB


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
    def first_rows(self) -> list[int]:
        """Of each sampled request its first row in the mask, and the number of all: a row with drafts has one for each place."""
        places = [self.plan.most_tokens(row) if self.plan.drafts else 1 for row in range(len(self.plan.sampled))]
        return [sum(places[:row]) for row in range(len(places) + 1)]

    @property
    def constrained(self):
        rows = zip(self.first_rows, self.plan.sampled, strict=False)
        return [(row, r) for row, r in rows if is_constrained(r)]


class Residues:
    """A grammar: the i-th token is i modulo 3, and after `count` tokens it is finished."""

    def __init__(self, count: int) -> None:
        self.count, self.seen = count, 0

    def fill_mask(self, mask_W: np.ndarray) -> None:
        """A fake mask, of one word: the residue that the next token must have."""
        mask_W[:] = self.seen % 3

    def fill_ahead(self, drafts, mask_QW: np.ndarray) -> None:
        """Masks behind drafts, as far as these are allowed."""
        for place in range(len(drafts) + 1):
            mask_QW[place] = (self.seen + place) % 3
            if place < len(drafts) and (
                drafts[place] % 3 != (self.seen + place) % 3 or self.seen + place >= self.count
            ):
                return

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
        self.host: dict[tuple[int, bytes], np.ndarray] = {}
        self.recurrent = c.recurrent is not None
        self.states = [[(-1, 0)] * c.max_num_seqs for _ in range(c.replicas)]  # (length, state); nothing yet
        self.snapshots = [[(-1, 0)] * c.num_snapshots for _ in range(c.replicas)]

    def dispatch_forward(self, plan: StepPlan, slots: SlotTable) -> Dispatched:
        """Writes, as the first half of a step of the model does."""
        moves = plan.moves
        for replica, page, key in moves.pages_out:
            self.host[replica, key] = self.kv[replica, page].copy()
        for replica, page, key in moves.pages_in:
            self.kv[replica, page] = self.host[replica, key]
        for dropped in moves.pages_dropped:
            del self.host[dropped]
        for replica, slot, _ in moves.states_cleared:
            self.states[replica][slot] = (0, EMPTY)
        for replica, slot, row in moves.states_loaded:
            self.states[replica][slot] = self.snapshots[replica][row]
        work = []  # (request, its page tables now, its slot now, [(position, token)], at how many of their ends it samples)
        drafts = plan.drafts or [()] * len(plan.decode)
        for request, position, guessed in zip(plan.decode, plan.decode_positions, drafts, strict=True):
            known = position < len(request.tokens)
            assert known or not guessed, "drafts stand behind a token that the host knows"
            token = request.tokens[position] if known else int(self.last_token[request.slot])
            tokens = [(position + i, t) for i, t in enumerate((token, *guessed))]
            work.append((request, slots.pages[:, request.slot].copy(), request.slot, tokens, len(tokens)))
        for chunk in plan.chunks:
            span = range(chunk.start, chunk.start + chunk.length)
            tokens = [(p, chunk.request.tokens[p]) for p in span]
            slot = chunk.request.slot
            work.append((chunk.request, slots.pages[:, slot].copy(), slot, tokens, int(chunk.samples)))
        assert [r.request_id for r, *_, samples in work if samples] == [r.request_id for r in plan.sampled]
        self.write(work, tentative=bool(plan.drafts))
        if plan.drafts:  # states are as they were until it is known how many tokens count
            self.save_states(plan)
        return Dispatched(
            plan, work, Bucket(len(plan.decode), sum(align(c.length) for c in plan.chunks), len(plan.chunks))
        )

    def new_mask(self, step: Dispatched) -> np.ndarray:
        return np.full((step.first_rows[-1], 1), -1, np.int32)

    def dispatch_sample(self, step: Dispatched, mask_SW: np.ndarray | None) -> None:
        """Attends through the page tables that the step was packed with, and samples; several times in a device loop."""
        work = step.work
        assert (mask_SW is not None) == bool(step.constrained)
        rows = self.sample_rows(work, mask_SW)
        if step.plan.drafts and self.recurrent:
            for (request, _, slot, positions, _), taken in zip(work, rows, strict=True):
                self.advance(request, slot, positions[: len(taken)])
        for _ in range(step.plan.num_steps - 1):
            work = [
                (request, pages, slot, [(positions[-1][0] + 1, int(self.last_token[slot]))], 1)
                for request, pages, slot, positions, _ in work
            ]
            self.write(work)
            rows = [row + more for row, more in zip(rows, self.sample_rows(work, None), strict=True)]
        if not step.plan.drafts:
            self.save_states(step.plan)
        step.tokens = np.full((len(rows), max(map(len, rows), default=1)), -1, np.int32)
        for row, tokens in enumerate(rows):
            step.tokens[row, : len(tokens)] = tokens

    def guesses(self, step: Dispatched) -> np.ndarray:
        raise NotImplementedError("drafts are the host's here")

    def save_states(self, plan: StepPlan) -> None:
        for replica, slot, row in plan.moves.states_saved:
            self.snapshots[replica][row] = self.states[replica][slot]

    def advance(self, request, slot: int, positions) -> None:
        """Brings a slot's state on."""
        states, own = self.states[request.replica], slot % self.scheduler.config.max_num_seqs
        for position, token in positions:
            length, state = states[own]
            assert length == position, f"the slot's state is that of {length} tokens, position {position} needs others"
            states[own] = (position + 1, next_state(state, token + accent_of(request.spec)))

    def write(self, work, tentative: bool = False) -> None:
        for request, tables, slot, positions, _ in work:
            if self.recurrent and not tentative:
                self.advance(request, slot, positions)
            for position, token in positions:
                pages = tables[:, position // self.size]
                assert 0 not in pages, "a real token is written to the null page"
                assert len(set(pages)) == len(pages), "a page is in the tables of two groups"
                self.kv[request.replica, pages, position % self.size] = token + accent_of(request.spec)

    def sample_rows(self, work, mask_SW) -> list[list[int]]:
        """The tokens of each row that samples: one, and one more for each draft that is what was sampled before it. Every chunk
        attends, whether it samples or not."""
        sampled, first = [], 0
        for request, tables, slot, positions, samples in work:
            found = []
            for place in range(max(samples, 1)):
                end = len(positions) - max(samples, 1) + place + 1
                residue = -1 if mask_SW is None or not samples else int(mask_SW[first + place, 0])
                token = self.sample(request, tables, slot, positions[:end])
                found.append(token if residue < 0 else token - token % 3 + residue)
                if end == len(positions) or positions[end][1] != found[-1]:
                    break
            first += samples
            if samples:
                sampled.append((slot, found))
        for slot, tokens in sampled:
            self.last_token[slot] = tokens[-1]
        return [tokens for _, tokens in sampled]

    def sample(self, request, tables, slot: int, computed: list[tuple[int, int]]) -> int:
        """What the model samples behind the last of these (position, token), from what it finds in the pages."""
        positions = [position for position, _ in computed]
        length = positions[-1] + 1
        contexts = []
        for window, pages in zip(self.scheduler.config.windows, tables, strict=True):
            context = self.kv[request.replica, pages[: -(-length // self.size)]].reshape(-1)[:length].tolist()
            first = 0 if window is None else max(0, positions[0] - window + 1)
            assert 0 not in pages[first // self.size : -(-length // self.size)], "attention reads the null page"
            assert -1 not in context[first:], "attention reads a position that was never written"
            contexts.append(context)
        seen = min(map(len, contexts), default=0)
        assert len({tuple(context[max(0, seen - self.least) :]) for context in contexts}) <= 1, "groups disagree"
        own = slot % self.scheduler.config.max_num_seqs
        reached, state = self.states[request.replica][own] if self.recurrent else (0, None)
        for position, token in computed if self.recurrent else ():
            if position >= reached:
                state = next_state(state, token + accent_of(request.spec))
        return mixed_token(contexts[0] if contexts else None, state)

    def collect(self, step: Dispatched) -> StepResult:
        assert step.tokens is not None
        return StepResult(step.tokens, np.ones(step.tokens.shape, bool))


def expected(
    prompt: list[int], count: int, grammar: bool = False, paged: bool = True, recurrent: bool = False, accent: int = 0
) -> list[int]:
    """The first `count` tokens of the true completion, under Residues if `grammar`, of a model with these kinds of layers."""
    tokens, state = [token + accent for token in prompt], EMPTY
    for token in tokens if recurrent else ():
        state = next_state(state, token)
    for i in range(count):
        if recurrent and i:
            state = next_state(state, tokens[-1])
        token = mixed_token(tokens if paged else None, state if recurrent else None)
        tokens.append((token - token % 3 + i % 3 if grammar else token) + accent)
    return [token - accent for token in tokens[len(prompt) :]]
