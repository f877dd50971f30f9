"""How many drafts are verified: as many as pay, and none where none do."""

from __future__ import annotations

import dataclasses

import pytest

from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.speculative import SpeculativeConfig
from serving.engine.api.types import EngineRequest
from serving.engine.requests.buckets import Bucket, BucketTable
from serving.engine.requests.cache_specs import PagedSpec, RecurrentSpec, StateArray
from serving.engine.requests.scheduler_config import SchedulerConfig
from serving.engine.scheduling.drafts.costs import StepCosts
from serving.engine.scheduling.drafts.planner import Drafts
from serving.engine.scheduling.scheduler import Scheduler
from tests.serving.engine.scheduling.test_ragged import result

TABLE = BucketTable.make(8, 64, draft_tokens=4, draft_places=40)
CHEAP = tuple((b, 0.010 + 0.004 * (b.queries - 1)) for b in TABLE.buckets if not b.chunk)
DEAR = tuple((b, 0.010 * b.queries) for b in TABLE.buckets if not b.chunk)
HOW = SpeculativeConfig("ngram", num_speculative_tokens=4, prompt_lookup_min=2, prompt_lookup_max=4)
REPEATS = [1, 2, 3, 4, 5, 6] * 4


def scheduler(costs=CHEAP, how=HOW, **more) -> Scheduler:
    return Scheduler(
        SchedulerConfig(8, 64, 64, 4, 96, 16, 60, buckets=TABLE, speculative_config=how, step_seconds=costs, **more)
    )


def begin(s: Scheduler, *prompts: list[int], first: int, **params) -> None:
    """The requests' first tokens are out."""
    for i, prompt in enumerate(prompts):
        s.add(EngineRequest(f"r{i}", tuple(prompt), SamplingParams(**{"max_tokens": 40, **params})))
    plan = s.schedule(0.0)
    assert plan is not None and not plan.drafts
    s.retire(plan, result(*[(first,)] * len(prompts)), 0.0)


def confident(s: Scheduler) -> None:
    """As if everything that was ever guessed had been right."""
    for matched in range(30):
        for _ in range(50):
            s.drafts.source.rates.count(matched, True)


def test_buckets_with_drafts():
    assert {b.queries for b in TABLE.buckets} == {1, 3, 5} and not any(b.chunk for b in TABLE.buckets if b.queries > 1)
    assert TABLE.queries(1) == (1, 3, 5) == TABLE.queries(8) and BucketTable.make(8, 64).queries(1) == (1,)
    assert max(b.decode_tokens for b in TABLE.buckets if b.queries > 1) <= 40
    assert TABLE.find(3, 0, 0, 2) == Bucket(4, 0, 0, 3) and TABLE.find(3, 0, 0) == Bucket(4, 0, 0)
    sizes = {b.samples for b in TABLE.buckets if not b.chunk}
    assert sizes == {4, 8, 16, 32, 64}, "steps with drafts share the programs that sample"
    assert {b.queries for b in BucketTable.make(1, 64, draft_tokens=3, draft_places=64).buckets} == {1, 4}


def test_drafts_are_verified_where_they_pay():
    s = scheduler()
    begin(s, REPEATS, first=1)
    confident(s)
    plan = s.schedule(0.0)
    assert plan.drafts == ((2, 3, 4, 5),) and plan.queries == 5
    assert s.awaits(plan), "how far it has come is open"
    s.retire(plan, result((2, 3, 9)), 0.0)
    c = s.counters
    assert (c.drafts, c.draft_tokens, c.accepted_tokens, c.accepted_per_pos) == (1, 4, 2, [1, 1, 0, 0])
    assert s.requests["r0"].acceptance == [(4, 2)]
    assert s.schedule(0.0).drafts == (), "nothing stood before that ends so"


@pytest.mark.parametrize("costs,trusted", [(DEAR, True), (CHEAP, False)])
def test_none_are_where_they_do_not(costs, trusted):
    """A place that costs as much as a step, or guesses of which nobody knows that they are right."""
    s = scheduler(costs)
    begin(s, REPEATS, first=1)
    if trusted:
        confident(s)
    plan = s.schedule(0.0)
    assert plan.drafts == () and not s.awaits(plan)


def test_the_step_in_flight_is_awaited_only_for_drafts_that_pay():
    s = scheduler()
    begin(s, REPEATS, first=1)
    plan = s.schedule(0.0)
    assert not s.awaits(plan)
    confident(s)
    assert s.awaits(plan)
    s.drafts.costs.host_s = 1.0
    assert not s.awaits(plan)
    s.drafts.costs.host_s = 0.001
    s.add(EngineRequest("new", (1, 2), SamplingParams()))
    assert not s.awaits(plan), "a prompt goes first, and drafts with none"


def test_a_request_with_nothing_to_guess_goes_with_the_others():
    s = scheduler(tuple((b, 0.010 + 0.002 * (b.queries - 1)) for b, _ in CHEAP))
    begin(s, REPEATS, list(range(50, 70)), first=1)
    confident(s)
    plan = s.schedule(0.0)
    assert plan.drafts == ((2, 3, 4, 5), ()) and plan.most_tokens(1) == 1
    s.retire(plan, result((2, 3, 4, 5, 6), (90,)), 0.0)
    assert s.requests["r0"].num_output == 6 and s.requests["r1"].num_output == 2


def test_drafts_end_where_the_request_does():
    s = scheduler()
    begin(s, REPEATS, first=1, max_tokens=4)
    confident(s)
    assert s.schedule(0.0).drafts == ((2, 3),)


def test_drafts_take_no_page_from_anybody():
    s = scheduler(how=dataclasses.replace(HOW, enable_adaptive_verification=False))
    begin(s, [*REPEATS, 1, 2, 3, 4, 5], first=6)  # 30 tokens: two pages of 16 have room for two more
    pool = s.kv.managers[0].pool
    taken = pool.allocate(pool.num_free)
    plan = s.schedule(0.0)
    assert plan.drafts == ((1, 2),) and s.counters.preemptions == 0
    pool.release(taken)


def test_a_completion_is_what_others_of_its_tenant_may_repeat():
    s = scheduler(how=SpeculativeConfig("suffix", num_speculative_tokens=4))
    confident(s)

    def answer(name: str, tenant: str) -> int:
        """Drafts that were verified while it wrote 20 tokens that the prompt does not hold."""
        before = s.counters.accepted_tokens
        s.add(EngineRequest(name, (7, 8), SamplingParams(max_tokens=20), tenant=tenant))
        tokens = list(range(30, 50))
        while name in s.requests:
            plan = s.schedule(0.0)
            (guessed,) = plan.drafts or ((),)
            known = s.requests[name].num_output
            right = 0
            while right < len(guessed) and guessed[right] == tokens[known + right]:
                right += 1
            s.retire(plan, result(tuple(tokens[known : known + right + 1])), 0.0)
        return s.counters.accepted_tokens - before

    assert answer("first", "a") == 0
    assert answer("again", "a") > 10
    assert answer("another", "b") == 0


def test_costs_are_kept_up_with():
    costs = StepCosts(TABLE, CHEAP)
    assert costs.seconds(1, 1) == 0.010 and costs.seconds(3, 5) == pytest.approx(0.026)
    for _ in range(100):
        costs.observe(Bucket(1, 0, 0), 0.020)
    assert costs.seconds(1, 1) == pytest.approx(0.020, rel=0.01)
    assert costs.seconds(1, 5) == pytest.approx(0.052, rel=0.01), "longer contexts: what was never tried costs more too"
    costs.observe(Bucket(1, 0, 0, 5), 0.100)
    assert costs.seconds(1, 5) == pytest.approx(0.100)
    for _ in range(500):
        costs.observe(Bucket(1, 0, 0), 0.020)
    assert costs.seconds(1, 5) < 0.060, "what was seen once is not held against it for ever"
    costs.observe(Bucket(1, 0, 0), 5.0)
    assert costs.seconds(1, 1) < 0.030, "a hiccup"
    costs.observe(Bucket(0, 64, 4), 1.0, 0.5)
    assert StepCosts(TABLE).seconds(8, 5) > StepCosts(TABLE).seconds(8, 1) > 0
    assert costs.host_s == 0.001


def test_drafts_are_asked_for():
    """Beside states too; without a configuration there are none."""
    spec = RecurrentSpec((StateArray("s", (2,)),))
    assert isinstance(scheduler(caches=(PagedSpec(), spec), num_snapshots=4).drafts, Drafts)
    assert isinstance(scheduler().drafts, Drafts) and scheduler(how=None).drafts is None
