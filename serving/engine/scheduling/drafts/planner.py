"""How many drafts a step verifies: as many as give most tokens a second, by how often guesses are right and what steps take.

Whatever they come from (`Source`), drafts need a request's newest token, which with asynchronous stepping the host has only once
the step before is read. To wait for it costs the device the host's time. So the planner guesses that token too: only if a step
with drafts pays after all of that does it ask for waiting (`awaits`). A batch in which nothing repeats runs as if there were no
drafts.
"""

from __future__ import annotations

from collections.abc import Sequence

from serving.engine.api.speculative import SpeculativeConfig
from serving.engine.cache.replicas import Replicas
from serving.engine.requests.buckets import BucketTable
from serving.engine.requests.plan import Chunk, StepPlan
from serving.engine.requests.request import Request, by_replica
from serving.engine.requests.scheduler_config import Counters, SchedulerConfig
from serving.engine.scheduling.drafts.both import EitherDrafts
from serving.engine.scheduling.drafts.costs import StepCosts
from serving.engine.scheduling.drafts.head import HeadDrafts
from serving.engine.scheduling.drafts.lookups import Lookups
from serving.engine.scheduling.drafts.model import ModelDrafts
from serving.engine.scheduling.drafts.source import NONE, Guess, Guessing, Source

MARGIN = 1.15
"""By so much more tokens a second drafts must promise: what is known of rates and costs is no better than that (16 requests on 2
CPU cores: 0.97 of the tokens a second with a margin of 1.05)."""

DraftRows = tuple[tuple[int, ...], ...]
"""`StepPlan.drafts`."""


class Drafts:
    """Guesses and choices of one scheduler.

    Args:
        config: the scheduler's.
        how: its `speculative_config`.
        kv: has pages for drafts, or not.
        counters: kept up with what is verified.
    """

    def __init__(self, config: SchedulerConfig, how: SpeculativeConfig, kv: Replicas, counters: Counters) -> None:
        self.how = how
        self._kv, self._counters, self._max_len = kv, counters, config.max_model_len
        self._buckets = config.buckets or BucketTable.make(
            config.max_num_seqs,
            config.max_num_batched_tokens,
            draft_tokens=how.draft_tokens,
            draft_places=config.max_num_batched_tokens,
        )
        self.costs = StepCosts(self._buckets, config.step_seconds)
        self._replicas = config.replicas
        self._most_rows = max((b.decode for b in self._buckets.buckets if b.queries > 1), default=0)
        self.source = _source(config, how)
        self._of: dict[str, Guessing] = {}

    @classmethod
    def of(cls, config: SchedulerConfig, kv: Replicas, counters: Counters) -> Drafts | None:
        """None where there are to be none."""
        how = config.speculative_config
        return None if how is None else cls(config, how, kv, counters)

    # ---- a request ----

    def end(self, request: Request) -> None:
        """The request is over."""
        self._of.pop(request.request_id, None)
        self.source.end(request)

    def _guesses(self, request: Request) -> Guessing:
        """The request's, up to date with its tokens."""
        found = self._of.get(request.request_id)
        if found is None:
            found = self._of[request.request_id] = self.source.begin(request)
        else:
            found.follow()
        return found

    # ---- a step ----

    def awaits(self, running: Sequence[Request]) -> bool:
        """Whether the step in flight is to be read before the next one is scheduled, because drafts behind its tokens promise
        more than the wait costs.

        Args:
            running: all requests that have begun.
        """
        decode = [r for r in running if r.slot >= 0 and r.tokens_left(self._max_len) > 0]
        count = self._rows(decode)
        if not 0 < count <= self._most_rows:
            return False
        if any(r.num_uncomputed > 1 for r in decode):
            return False  # a prompt: no drafts beside it
        rows: list[Guess] = []
        certain = False
        for request in decode:
            found = NONE
            if self.source.can_draft(request):
                guesses = self._guesses(request)
                found = guesses.guess(self.how.draft_tokens, request.num_pending)
                certain |= guesses.certain and bool(found[0])
            rows.append(found)
        if not any(tokens for tokens, _ in rows):
            return False
        if not self.how.enable_adaptive_verification:
            return True
        # The first token that is looked up is the one in flight; where it is wrong there are no drafts.
        none = 0.0 if certain else 1.0
        for tokens, likely in rows:
            none *= 1.0 - (likely[0] if tokens else 0.0)
        return self._best(count, [likely for _, likely in rows], waits=1.0 - none) > 1

    def choose(self, decode: Sequence[Request], step: int) -> DraftRows:
        """Of each decode row its drafts; () where no row has any.

        Args:
            decode: all of a step without chunks.
            step: the last one dispatched.
        """
        count, most = self._rows(decode), self.how.draft_tokens
        if not 0 < count <= self._most_rows:
            return ()
        rows: list[Guess] = []
        for request in decode:
            found = NONE
            if request.num_pending == 0 and self.source.can_draft(request):
                found = self._guesses(request).guess(most)
            rows.append(found)
        if not any(tokens for tokens, _ in rows):
            return ()
        if self.how.enable_adaptive_verification:
            most = self._best(count, [likely for _, likely in rows]) - 1
        else:
            most = self._buckets.queries(count)[-1] - 1
        if most < 1:
            return ()
        ready = self.source.ready([r for r, (tokens, _) in zip(decode, rows, strict=True) if tokens], 1 + most)
        drafts: list[tuple[int, ...]] = []
        for request, (tokens, _) in zip(decode, rows, strict=True):
            count = min(most, len(tokens)) if tokens and request.request_id in ready else 0
            drafts.append(tuple(tokens[: self._room(request, count, step)]) if count else ())
        return tuple(drafts) if any(drafts) else ()

    def committed(self, decode: Sequence[Request], chunks: Sequence[Chunk], drafts: DraftRows) -> tuple[Chunk, ...]:
        """See Source.committed."""
        return self.source.committed(decode, chunks, drafts)

    def verified(self, plan: StepPlan, row: int, tokens: int) -> None:
        """A row of a step has given so many tokens."""
        if row < len(plan.drafts) and plan.drafts[row]:
            request, drafts = plan.decode[row], len(plan.drafts[row])
            self._counters.count_drafts(request, drafts, tokens - 1)
            guesses = self._of.get(request.request_id)
            if guesses is not None:
                guesses.verified(drafts, tokens - 1)

    def _room(self, request: Request, drafts: int, step: int) -> int:
        """How many of so many drafts a decode row has tokens and pages for. Nobody is preempted for them."""
        most = min(drafts, request.tokens_left(self._max_len) - 1)
        own = request.num_computed + 1
        return max(0, min(most, self._kv.cover(request, own + most, step) - own))

    def _best(self, rows: int, likely: Sequence[Sequence[float]], waits: float | None = None) -> int:
        """How many places give most tokens a second.

        Args:
            rows: decode rows of the fullest replica.
            likely: of each row, how likely each draft is to be accepted.
            waits: how likely there are drafts at all once the step before was waited for; None where that is done.
        """
        plain = self.costs.seconds(rows, 1)
        best, most = 1, MARGIN * len(likely) / plain
        for places in self._buckets.queries(rows)[1:]:
            seconds = self.costs.seconds(rows, places) + self.costs.host_s  # the step after it has to wait
            if waits is not None:
                seconds = waits * seconds + (1 - waits) * plain + self.costs.host_s
            tokens = len(likely) + sum(sum(row[: places - 1]) for row in likely)
            if tokens / seconds > most:
                best, most = places, tokens / seconds
        return best

    def _rows(self, requests: Sequence[Request]) -> int:
        """Decode rows of the replica that has most of them."""
        return len(requests) if self._replicas == 1 else max(by_replica(requests, self._replicas))


def _source(config: SchedulerConfig, how: SpeculativeConfig) -> Source:
    if how.looks_up:
        looked_up = Lookups(how)
        return EitherDrafts(looked_up, HeadDrafts(config, how.draft_tokens)) if config.has_head else looked_up
    return HeadDrafts(config, how.draft_tokens) if how.hears else ModelDrafts(config)
