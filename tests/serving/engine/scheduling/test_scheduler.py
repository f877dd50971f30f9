"""The scheduler against a fake device that attends through real page tables."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from types import SimpleNamespace

import pytest

from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.speculative import SpeculativeConfig
from serving.engine.api.types import EngineRequest, FinishReason
from serving.engine.cache.kv_windows import pages_of
from serving.engine.requests.buckets import Bucket, BucketTable
from serving.engine.requests.cache_specs import paged
from serving.engine.requests.chunks import align
from serving.engine.requests.request import RequestState
from serving.engine.scheduling.pipeline import StepPipeline
from serving.engine.scheduling.policy import MAX_HURRIED
from serving.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from serving.errors import RequestError
from tests.serving.engine import fake_runner as fake

CONFIG = SchedulerConfig(
    max_num_seqs=4,
    max_num_batched_tokens=64,
    max_chunk_tokens=64,
    max_chunk_rows=4,
    max_model_len=96,
    page_size=8,
    num_pages=40,
)


def request(name: str, prompt: list[int], max_tokens: int = 10, **kw) -> EngineRequest:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **kw.pop("params", {}))
    return EngineRequest(name, tuple(prompt), params, **kw)


class Driver:
    """Runs a scheduler with a fake device as the engine's loop does, one step late or not, checking invariants after every
    step.

    Args:
        token_s: what the scheduler is told that a token of a step takes; None: nothing.
    """

    def __init__(
        self, config: SchedulerConfig = CONFIG, asynchronous: bool = True, token_s: float | None = None
    ) -> None:
        self.scheduler = Scheduler(config)
        self.device = fake.FakeDevice(self.scheduler)
        self.now = 0.0
        self.pipeline = StepPipeline(
            self.scheduler, self.device, self._take, asynchronous=asynchronous,
            clock=lambda: self.now,
        )  # fmt: skip
        self.pipeline.on_read = self._read
        observe = self.scheduler.observe
        self.scheduler.observe = lambda plan, _, *more: (
            None if token_s is None else observe(plan, token_s * plan.num_tokens, *more)
        )
        if self.scheduler.drafts is not None:
            rng = random.Random(5)
            self.scheduler.drafts._guesses = lambda request: Oracle(self, request, rng)
        self.events: Counter[str] = Counter()
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, FinishReason] = {}
        self.errors: dict[str, str | None] = {}
        self.specs: dict[str, EngineRequest] = {}
        self.plans = []

    def add(self, spec: EngineRequest) -> None:
        self.specs[spec.request_id] = spec
        self.tokens[spec.request_id] = []
        self.scheduler.add(spec)

    def abort(self, name: str) -> None:
        output = self.scheduler.abort(name)
        if output:
            self._take([output])

    @property
    def busy(self) -> bool:
        return self.scheduler.has_work or self.pipeline.in_flight is not None

    def step(self, now: float = 0.0) -> bool:
        self.now = now
        plan = self.pipeline.step()
        if plan:
            self.plans.append(plan)
            self.events["restored"] += len(plan.moves.pages_in)
            self.events["several steps"] += plan.num_steps > 1
            self.events["drafts"] += any(plan.drafts)
            self.events["state saved"] += len(plan.moves.states_saved)
            self.events["state loaded"] += len(plan.moves.states_loaded)
        self.check(plan)
        return bool(plan)

    def _read(self, flight, seconds) -> None:
        self.events["surplus"] += sum(r.finished for r in flight.plan.sampled)

    def drain(self, limit: int = 10_000) -> None:
        for _ in range(limit):
            if not self.busy:
                break
            self.step()
        else:
            raise AssertionError("the scheduler does not drain")
        s = self.scheduler
        assert not s.requests and not s.running and not len(s.waiting) and not s.kv.num_leaving
        assert s.pool.num_free == s.pool.num_pages - 1 == s.config.replicas * (s.config.num_pages - 1)
        assert s.slots.num_free == s.config.replicas * s.config.max_num_seqs
        assert s.waiting.num_tokens == 0
        s.pool.check()
        for manager in s.kv.managers:
            if manager.snapshots is not None:
                manager.snapshots.check([])
                assert manager.snapshots.num_free + len(manager.snapshots) == manager.snapshots.num_rows

    def check(self, plan) -> None:
        s, c = self.scheduler, self.scheduler.config
        s.pool.check()
        if plan is None:
            return
        assert plan.num_steps == 1 or not plan.chunks
        for replica in range(c.replicas):
            part = plan.of_replica(replica)
            assert part.num_tokens <= c.max_num_batched_tokens * plan.num_steps
            assert len(part.decode) <= c.max_num_seqs and len(part.chunks) <= c.max_chunk_rows
            assert sum(align(x.length) for x in part.chunks) <= c.max_chunk_tokens
        holders = [r for r in s.running if r.slot >= 0]
        assert all(r.slot // c.max_num_seqs == r.replica for r in holders), "a slot of another replica"
        assert len({r.slot for r in holders}) == len(holders) == c.replicas * c.max_num_seqs - s.slots.num_free
        assert all(r.slot >= 0 or r.tokens_left(c.max_model_len) <= 0 for r in s.running)
        for r in s.running:
            assert r.indexed_pages * c.page_size <= r.num_computed, "a page is indexed before all of it is computed"
        owners: dict[tuple[int, int], list] = {}
        for r in s.running:
            assert min(map(len, r.pages), default=r.reach) == r.reach >= -(-r.num_computed // c.page_size)
            for group, (pages, behind) in enumerate(zip(r.pages, r.behind, strict=True)):
                assert pages[:behind] == [0] * behind and 0 not in pages[behind:]
                assert r.slot < 0 or s.slots.pages[group, r.slot, : len(pages)].tolist() == pages
                for i, page in enumerate(pages[behind:], behind):
                    owners.setdefault((r.replica, page), []).append((r, i, group))
        awaited = [(r.replica, p) for r in s.requests.values() if r not in s.running for row in r.pages for p in row]
        for (replica, page), holders in owners.items():
            kv = s.kv.managers[replica]
            others = awaited.count((replica, page)) + sum(page in pages for _, pages, _ in kv._leaving)
            assert kv.pool.ref_count(page) == len(holders) + others
            if len(holders) > 1:  # shared: read-only for all, so full and computed, and by one group's layers
                assert all((i + 1) * c.page_size <= r.num_computed for r, i, _ in holders)
                assert len({(i, group) for _, i, group in holders}) == 1
        moves = plan.moves
        for written in (moves.pages_in, moves.states_saved, (*moves.states_loaded, *moves.states_cleared)):
            places = [(m.replica, m[1] if written is not moves.states_saved else m.row) for m in written]
            assert len(set(places)) == len(places), "a place is written twice in a step"
        for kv in s.kv.managers:
            if kv.snapshots is not None:
                kv.snapshots.check([r for r in s.requests.values() if r.replica == kv.replica])

    def _take(self, outputs) -> None:
        for o in outputs:
            self.last = o
            assert o.request_id not in self.finished, "an output after the last one"
            self.tokens[o.request_id].extend(o.token_ids)
            if o.finish_reason:
                self.finished[o.request_id] = o.finish_reason
                self.errors[o.request_id] = o.error
                self.events[o.finish_reason.value] += 1
                self.events["grammar"] += self.specs[o.request_id].constraint is not None

    def expected(self, prompt: list[int], count: int, grammar: bool = False, accent: int = 0) -> list[int]:
        """What a sequence alone would be completed with."""
        c = self.scheduler.config
        recurrent = c.recurrent is not None
        return fake.expected(prompt, count, grammar, paged=bool(c.windows), recurrent=recurrent, accent=accent)

    def verify(self) -> None:
        """Every token of every request is what it would have been alone."""
        for name, tokens in self.tokens.items():
            prompt = list(self.specs[name].prompt_token_ids)
            grammar = self.specs[name].constraint is not None
            assert tokens == self.expected(prompt, len(tokens), grammar, fake.accent_of(self.specs[name])), name
            if self.finished[name] is FinishReason.LENGTH:
                room = self.scheduler.config.max_model_len - len(prompt)
                assert len(tokens) == min(self.specs[name].params.max_tokens, room)


class Oracle:
    """Knows what a request's next tokens are, and lies at times."""

    def __init__(self, driver: Driver, request, rng: random.Random) -> None:
        self.driver, self.request, self.rng = driver, request, rng

    certain = False

    def verified(self, drafts: int, accepted: int) -> None:
        assert 0 <= accepted <= drafts

    def guess(self, most: int, skip: int = 0) -> tuple[list[int], list[float]]:
        spec, known = self.request.spec, self.request.num_output + skip
        prompt, accent = list(spec.prompt_token_ids), fake.accent_of(spec)
        true = self.driver.expected(prompt, known + most, spec.constraint is not None, accent)[known:]
        drafts = [(t + 1) % fake.VOCAB if self.rng.random() < 0.2 else t for t in true[: self.rng.randrange(most + 1)]]
        return drafts, [0.8 ** (i + 1) for i in range(len(drafts))]


DRAFTS = SpeculativeConfig("ngram", num_speculative_tokens=5, enable_adaptive_verification=False)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_one_request_runs_to_its_length(asynchronous):
    d = Driver(asynchronous=asynchronous)
    d.add(request("a", [1, 2, 3], 10))
    d.drain()
    d.verify()
    assert d.finished == {"a": FinishReason.LENGTH}


def test_no_surplus_step_after_a_length_that_is_known_beforehand():
    d = Driver()
    d.add(request("a", [1, 2, 3], 5))
    d.drain()
    assert len(d.plans) == 5


def test_end_of_sequence_is_noticed_one_step_late_and_its_surplus_token_dropped():
    prompt = [5, 6, 7]
    stop = fake.expected(prompt, 4)[3]
    d = Driver()
    d.add(EngineRequest("a", tuple(prompt), SamplingParams(temperature=0, max_tokens=50), eos_token_ids=(stop,)))
    d.drain()
    d.verify()
    assert d.tokens["a"][-1] == stop and len(d.tokens["a"]) <= 4
    assert d.finished["a"] is FinishReason.STOP
    assert len(d.plans) == len(d.tokens["a"]) + 1


def test_a_stop_token_id_is_reported():
    prompt = [5, 6, 7]
    stop = fake.expected(prompt, 2)[1]
    s = Driver()
    s.add(request("a", prompt, params={"stop_token_ids": (stop,)}))
    s.drain()
    assert s.last.stop_reason == stop


def test_long_prompt_is_chunked_and_running_streams_get_a_token_every_step():
    d = Driver()
    d.add(request("short", [1, 2], 30))
    for _ in range(3):
        d.step()
    d.add(request("long", list(range(90)), 4))
    before = len(d.plans)
    for _ in range(3):
        d.step()
    for plan in d.plans[before:]:
        assert "short" in [r.request_id for r in plan.decode]
    assert [c.length for p in d.plans[before:] for c in p.chunks if c.request.request_id == "long"] == [63, 27]
    d.drain()
    d.verify()


def test_several_prompts_prefill_in_one_step():
    d = Driver()
    for i in range(4):
        d.add(request(f"r{i}", [i, i + 1, i + 2], 3))
    d.step()
    assert len(d.plans[0].chunks) == 4
    d.drain()
    d.verify()


def test_equal_prefixes_share_pages_while_live_and_after():
    d = Driver()
    prompt = list(range(40))
    d.add(request("a", prompt, 20))
    d.step()
    d.add(request("b", [*prompt, 99], 5))
    d.step()
    a, b = d.scheduler.requests["a"], d.scheduler.requests["b"]
    assert b.pages[0][:5] == a.pages[0][:5] and b.num_cached_tokens == 40
    d.drain()
    d.verify()
    d.add(request("c", [*prompt, *fake.expected(prompt, 20)], 5))  # multi-turn: its own completion is shared too
    d.step()
    assert d.scheduler.requests["c"].num_cached_tokens == 56
    d.drain()
    d.verify()


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token():
    d = Driver()
    prompt = list(range(32))
    d.add(request("a", prompt, 2))
    d.drain()
    d.add(request("b", prompt, 2))
    d.step()
    assert d.scheduler.requests["b"].num_cached_tokens == 24
    d.drain()
    d.verify()


def test_salts_and_adapters_do_not_share():
    d = Driver(dataclasses.replace(CONFIG, adapter_slots=1))
    prompt = list(range(40))
    d.add(request("a", prompt, 2, cache_salt="x"))
    d.drain()
    for name, kw in (("b", {}), ("c", {"cache_salt": "y"}), ("d", {"cache_salt": "x", "adapter": "l"})):
        d.add(request(name, prompt, 2, **kw))
        d.step()
        assert d.scheduler.requests[name].num_cached_tokens == 0
        d.drain()
    d.add(request("e", prompt, 2, cache_salt="x"))
    d.step()
    assert d.scheduler.requests["e"].num_cached_tokens == 32
    d.drain()


def test_preemption_by_recompute_gives_the_same_tokens():
    config = dataclasses.replace(CONFIG, num_pages=14)
    d = Driver(config)
    for i in range(3):
        d.add(request(f"r{i}", [i] * 20, 40))
    d.drain()
    d.verify()
    assert d.scheduler.counters.preemptions > 0


def test_priority_policy_admits_and_preempts_by_priority():
    config = dataclasses.replace(CONFIG, policy="priority", max_num_seqs=1)
    d = Driver(config)
    for name, priority in (("low", 5), ("high", -1), ("middle", 2)):
        d.add(request(name, [1, 2, 3], 3, priority=priority))
    order = []
    while d.scheduler.has_work:
        d.step()
        order += [r.request_id for r in d.plans[-1].admitted if r.request_id not in order]
    assert order == ["high", "middle", "low"]


def test_an_urgent_request_takes_a_slot_and_goes_before_unfinished_prompts():
    config = dataclasses.replace(CONFIG, policy="priority", max_num_seqs=2)
    for asynchronous in (True, False):
        d = Driver(config, asynchronous)
        d.add(request("a", [1] * 20, 60, priority=3))
        d.add(request("b", list(range(90)), 6, priority=5))
        for _ in range(3):
            d.step()
        d.add(request("urgent", [7] * 30, 3, priority=0))
        d.step()
        assert d.plans[-1].chunks[0].request.request_id == "urgent", "the slot is taken and used in the same step"
        assert [c.length for c in d.plans[-1].chunks] == [30], "nothing less urgent makes its step longer"
        assert d.scheduler.requests["b"].state is RequestState.PREEMPTED
        assert d.scheduler.requests["a"].state is RequestState.RUNNING
        d.drain()
        d.verify()


def test_an_urgent_prompt_does_not_wait_for_the_next_tokens_of_others():
    d = Driver(dataclasses.replace(CONFIG, policy="priority", max_num_batched_tokens=16))
    d.add(request("low", [1, 2], 30, priority=5))
    for _ in range(3):
        d.step()
    d.add(request("urgent", list(range(70)), 4, priority=0))
    steps = [([], 16)] * MAX_HURRIED + [(["low"], 15), ([], 7), (["low", "urgent"], 0)]
    for decode, chunk_tokens in steps:
        d.step()
        assert [r.request_id for r in d.plans[-1].decode] == decode
        assert sum(c.length for c in d.plans[-1].chunks) == chunk_tokens
    d.drain()
    d.verify()


def test_background_prompts_keep_steps_short_once_there_are_urgent_ones():
    config = dataclasses.replace(CONFIG, policy="priority")
    d = Driver(config)
    d.add(request("low", list(range(90)), 2, priority=5))
    d.step()
    assert sum(c.length for c in d.plans[-1].chunks) == 64, "as long as there is one class, it has the whole budget"
    d.add(request("urgent", [7], 2, priority=0))
    d.drain()
    d.add(request("low again", [*range(50, 90), *range(50)], 2, priority=5, arrival_time=10.0))
    d.step()
    assert sum(c.length for c in d.plans[-1].chunks) == 64 // 4
    d.drain()
    d.add(request("much later", [*range(90, 50, -1), *range(50)], 2, priority=5, arrival_time=100.0))
    d.step()
    assert sum(c.length for c in d.plans[-1].chunks) == 64
    d.drain()
    d.verify()


def test_chunks_are_cut_to_fill_a_bucket():
    table = BucketTable.make(4, 256)
    assert [b.chunk for b in table.buckets if b.decode and b.chunk] == [64, 256]
    config = dataclasses.replace(
        CONFIG, max_num_batched_tokens=256, max_chunk_tokens=256, max_model_len=256, num_pages=200, buckets=table
    )
    d = Driver(config)
    d.add(request("a", list(range(70)), 8))
    d.add(request("b", list(range(100, 140)), 8))
    for pieces in ([("a", 64, False)], [("a", 6, True), ("b", 40, True)]):
        d.step()  # 70 and 40 tokens take up 80 and 48 positions: two buckets of 64 and not one of 256
        assert [(c.request.request_id, c.length, c.samples) for c in d.plans[-1].chunks] == pieces
    d.drain()
    d.verify()


def test_an_urgent_request_takes_pages():
    d = Driver(dataclasses.replace(CONFIG, policy="priority", num_pages=14))
    d.add(request("a", [1] * 40, 40, priority=3))
    d.add(request("b", [2] * 40, 40, priority=5))
    for _ in range(3):
        d.step()
    d.add(request("urgent", [7] * 40, 3, priority=0))
    for _ in range(6):
        d.step()
    assert d.tokens["urgent"] and not d.finished.get("a")
    d.drain()
    d.verify()


def test_equal_priorities_do_not_preempt_each_other():
    d = Driver(dataclasses.replace(CONFIG, policy="priority", max_num_seqs=1))
    for i in range(4):
        d.add(request(f"r{i}", [i, 2], 8, priority=1))
    d.drain()
    d.verify()
    assert d.scheduler.counters.preemptions == 0


def test_a_request_that_does_not_fit_lets_others_pass_but_not_for_ever():
    config = dataclasses.replace(CONFIG, num_pages=13)
    d = Driver(config)
    d.add(request("running", [1] * 30, 40))
    d.step()
    d.add(request("big", list(range(80)), 4))
    passed = 0
    for i in range(200):
        d.add(request(f"small{i}", [7, i % 50], 2))
        d.step()
        big = d.scheduler.requests.get("big")
        if big is None or big.state is RequestState.RUNNING:
            break
        passed = max(passed, i)
    assert passed > 3, "smaller requests pass"
    d.drain()
    d.verify()


def test_deadlines_end_requests_waiting_and_running():
    d = Driver()
    d.add(request("running", [1, 2], 80, deadline=5.0))
    d.add(request("first", [1, 2, 3], 80, ttft_deadline=5.0))
    d.step(0.0)
    d.step(1.0)
    d.add(request("late", [1, 2], 80, deadline=2.0))
    d.step(6.0)
    assert d.finished == {"running": FinishReason.DEADLINE, "late": FinishReason.DEADLINE}
    assert d.errors["late"] == "it was not finished in time."
    d.drain()
    assert d.finished["first"] is FinishReason.LENGTH


def test_limits_on_waiting_and_running():
    d = Driver(dataclasses.replace(CONFIG, max_num_seqs=1, max_waiting_time=4.0, max_running_time=10.0))
    d.add(request("runs", [1, 2], 90))
    d.add(request("waits", [3, 4], 5))
    for now in range(1, 13):
        d.step(float(now))
        if now == 3:
            assert not d.finished
    assert d.finished == {"waits": FinishReason.DEADLINE, "runs": FinishReason.DEADLINE}
    assert "waited 4 s" in str(d.errors["waits"]) and "ran for 10 s" in str(d.errors["runs"])
    d.drain()


def test_a_first_token_that_cannot_come_in_time_is_not_waited_for():
    d = Driver(dataclasses.replace(CONFIG, max_num_seqs=1))
    d.add(request("runs", list(range(60)), 30))
    d.step(0.0)
    d.scheduler.deadlines.observe(d.plans[0], 6.0)  # 0.1 s a prompt token
    d.add(request("hopeless", [9] * 50, 5, ttft_deadline=4.0))
    d.add(request("fine", [8] * 10, 5, ttft_deadline=4.0))
    d.step(1.0)
    assert d.finished == {"hopeless": FinishReason.DEADLINE}
    assert "cannot come in time" in str(d.errors["hopeless"])
    d.drain()
    assert d.finished["fine"] is FinishReason.LENGTH


def test_evicted_pages_come_back_from_the_host_tier():
    config = dataclasses.replace(CONFIG, num_pages=14, host_pages=50)
    d = Driver(config)
    prompt = list(range(64))
    d.add(request("a", prompt, 4))
    d.drain()
    for i in range(4):  # push its pages out
        d.add(request(f"x{i}", [100 + i] * 60, 4))
        d.drain()
    d.add(request("b", prompt, 8))
    d.step()
    assert d.plans[-1].moves.pages_in and d.scheduler.requests["b"].num_cached_tokens == 56
    d.drain()
    d.verify()


def test_pages_are_computed_anew_where_that_is_cheaper_than_copying_them_back():
    for restore_page_s, restored in ((0.05, True), (0.2, False)):
        config = dataclasses.replace(CONFIG, num_pages=14, host_pages=50, restore_page_s=restore_page_s)
        d = Driver(config, token_s=0.01)  # a page of 8 tokens takes 0.08 s
        prompt = list(range(64))
        for i, p in enumerate([prompt, *([100 + j] * 60 for j in range(4)), prompt]):
            d.add(request(f"r{i}", p, 4))
            d.drain()
        assert (d.events["restored"] > 0) is restored
        d.verify()


def test_a_grammar_holds_while_steps_are_read_late():
    for asynchronous in (True, False):
        d = Driver(asynchronous=asynchronous)
        for i in range(6):
            grammar = fake.Residues(4 + i) if i % 2 else None
            d.add(request(f"r{i}", [i, 2, 3], 12, constraint=grammar))
        d.drain()
        d.verify()
        assert [len(d.tokens[f"r{i}"]) for i in range(6)] == [12, 5, 12, 7, 12, 9]


def test_a_slot_is_given_on_while_the_last_token_is_on_its_way():
    d = Driver(dataclasses.replace(CONFIG, max_num_seqs=1))
    d.add(request("a", [1, 2, 3], 3))
    d.add(request("b", [4, 5, 6], 3))
    d.drain()
    d.verify()
    assert len(d.plans) == 6, "no step is without a row"


def test_a_small_host_tier_forgets_the_oldest():
    config = dataclasses.replace(CONFIG, num_pages=14, host_pages=5)
    d = Driver(config)
    for i in range(12):
        d.add(request(f"x{i}", [i] * 60, 4))
        d.drain()
        assert len(d.device.host) <= 5 == d.scheduler.kv.managers[0].host_tier.capacity
        assert {key for _, key in d.device.host} == set(d.scheduler.kv.managers[0].host_tier._pages)
    d.verify()


def test_longest_cached_prefix_goes_first_when_asked_but_nobody_waits_for_ever():
    d = Driver(dataclasses.replace(CONFIG, prefix_first=True, max_num_seqs=1))
    stem = list(range(40))
    d.add(request("seed", stem, 2))
    d.drain()
    d.add(request("cold", [99] * 40, 2))
    d.add(request("warm", [*stem, 1], 2))
    order = []
    for i in range(400):
        if "cold" in d.scheduler.requests and i % 2 == 0:
            d.add(request(f"more{i}", [*stem, 2, i], 2))
        d.step()
        order += [r.request_id for r in d.plans[-1].admitted if r.request_id not in order]
        if "cold" in order:
            break
    assert order[0] == "warm" and order[-1] == "cold" and len(order) > 5


def test_fair_share_serves_a_light_tenant_beside_a_heavy_one():
    d = Driver(dataclasses.replace(CONFIG, fair_share=True, max_num_seqs=1))
    for i in range(100):
        d.add(request(f"heavy{i}", [i, 1, 2], 6, tenant="heavy"))
    for _ in range(40):
        d.step()
    for i in range(3):
        d.add(request(f"light{i}", [i, 7], 2, tenant="light"))
    order = []
    while sum(name.startswith("light") for name in order) < 3:
        d.step()
        order += [r.request_id for r in d.plans[-1].admitted if r.request_id not in order]
    assert len(order) <= 6, "the light tenant's three requests run among the heavy one's, not behind its hundred"
    d.drain()
    d.verify()


def test_refuses_what_cannot_run():
    s = Scheduler(CONFIG)
    s.add(request("a", [1]))
    for bad in (request("a", [1]), request("b", []), request("c", [1] * 96)):
        with pytest.raises(RequestError):
            s.add(bad)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("prefix", [True, False])
def test_random_walk(seed, prefix):
    walk(steps=400, seed=seed, asynchronous=seed % 3 != 0, enable_prefix_caching=prefix)


@pytest.mark.parametrize("seed", range(3))
def test_random_walk_with_drafts(seed):
    """Right drafts and wrong ones, through everything else: no token changes, and no page is lost or indexed too soon."""
    d = walk(400, seed, seed > 0, speculative_config=DRAFTS, buckets=None, num_scheduler_steps=seed + 1)
    counters = d.scheduler.counters
    assert d.events["drafts"] > 50 and 0 < counters.accepted_tokens < counters.draft_tokens
    assert sum(counters.accepted_per_pos) == counters.accepted_tokens


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_pages_behind_every_window_come_free(asynchronous, prefix):
    """A long sequence holds its window's pages and those in flight; what it left serves others' prefixes until it is needed."""
    config = dataclasses.replace(CONFIG, caches=paged(8), enable_prefix_caching=prefix, max_num_batched_tokens=16)
    d = Driver(config, asynchronous)
    d.add(request("long", list(range(50)), 40))
    held = []
    while d.scheduler.has_work:
        d.step()
        held += [r.num_held for r in d.scheduler.running if r.num_computed > 60]
    assert max(held) <= 4  # 8 positions lie in two pages of 8; one more was just begun, one waits to be indexed
    d.add(request("again", list(range(50)), 5))
    d.drain()
    d.verify()
    assert (d.scheduler.counters.prefix_hits > 0) == prefix


def test_a_window_lets_more_run_at_once():
    """Two sequences of 88 tokens on 15 pages of 8: without a window they cannot both run to their ends at once."""
    for window, preempted in ((None, True), (8, False)):
        d = Driver(dataclasses.replace(CONFIG, caches=paged(window), num_pages=16, enable_prefix_caching=False))
        for name in ("a", "b"):
            d.add(request(name, [ord(name)] * 8, 80))
        d.drain()
        d.verify()
        assert (d.scheduler.counters.preemptions > 0) == preempted


LONG_WALKS = {
    "fcfs": {"num_pages": 20, "host_pages": 0},
    "priority and swaps": {"num_pages": 14, "policy": "priority", "host_pages": 60, "restore_page_s": 0.05},
    "fair share and longest prefix first": {"num_pages": 20, "fair_share": True, "prefix_first": True, "host_pages": 3},
    "windows": {"num_pages": 14, "host_pages": 3, "caches": paged(8)},
    "groups": {"num_pages": 33, "host_pages": 3, "caches": paged(None, 8, 21)},
    "drafts": {"num_pages": 20, "host_pages": 3, "speculative_config": DRAFTS, "buckets": None, "caches": paged(None)},
    "several steps": {"num_pages": 60, "num_scheduler_steps": 4, "max_num_batched_tokens": 24},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG_WALKS)
def test_long_random_walk(name):
    """100,000 steps in all, and every kind of event in them."""
    d = walk(steps=25_000, seed=len(name), asynchronous=True, max_waiting_time=40.0, **LONG_WALKS[name])
    for event in ("stop", "length", "abort", "deadline", "surplus", "grammar"):
        assert d.events[event] > 100, event
    assert d.scheduler.counters.prefix_hits > 1000
    if LONG_WALKS[name]["num_pages"] < 60 and name != "windows":  # those leave enough pages behind
        assert d.scheduler.counters.preemptions > 100
    if name == "priority and swaps":
        assert d.events["restored"] > 100
    if name == "several steps":
        assert d.events["several steps"] > 100


BUCKETS = BucketTable(tuple(Bucket(b, c, c // 16) for c in (16, 64) for b in (0, 4)))


def walk(steps: int, seed: int, asynchronous: bool, **fixed) -> Driver:
    """Arrivals, shared prefixes, aborts, deadlines, time limits, priorities, tenants, grammars and late stops at random, on a
    pool that is too small; `fixed` sets what the seed does not choose."""
    rng = random.Random(seed)
    chosen = {
        "num_pages": rng.choice([14, 20, 60]),
        "policy": rng.choice(["fcfs", "priority"]),
        "max_num_batched_tokens": rng.choice([24, 64]),
        "host_pages": rng.choice([0, 3, 100]),
        "prefix_first": rng.random() < 0.3,
        "fair_share": rng.random() < 0.3,
        "num_scheduler_steps": rng.choice([1, None, 4]),
        "max_waiting_time": rng.choice([None, 40.0]),
        "max_running_time": rng.choice([None, 60.0]),
        "restore_page_s": rng.choice([0.0, 0.05, 0.5]),
        "caches": paged(*rng.choice([(None,), (None,), (8,), (21,), (None, 8), (8, 21), (None, 8, 8, 21)])),
        "buckets": rng.choice([None, BUCKETS]),
    }
    config = dataclasses.replace(CONFIG, **(chosen | fixed))
    if "num_pages" not in fixed:  # the longest sequence fits at least
        need = pages_of(config.max_model_len, config.windows, config.page_size, chunk=1)
        config = dataclasses.replace(config, num_pages=config.num_pages + max(0, need - 12))
    if not config.enable_prefix_caching:
        config = dataclasses.replace(config, host_pages=0)
    d = Driver(config, asynchronous, token_s=0.02)
    stems = [[rng.randrange(50) for _ in range(rng.randrange(8, 60))] for _ in range(4)]
    for i in range(steps):
        if rng.random() < 0.35 and len(d.scheduler.requests) < 30:
            stem = rng.choice(stems)
            prompt = stem[: rng.randrange(1, len(stem) + 1)] + [rng.randrange(50) for _ in range(rng.randrange(0, 12))]
            grammar = fake.Residues(rng.randrange(1, 30)) if rng.random() < 0.2 else None
            whose = (
                (rng.choice([None, "x", "y", "z"]), rng.choice([None, "s"])) if config.adapter_slots else (None, None)
            )
            accent = fake.accent_of(SimpleNamespace(adapter=whose[0], cache_salt=whose[1]))
            true = d.expected(prompt, 6, grammar is not None, accent)
            stop = (true[rng.randrange(6)],) if rng.random() < 0.4 else ()
            d.add(
                EngineRequest(
                    f"r{i}",
                    tuple(prompt),
                    SamplingParams(temperature=0, max_tokens=rng.randrange(1, 40)),
                    eos_token_ids=stop,
                    priority=rng.randrange(3),
                    constraint=grammar,
                    tenant=rng.choice(["a", "b"]),
                    arrival_time=float(i),
                    turn_ends=(rng.randrange(1, len(prompt) + 1),) if rng.random() < 0.3 else (),
                    whole=i % 100 < 60,
                    deadline=i + rng.randrange(1, 60) if rng.random() < 0.1 else None,
                    ttft_deadline=i + rng.randrange(1, 20) if rng.random() < 0.1 else None,
                    adapter=whose[0],
                    cache_salt=whose[1],
                )
            )
        if rng.random() < 0.05 and d.scheduler.requests:
            d.abort(rng.choice(list(d.scheduler.requests)))
        d.step(float(i))
    d.drain()
    d.verify()
    return d
