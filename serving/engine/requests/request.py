"""A request inside the engine: its tokens, its pages, and the one machine of its states.

    RECEIVING ─────────────────────────finish─┐
       ^ v                                    v
    WAITING ──admit──> RUNNING ──finish──> FINISHED
       │                │   ^                 ^
       │             preempt└──admit──┐       │
       │                v             │       │
       │             PREEMPTED ───────┴─finish┤
       └───────────────finish─────────────────┘

Positions of a running request (each <= the next):

    0 ... num_computed ...... len(tokens) ...... total_len
    |  KV dispatched  | known, to be computed  | sampled on the device, not read yet |

A step computes positions [num_computed, num_computed + n). When it reaches total_len it also samples, so total_len grows
by one at dispatch, and `len(tokens)` follows when the host has read the token, one step later.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Any

import numpy as np

from serving.engine.api.types import EngineRequest, FinishReason


class RequestState(enum.Enum):
    RECEIVING = enum.auto()  # its first pages are on their way from another engine
    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED = enum.auto()


_ALLOWED: dict[RequestState, set[RequestState]] = {
    RequestState.RECEIVING: {RequestState.WAITING, RequestState.FINISHED},
    RequestState.WAITING: {RequestState.RECEIVING, RequestState.RUNNING, RequestState.FINISHED},
    RequestState.RUNNING: {RequestState.PREEMPTED, RequestState.FINISHED},
    RequestState.PREEMPTED: {RequestState.RUNNING, RequestState.FINISHED},
    RequestState.FINISHED: set(),
}


class Request:
    """Mutable engine-side state of one `EngineRequest`. Owned by the engine thread."""

    __slots__ = (
        "acceptance",
        "adapter_slot",
        "arrival_order",
        "behind",
        "digests",
        "drawn_seed",
        "finish_reason",
        "first_token_time",
        "indexed_pages",
        "inflight",
        "media_held",
        "media_rows",
        "num_cached_tokens",
        "num_computed",
        "num_pending",
        "num_preemptions",
        "pages",
        "passed_over",
        "points",
        "pooled",
        "prompt_len",
        "reach",
        "replica",
        "scheduled_time",
        "slot",
        "snapshots",
        "spec",
        "state",
        "stop_reason",
        "tail_snapshot",
        "tokens",
    )

    def __init__(self, spec: EngineRequest, arrival_order: int) -> None:
        self.spec = spec
        self.arrival_order = arrival_order
        self.state = RequestState.WAITING
        self.tokens: list[int] = list(spec.prompt_token_ids)
        self.prompt_len = len(self.tokens)
        self.num_computed = 0
        self.num_pending = 0
        self.inflight = 0  # dispatched steps that touch its pages and have not retired
        self.pages: list[list[int]] = []  # the page table of each attention group
        self.behind: list[int] = []  # of each, how many of the first pages are out of its window: the null page now
        self.reach = 0  # pages that every group's table has
        self.digests: list[bytes] = []  # prefix-chain digest of each full page so far
        self.indexed_pages = 0  # how many of each table's first pages are registered in the prefix index, or were
        self.points: list[int] = []  # pages behind which others may part from it; see cache.prefixes
        self.snapshots: list[tuple[int, int]] = []  # (pages, row) of snapshots whose digest is not known yet
        self.tail_snapshot: tuple[int, int] | None = None  # (pages, row) of the newest, where a newer one replaces it
        self.replica = 0  # where its pages and its slot are
        self.slot = -1
        self.adapter_slot = 0  # where its adapter's matrices are on the devices; 0 for none
        self.drawn_seed: int | None = None  # kept over preemptions, so that a resumed request samples the same tokens
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.passed_over = 0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | None = None
        self.media_held: dict[int, bytes] = {}  # of its images, those whose embeddings it needs; see cache.media
        self.media_rows: dict[int, np.ndarray] = {}  # of those that it has needed, where their embeddings are
        self.pooled: Any = None  # sum so far, for requests that pool
        self.acceptance: list[tuple[int, int]] | None = (
            None  # of each step with drafts: how many, and how many accepted
        )
        self.scheduled_time = 0.0
        self.first_token_time = 0.0

    @property
    def request_id(self) -> str:
        return self.spec.request_id

    @property
    def total_len(self) -> int:
        """Tokens that exist, read or not."""
        return len(self.tokens) + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        """Positions that exist and whose KV is not dispatched yet."""
        return self.total_len - self.num_computed

    @property
    def num_held(self) -> int:
        """Pages that it holds, in all groups together."""
        return sum(map(len, self.pages)) - sum(self.behind)

    @property
    def num_output(self) -> int:
        """Completion tokens that the host knows."""
        return len(self.tokens) - self.prompt_len

    @property
    def finished(self) -> bool:
        return self.state is RequestState.FINISHED

    @property
    def sort_key(self) -> tuple[int, int]:
        """Priority, then arrival."""
        return (self.spec.priority, self.arrival_order)

    def content(self, first: int, end: int) -> np.ndarray:
        """int32: what stands at its positions from `first` on, for comparing prefixes: tokens, and in an image's places the
        image's content."""
        tokens, media = self.tokens[first:end], self.spec.media
        return np.array(tokens, np.int32) if media is None else media.standing(tokens, first)

    def take_back(self, tokens: int) -> None:
        """A step gave so many tokens less than it was planned to give at most: their positions are computed again."""
        self.num_pending -= tokens
        if self.state is RequestState.RUNNING:
            self.num_computed -= tokens

    def move(self, state: RequestState) -> None:
        """The only way to change state.

        Raises:
            RuntimeError: a transition that the machine does not have.
        """
        if state not in _ALLOWED[self.state]:
            raise RuntimeError(f"request {self.request_id}: {self.state.name} -> {state.name} is not a transition")
        self.state = state

    def finish(self, reason: FinishReason, stop_reason: int | None = None) -> None:
        self.move(RequestState.FINISHED)
        self.finish_reason = reason
        self.stop_reason = stop_reason

    def check_stop(self, max_model_len: int) -> FinishReason | None:
        """Whether the last known token ends the completion; sets `stop_reason` for a stop token id."""
        params = self.spec.params
        token = self.tokens[-1]
        n = len(self.tokens) - self.prompt_len
        if n >= params.min_tokens:
            if not params.ignore_eos and token in self.spec.eos_token_ids:
                return FinishReason.STOP
            if token in params.stop_token_ids:
                self.stop_reason = token
                return FinishReason.STOP
        if params.max_tokens is not None and n >= params.max_tokens:
            return FinishReason.LENGTH
        if len(self.tokens) >= max_model_len:
            return FinishReason.LENGTH
        return None

    def tokens_left(self, max_model_len: int) -> int:
        """How many more tokens may be sampled, those on the device counted as sampled."""
        limit = self.spec.params.max_tokens
        end = max_model_len if limit is None else min(max_model_len, self.prompt_len + limit)
        return end - len(self.tokens) - self.num_pending


def by_replica(requests: Iterable[Request], replicas: int) -> list[int]:
    """How many of the requests are in each replica."""
    counts = [0] * replicas
    for request in requests:
        counts[request.replica] += 1
    return counts
