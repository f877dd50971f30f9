"""What a scheduler is started with, and what it counts."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Self

from serving.engine.api.speculative import SpeculativeConfig
from serving.engine.requests.buckets import Bucket, BucketTable
from serving.engine.requests.cache_specs import CacheSpec, PagedSpec, RecurrentSpec
from serving.engine.requests.request import Request


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Sizes the scheduler keeps to; where there are several replicas, each one's.

    Attributes:
        max_num_seqs: slots.
        max_num_batched_tokens: tokens a step may compute, decode and chunks together.
        max_chunk_tokens: capacity of the chunk part, alignment included.
        max_chunk_rows: prompts that may have a piece in one step.
        max_model_len: tokens a sequence may have.
        policy: see policy.KEYS.
        num_scheduler_steps: decode steps in one dispatch while nothing waits; None: several where nobody looks at any running
            request before it has ended, see scheduling/lengths.py.
        prefix_first: among waiting requests of equal priority, try those with the longest cached prefix first.
        fair_share: serve the least-served tenant first, within equal priority.
        host_pages: capacity of the host tier; 0 for none.
        restore_page_s: seconds that a page takes back from the host tier; 0.0 if unknown.
        caches: what each group of layers keeps: any number of paged groups, at most one recurrent.
        num_snapshots: states that may be kept for prefixes, where there is a recurrent group.
        max_waiting_time, max_running_time: seconds after which a request that waits for its first slot, or has had one,
            is ended.
        replicas: how many replicas of the model there are to place requests in.
        buckets: what steps are padded to: the chunk part is cut so that it fills one. None: steps of any size cost the same
            a token.
        adapter_slots: adapters that may be on the devices at once.
        speculative_config: how drafts are made; None for none.
        has_head: whether a head guesses, or may besides what is looked up.
        media_rows: embeddings of images that there is room for; 0 where none are read.
        step_seconds: what steps without chunks were measured to take, by bucket; for choosing how many drafts to verify.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_chunk_tokens: int
    max_chunk_rows: int
    max_model_len: int
    page_size: int
    num_pages: int
    policy: str = "fcfs"
    enable_prefix_caching: bool = True
    seed: int = 0
    num_scheduler_steps: int | None = None
    prefix_first: bool = False
    fair_share: bool = False
    host_pages: int = 0
    restore_page_s: float = 0.0
    caches: tuple[CacheSpec, ...] = (PagedSpec(),)
    num_snapshots: int = 0
    max_waiting_time: float | None = None
    max_running_time: float | None = None
    replicas: int = 1
    buckets: BucketTable | None = None
    adapter_slots: int = 0
    speculative_config: SpeculativeConfig | None = None
    has_head: bool = False
    step_seconds: tuple[tuple[Bucket, float], ...] = ()
    media_rows: int = 0

    @classmethod
    def of(cls, *sources: object, **given: Any) -> Self:
        """One made from what an engine is configured with and its sizes: what they have under the same name is taken from
        there, from the last one that has it; the rest is given."""
        names = {field.name for field in dataclasses.fields(cls)}
        shared = {name: value for source in sources for name, value in vars(source).items() if name in names}
        return cls(**(shared | given))

    def __post_init__(self) -> None:
        """Raises ValueError for more than one recurrent group: all layers that keep a state are one."""
        if sum(isinstance(spec, RecurrentSpec) for spec in self.caches) > 1:
            raise ValueError(f"caches holds several recurrent groups, at most one is possible: {self.caches}.")

    @functools.cached_property
    def windows(self) -> tuple[int | None, ...]:
        """Of each paged group, which has page tables of its own, how many positions back a token attends; None for all."""
        return tuple(spec.window for spec in self.caches if isinstance(spec, PagedSpec))

    @functools.cached_property
    def recurrent(self) -> RecurrentSpec | None:
        """The group that keeps states, if there is one."""
        return next((spec for spec in self.caches if isinstance(spec, RecurrentSpec)), None)


@dataclasses.dataclass(slots=True)
class Counters:
    """Totals since start."""

    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    nonfinite: int = 0  # requests that NaN or infinite logits ended
    drafts: int = 0  # rows of steps that had drafts
    draft_tokens: int = 0  # drafts that were verified
    accepted_tokens: int = 0  # of them, those that were the model's own tokens
    accepted_per_pos: list[int] = dataclasses.field(default_factory=list[int])  # the same by place in their row

    def count_drafts(self, request: Request, drafts: int, accepted: int) -> None:
        """A row had so many drafts, of which so many were accepted."""
        self.drafts += 1
        self.draft_tokens += drafts
        self.accepted_tokens += accepted
        self.accepted_per_pos += [0] * (drafts - len(self.accepted_per_pos))
        for place in range(accepted):
            self.accepted_per_pos[place] += 1
        if request.acceptance is None:
            request.acceptance = []
        request.acceptance.append((drafts, accepted))
