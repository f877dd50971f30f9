"""Which waiting requests are tried, and what each needs to be let in: a replica with a slot, room in the step, and pages."""

from __future__ import annotations

import dataclasses

from serving.engine.cache.replicas import Replicas
from serving.engine.requests.chunks import ChunkBuilder
from serving.engine.requests.request import Request, RequestState
from serving.engine.requests.scheduler_config import Counters, SchedulerConfig
from serving.engine.requests.slots import SlotTable
from serving.engine.scheduling.deadlines import Deadlines
from serving.engine.scheduling.policy import LOOKAHEAD, FairShare, WaitingQueue, longest_prefix_first


@dataclasses.dataclass(frozen=True)
class Admission:
    """Reads a scheduler's parts; changes pages, and a request that it lets in."""

    config: SchedulerConfig
    requests: dict[str, Request]
    waiting: WaitingQueue
    slots: SlotTable
    kv: Replicas
    deadlines: Deadlines
    fair: FairShare | None
    counters: Counters

    def candidates(self, only: frozenset[str] | None) -> list[Request]:
        """Waiting requests in the order to try them; of those in `only`, where that is not None."""
        if only is not None:
            found = (self.requests.get(i) for i in sorted(only))
            return [r for r in found if r is not None and r.state in (RequestState.WAITING, RequestState.PREEMPTED)]
        head = self.waiting.head(LOOKAHEAD)
        if not self.config.prefix_first or len(head) < 2:
            return head
        return longest_prefix_first(head, self.waiting.key, self.kv.cached_pages)

    def open_replicas(self, request: Request, builders: list[ChunkBuilder], background: bool) -> list[int]:
        """Replicas that have a slot and room in the step for the request, the best one first."""

        def is_open(replica: int) -> bool:
            return builders[replica].has_room(background) and self.slots.free_in(replica) > 0

        return self.kv.best(request, self.slots.taken, is_open)

    def take_pages(self, request: Request, replicas: list[int]) -> bool:
        """Pages in the first of the replicas that has them; the request is of that one then."""
        # Growth room: without it an admission would be paid for by preempting somebody a few steps later.
        for replica in replicas:
            request.replica = replica
            reserve = min(self.slots.taken(replica) * len(self.config.windows), self.config.num_pages // 32)
            if self.kv.admit(request, reserve):
                return True
        return False

    def count_first(self, request: Request, now: float) -> None:
        """Keeps count of a request's first admission."""
        request.scheduled_time = now
        request.num_cached_tokens = request.num_computed
        self.deadlines.started(request, now)
        self.counters.prefix_queries += request.prompt_len
        self.counters.prefix_hits += request.num_cached_tokens
        self.counters.prompt_tokens += request.prompt_len
        if self.fair is not None:
            self.fair.charge(request.spec.tenant, prompt_tokens=request.prompt_len - request.num_cached_tokens)
