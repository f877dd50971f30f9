"""What the log of page events tells is what the pools hold, whatever happens to them; late comers are told the whole."""

from __future__ import annotations

import random

import numpy as np
import pytest

from serving.engine.api.page_events import PageBatch, PagesCleared, PagesRemoved, PagesStored
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from serving.engine.cache.page_log import PageLog
from serving.engine.requests.cache_specs import PagedSpec
from serving.engine.requests.plan import StepResult
from serving.engine.scheduling.scheduler import Scheduler, SchedulerConfig


class Follower:
    """Keeps what it was told: (replica, hash) -> tokens, with each page's parent."""

    def __init__(self) -> None:
        self.there: dict[tuple[int, bytes], tuple[bytes, bytes | None]] = {}
        self.last: int | None = None

    def __call__(self, batch: PageBatch) -> None:
        assert batch.snapshot or self.last is None or batch.sequence == self.last + 1, "a gap"
        self.last = batch.sequence
        for event in batch.events:
            if isinstance(event, PagesStored):
                parent, width = event.parent, 4 * event.page_size
                assert len(event.tokens) == width * len(event.hashes)
                for i, one in enumerate(event.hashes):
                    assert event.window is not None or parent is None or (event.replica, parent) in self.there
                    self.there[event.replica, one] = (event.tokens[i * width : (i + 1) * width], parent)
                    parent = one
            elif isinstance(event, PagesRemoved):
                for one in event.hashes:
                    del self.there[event.replica, one]
            else:
                assert isinstance(event, PagesCleared)
                self.there = {key: value for key, value in self.there.items() if key[0] != event.replica}


def held(scheduler: Scheduler) -> dict[tuple[int, bytes], bytes]:
    """What the pools have indexed."""
    return {
        (manager.replica, digest): tokens
        for manager in scheduler.kv.managers
        for digest, tokens in manager.pool._held.values()
    }


@pytest.mark.parametrize(
    "windows,replicas,host_pages", [((None,), 1, 0), ((None,), 2, 0), ((None, 16), 1, 0), ((None,), 1, 12)]
)
def test_what_is_told_is_what_is_there(windows, replicas, host_pages):
    config = SchedulerConfig(
        max_num_seqs=4, max_num_batched_tokens=64, max_model_len=128, page_size=8, num_pages=30,
        max_chunk_tokens=64, max_chunk_rows=4, caches=tuple(map(PagedSpec, windows)), replicas=replicas, host_pages=host_pages,
    )  # fmt: skip
    scheduler, log, rng = Scheduler(config), PageLog(), random.Random(5)
    scheduler.kv.tell(log.add)
    early, late = Follower(), []
    log.follow(early)
    for i in range(60):
        base = rng.randrange(4)
        tokens = [*range(base * 100, base * 100 + rng.randrange(1, 60)), *(rng.randrange(1000) for _ in range(10))]
        salt = rng.choice([None, "s"])
        params = SamplingParams(max_tokens=rng.randrange(1, 8), ignore_eos=True)
        scheduler.add(EngineRequest(str(i), tuple(tokens), params, cache_salt=salt))
        for _ in range(rng.randrange(1, 6)):
            plan = scheduler.schedule()
            if plan is not None:
                rows = len(plan.sampled)
                result = StepResult(np.full((rows, 1), 7, np.int32), np.ones((rows, 1), bool))
                scheduler.retire(plan, result)
        log.tell()
        if i == 40:
            scheduler.kv.forget()
            log.tell()
        if i % 20 == 10:
            late.append(Follower())
            log.follow(late[-1])
        for follower in (early, *late):
            assert {key: tokens for key, (tokens, _) in follower.there.items()} == held(scheduler)
    assert early.there, "something is indexed at the end"


def stored(number: int, parent: int | None = None) -> PagesStored:
    name = number.to_bytes(16, "big")
    return PagesStored((name,), None if parent is None else parent.to_bytes(16, "big"), b"\0" * 32, 8)


def test_who_missed_some_gets_those_or_the_whole():
    log = PageLog(buffer_steps=3)
    for i in range(5):
        log.add(stored(i, i - 1 if i else None))
        log.tell()
    told: list[PageBatch] = []
    log.follow(told.append, after=2)
    assert [batch.sequence for batch in told] == [3, 4] and not told[0].snapshot
    told.clear()
    log.follow(told.append, after=0)  # 1 is not kept any more
    assert [(batch.sequence, batch.snapshot, len(batch.events)) for batch in told] == [(4, True, 6)]
    assert [batch.sequence for batch in log.since(0)] == [2, 3, 4]
    told.clear()
    log.follow(told.append, after=99)  # of another life of the server
    assert told[0].snapshot


def test_a_page_that_came_back_is_told_before_what_follows_it():
    log = PageLog()
    for event in (stored(1), stored(2, 1), PagesRemoved(((1).to_bytes(16, "big"),)), stored(1)):
        log.add(event)
    log.tell()
    follower = Follower()
    log.follow(follower)
    assert len(follower.there) == 2


def test_the_thread_tells_what_was_added_and_one_that_fails_harms_nobody():
    log, told = PageLog(), []

    def fails(batch: PageBatch) -> None:
        if not batch.snapshot:
            raise RuntimeError("as tests do")

    log.follow(fails)
    log.follow(told.append)
    log.start()
    for i in range(100):
        log.add(stored(i))
    log.close()
    assert sum(len(batch.events) for batch in told) == 101
    assert [batch.sequence for batch in told] == list(range(-1, len(told) - 1))


def test_a_pool_without_followers_keeps_no_log():
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=2,
            max_num_batched_tokens=32,
            max_model_len=64,
            page_size=8,
            num_pages=9,
            max_chunk_tokens=32,
            max_chunk_rows=2,
        )
    )
    assert all(manager.teller is None and manager.pool.on_removed is None for manager in scheduler.kv.managers)
